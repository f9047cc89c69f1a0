"""The time of one algorithm on one group in one protocol, as three constants.

Every algorithm here costs ``launch + steps + S / B + 2 * sqrt(ramp * S / B)``: the launch and the steps on the critical
path, the bytes over the worst link, and the price of filling a pipeline. The last follows from choosing the best chunk
in a pipeline of depth L and hop cost alpha: ``min over m of (L + S/m)(alpha + m/B) = S/B + 2 sqrt(alpha L S/B) +
alpha L``; the square root is what separates published sweeps from a straight line between 100 KB and 100 MB.

In a tree the steps come before the stream of bytes. In a ring and an all-to-all every rank does one step after the
other, each with its part of the bytes, and a step takes as long as its synchronisation or its bytes, whichever is
longer, because slices of one step travel while the next is agreed upon. ``hypot(steps, S / B)`` stands for that, a
smooth maximum (an all-reduce of 4 B300: 77 us of steps and 153 us of bytes take 179 us, not 230).

NCCL's protocols trade the cost of a step against bandwidth: LL writes a flag beside every 4 bytes, LL128 beside every
120, Simple synchronises once a chunk (src/graph/tuning.cc, hwLat). Each that a link class has is a candidate with its
own step and its own part of the wire; the short ones end where the library stops using them, which is where published
sweeps step up: by its own model for rings inside a domain (`simllm.network.tuning`), at a largest slot elsewhere.

All constants are non-negative, no bandwidth stands in a numerator and no limit depends on a bandwidth, so more bytes
are never faster and more bandwidth is never slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import TYPE_CHECKING

from simllm.hardware.links import PROTOCOLS, Curve, SwitchCurve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Hops", "Load", "Terms", "candidates"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Traffic over one kind of link.

    Parameters
    ----------
    link : str
        Name of the link.
    share : float
        Bytes over it for each byte of the collective's buffer.
    bandwidth : float
        Its wire bandwidth, bytes/s.
    curve : Curve or SwitchCurve
        The part of the wire that messages reach, by protocol, and how long its pipeline fills.
    messages : float
        How many move at once, each by threads of its own, where a protocol is limited by its threads.
    """

    link: str
    share: float
    bandwidth: float
    curve: Curve | SwitchCurve
    messages: float = 1.0

    def s_per_byte(self, protocol: str) -> float:
        """Seconds for each byte of the buffer."""
        return self.share / min(self.bandwidth * self.curve.part(protocol), self.messages * self.curve.rate(protocol))

    def s_per_sqrt_byte(self, protocol: str) -> float:
        """Filling of the pipeline."""
        return 2 * sqrt(self.curve.ramp_s(protocol) * self.share / self.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hops:
    """Dependent steps over one kind of link.

    Parameters
    ----------
    count : float
        How many.
    curve : Curve
        What one costs.
    across : Curve or None
        Of steps inside a domain: the curve of the link between domains that the collective also crosses.
    """

    count: float
    curve: Curve
    across: Curve | None = None

    def latency_s(self, protocol: str) -> float:
        """Seconds of all of them."""
        if self.across is None:
            return self.count * self.curve.step_s(protocol)
        return self.count * self.across.inner_step_s(protocol, self.curve)


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """An algorithm and protocol on a group: the constants of its time, and the bytes each GPU sends.

    Parameters
    ----------
    algorithm, protocol : str
        NCCL's names, or what the library of that accelerator calls it.
    latency_s, s_per_byte, s_per_sqrt_byte : float
        Constants of the time.
    scaleup_bytes, scaleout_bytes : float
        Bytes that one GPU sends inside its domain and out of it, for each byte of the buffer, averaged over the group.
    bottleneck : str
        Link whose bytes take longest.
    bottleneck_bandwidth : float
        Its wire bandwidth, bytes/s.
    most_bytes : float
        The largest buffer for which the library uses the protocol.
    hidden_s : float
        The part of the latency that hides behind the bytes, and the other way round.
    threads_s_per_byte : float
        What few threads take to hand a short message on, besides the bytes.
    """

    algorithm: str
    protocol: str
    latency_s: float
    s_per_byte: float
    s_per_sqrt_byte: float
    scaleup_bytes: float
    scaleout_bytes: float
    bottleneck: str
    bottleneck_bandwidth: float
    most_bytes: float = float("inf")
    hidden_s: float = 0.0
    threads_s_per_byte: float = 0.0

    def time_s(self, size_bytes: float) -> float:
        """Seconds for a buffer of ``size_bytes``; infinite beyond the reach of the protocol."""
        if size_bytes > self.most_bytes:
            return float("inf")
        fixed = self.latency_s - self.hidden_s + self.s_per_sqrt_byte * sqrt(size_bytes)
        fixed += self.threads_s_per_byte * size_bytes
        return fixed + hypot(self.hidden_s, self.s_per_byte * size_bytes)

    def times_s(self, sizes: NDArray[np.float64], roots: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds for an array of sizes; ``roots`` are their square roots."""
        import numpy as np

        moved = self.s_per_byte * sizes
        if self.hidden_s:
            np.hypot(self.hidden_s, moved, out=moved)
        times = (self.latency_s - self.hidden_s) + moved + self.s_per_sqrt_byte * roots
        if self.threads_s_per_byte:
            times += self.threads_s_per_byte * sizes
        if self.most_bytes != float("inf"):
            times[sizes > self.most_bytes] = float("inf")
        return times


def candidates(
    algorithm: str,
    *,
    launches: Sequence[Curve | SwitchCurve],
    hops: Sequence[Hops],
    loads: Sequence[Load],
    slots: float = 1,
    reach: Mapping[str, float] | None = None,
    overlapped: bool = False,
    scaleup_bytes: float,
    scaleout_bytes: float,
    protocol: str | None = None,
) -> tuple[Terms, ...]:
    """The constants of an algorithm in every protocol that all its links have, Simple last.

    The levels are pipelined into each other, so the slowest one sets the pace, and each adds its own filling time.

    Parameters
    ----------
    algorithm : str
        Its name.
    launches : sequence of Curve or SwitchCurve
        What a call costs before its first step: inside the domain, and what leaving it adds.
    hops, loads : sequence
        Dependent steps, and traffic.
    slots : float
        Into how many slots the buffer is cut: the ranks of a ring.
    reach : mapping of str to float, optional
        The largest buffer for each protocol, where it is no slot of every link: by the library's own model
        (`simllm.network.tuning`), or the whole buffer of a tree; those that are not there are never used.
    overlapped : bool
        Whether steps hide behind their bytes.
    scaleup_bytes, scaleout_bytes : float
        As in `Terms`.
    protocol : str, optional
        What to call the only way of a library without protocols.

    Examples
    --------
    >>> from simllm.hardware.links import load_link
    >>> curve = load_link("nvlink4").ring
    >>> wire = Load(link="nvlink4", share=1.75, bandwidth=450e9, curve=curve)
    >>> steps = Hops(count=14, curve=curve)
    >>> found = candidates("ring", launches=[curve], hops=[steps], loads=[wire], scaleup_bytes=1.75, scaleout_bytes=0)
    >>> [terms.protocol for terms in found]
    ['LL', 'LL128', 'Simple']
    """
    used: list[Curve | SwitchCurve] = [load.curve for load in loads]
    used += [hop.curve for hop in hops if hop.count]
    found = []
    for name in PROTOCOLS:
        if not all(curve.has(name) for curve in used) or (protocol and name != "Simple"):
            continue
        if reach is not None and name not in reach:
            continue
        worst = max(loads, key=lambda load: load.s_per_byte(name))
        stepping_s = sum(hop.latency_s(name) for hop in hops)
        found.append(
            Terms(
                algorithm=algorithm,
                protocol=protocol or name,
                latency_s=sum(curve.launch_s(name) for curve in launches) + stepping_s,
                hidden_s=stepping_s if overlapped else 0.0,
                s_per_byte=worst.s_per_byte(name),
                s_per_sqrt_byte=sum(load.s_per_sqrt_byte(name) for load in loads),
                scaleup_bytes=scaleup_bytes,
                scaleout_bytes=scaleout_bytes,
                bottleneck=worst.link,
                bottleneck_bandwidth=worst.bandwidth,
                most_bytes=slots * min(curve.slot_bytes(name) for curve in used) if reach is None else reach[name],
            )
        )
    return tuple(found)
