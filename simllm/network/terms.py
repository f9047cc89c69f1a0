"""The time of one algorithm on one group, as three constants.

Every algorithm here costs ``latency + S / B + 2 * sqrt(ramp * S / B)``: the launch and the steps on the critical path,
the bytes over the worst link, and the price of filling a pipeline. The last follows from choosing the best chunk in a
pipeline of depth L and hop cost alpha: ``min over m of (L + S/m)(alpha + m/B) = S/B + 2 sqrt(alpha L S/B) + alpha L``;
the square root is what separates published sweeps from a straight line between 100 KB and 100 MB.

NCCL's protocols trade the cost of a step against bandwidth: LL and LL128 write flags beside the data, Simple
synchronises once a chunk (src/graph/tuning.cc, hwLat). A message of middle size pays more and more of the dearer step
until all of it runs as Simple, which makes two candidates of every algorithm:

    LL, LL128   latency of the cheap steps, 2 sqrt(alpha L S/B) on top
    Simple      latency of the dear steps,  alpha L on top

with alpha the difference of the two steps. All constants are non-negative and no bandwidth stands in a numerator, so
more bytes are never faster and more bandwidth is never slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from simllm.hardware.links import Curve, SwitchCurve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Hops", "Load", "Terms", "candidates", "load_of"]


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
    efficiency : float
        The part of the wire that large messages reach.
    ramp_s : float
        Filling time of its pipeline (the alpha L above), seconds.
    """

    link: str
    share: float
    bandwidth: float
    efficiency: float
    ramp_s: float = 0.0

    @property
    def s_per_byte(self) -> float:
        """Seconds for each byte of the buffer."""
        return self.share / (self.bandwidth * self.efficiency)


def load_of(curve: Curve | SwitchCurve, *, link: str, share: float, bandwidth: float, ramp_s: float = 0.0) -> Load:
    """Traffic that reaches the efficiency of ``curve`` and fills the pipeline in its time plus ``ramp_s``."""
    return Load(
        link=link,
        share=share,
        bandwidth=bandwidth,
        efficiency=curve.efficiency.si,
        ramp_s=curve.ramp.si + ramp_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Hops:
    """Dependent steps over one kind of link: how many, and what one costs in the cheapest protocol and in Simple."""

    count: float
    step_s: float
    bulk_step_s: float


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
    simple_from_bytes : float
        Below this size the library runs these terms in LL or LL128: while the bytes take less time than the steps.
        Published sweeps step up where it says (4 MB for an all-gather of 8 H100, 13 MB of 8 B200).
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
    simple_from_bytes: float = 0.0

    def time_s(self, size_bytes: float) -> float:
        """Seconds for a buffer of ``size_bytes``."""
        return self.latency_s + self.s_per_byte * size_bytes + self.s_per_sqrt_byte * sqrt(size_bytes)

    def times_s(self, sizes: NDArray[np.float64], roots: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds for an array of sizes; ``roots`` are their square roots."""
        return self.latency_s + self.s_per_byte * sizes + self.s_per_sqrt_byte * roots


def candidates(
    algorithm: str,
    *,
    launch_s: float,
    hops: Sequence[Hops],
    loads: Sequence[Load],
    scaleup_bytes: float,
    scaleout_bytes: float,
    protocol: str | None = None,
) -> tuple[Terms, ...]:
    """The constants of an algorithm, one entry a protocol; a single one where a ``protocol`` is given.

    The levels are pipelined into each other, so the slowest one sets the pace, and each adds its own filling time.

    Examples
    --------
    >>> wire = Load(link="nvlink4", share=1.75, bandwidth=450e9, efficiency=0.8, ramp_s=4e-6)
    >>> steps = Hops(count=14, step_s=0.8e-6, bulk_step_s=3.4e-6)
    >>> both = candidates("ring", launch_s=4e-6, hops=[steps], loads=[wire], scaleup_bytes=1.75, scaleout_bytes=0)
    >>> [(terms.protocol, round(terms.time_s(2**30) * 1e3, 3)) for terms in both]
    [('LL', 6.365), ('Simple', 5.53)]
    """
    worst = max(loads, key=lambda load: load.s_per_byte)
    fill = sum(2 * sqrt(load.ramp_s * load.share / load.bandwidth) for load in loads)
    latency = launch_s + sum(hop.count * hop.step_s for hop in hops)
    dearer = sum(hop.count * max(hop.bulk_step_s - hop.step_s, 0.0) for hop in hops)

    def terms(name: str, latency_s: float, s_per_sqrt_byte: float, simple_from_bytes: float = 0.0) -> Terms:
        return Terms(
            algorithm=algorithm,
            protocol=name,
            latency_s=latency_s,
            s_per_byte=worst.s_per_byte,
            s_per_sqrt_byte=s_per_sqrt_byte,
            scaleup_bytes=scaleup_bytes,
            scaleout_bytes=scaleout_bytes,
            bottleneck=worst.link,
            bottleneck_bandwidth=worst.bandwidth,
            simple_from_bytes=simple_from_bytes,
        )

    if protocol is not None:
        return (terms(protocol, latency + dearer, fill),)
    if dearer == 0:
        return (terms("Simple", latency, fill, latency / worst.s_per_byte),)
    cheap_steps = terms("LL", latency, fill + 2 * sqrt(dearer * worst.s_per_byte))
    return cheap_steps, terms("Simple", latency + dearer, fill)
