"""Link classes: what a collective really gets out of a wire, and what a step over it costs.

A system says how fast its links are; the class of the link (`hardware_profiles/links/`) says which part of that a
collective reaches, how long a launch and a hop take, and which algorithms the library of that hardware has. These are
the constants of the formulas in `simllm.network`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from simllm.hardware.figures import Bytes, BytesPerSecond, Count, Figure
from simllm.hardware.profiles import list_profiles, load_profile, load_profile_file, profile_file, register_kind

__all__ = [
    "ALGORITHMS",
    "PROTOCOLS",
    "Curve",
    "Earlier",
    "Extra",
    "Link",
    "Multiple",
    "Part",
    "Posting",
    "Protocol",
    "Seconds",
    "SlotParts",
    "SwitchCurve",
    "link_beside",
    "link_of_library",
    "list_links",
    "load_link",
]

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "collnet", "pat", "pxn", "hierarchical", "torus"]

#: Algorithms that a link class may offer; point to point and all-to-all exist everywhere.
ALGORITHMS: tuple[str, ...] = ("ring", "tree", "nvls", "nvls_tree", "collnet", "pat", "pxn", "hierarchical", "torus")

#: Ways to move a slot, from the cheapest step to the highest bandwidth (NCCL's names).
PROTOCOLS: tuple[str, ...] = ("LL", "LL128", "Simple")

# What the flags of a protocol leave of a wire (NCCL, src/graph/tuning.cc).
_LEFT_BY_FLAGS: dict[str, float] = {"LL": 0.5, "LL128": 0.92}


class Seconds(Figure, frozen=True):
    """A duration; may be zero."""

    dimension = "time"
    minimum = 0.0


class Part(Figure, frozen=True):
    """The part of a wire's bandwidth that large messages reach."""

    dimension = "fraction"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value > 1:
            raise ValueError(f"value {self.value} must be at most 1: no message is faster than the wire")


class SlotParts(Figure, frozen=True):
    """Slots (one rank's part of the buffer) that are copied besides those that travel; may be zero."""

    dimension = "fraction"
    minimum = 0.0


class Multiple(Figure, frozen=True):
    """How many times something counts, not a whole number."""

    dimension = "count"
    minimum = 0.0


class Extra(Figure, frozen=True):
    """What comes on top, as a part of what it is added to; may be zero."""

    dimension = "fraction"
    minimum = 0.0


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A protocol for short messages: flags travel with the data, so steps are cheap and bandwidth is lost.

    Attributes
    ----------
    step : Figure or None
        One step on the critical path; None where calls that follow each other hide them.
    efficiency : Figure or None
        Part of the wire's bandwidth that it reaches; None for what its flags leave of that of large messages, a half
        of it in LL and 0.92 in LL128 (NCCL, src/graph/tuning.cc).
    rate : Figure or None
        What the threads that move one message reach over any wire; None where the wire alone limits them.
    slot : Figure or None
        The largest slot (what one step carries) that the library sends in it; None for any.
    launch : Figure or None
        Cost of a call before its first step; None for that of large messages.
    ramp : Figure or None
        Filling time of the pipeline; None where messages so short are not cut into chunks.
    """

    launch: Seconds | None = None
    step: Seconds | None = None
    efficiency: Part | None = None
    rate: BytesPerSecond | None = None
    slot: Bytes | None = None
    ramp: Seconds | None = None


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time of one way of using a link, ``launch + steps * step + S / (efficiency * B) + 2 sqrt(ramp * S / B)``.

    The figures are those of large messages (NCCL's Simple protocol); `ll` and `ll128` hold what differs in the others.

    Attributes
    ----------
    efficiency : Figure
        Part of the wire's bandwidth that large messages reach.
    launch : Figure
        Cost of a call before its first step; of a scale-out link: what leaving the domain adds to it.
    step : Figure
        One step on the critical path.
    inner_step : Figure or None
        Of a scale-out link: a step inside a domain in a collective that crosses this link with large messages; None
        for the step of the link inside.
    ramp : Figure
        Filling time of the pipeline, see `simllm.network.terms`.
    copy : Figure or None
        Slots that each GPU copies locally, for rings; None for none.
    channels, channel : Figure or None
        Of an all-to-all: how many channels move what a GPU sends and what stays on it, and what one of them moves; None
        where the wire alone limits them.
    injection : Figure or None
        Of a broadcast, and of rings under old libraries: the rate at which the fewest threads that the library starts
        hand short messages on; of a scale-out link: in a ring that crosses it, None for that of the link inside.
    chunk : Figure or None
        Of a broadcast: what all channels together hand over at a time, where it arrives whole before it goes on; None
        where the pipeline is finer than that.
    ll, ll128 : Protocol or None
        NCCL's protocols of short messages, where the library has them.
    """

    efficiency: Part
    launch: Seconds
    step: Seconds
    inner_step: Seconds | None = None
    ramp: Seconds
    copy: SlotParts | None = None
    channels: Multiple | None = None
    channel: BytesPerSecond | None = None
    injection: BytesPerSecond | None = None
    chunk: Bytes | None = None
    ll: Protocol | None = None
    ll128: Protocol | None = None

    def __post_init__(self) -> None:
        if (self.channels is None) != (self.channel is None):
            raise ValueError("channels need the rate of one of them, `channel`, and the other way round")

    def has(self, protocol: str) -> bool:
        """Whether the library can use the link so."""
        return protocol == "Simple" or self._short(protocol) is not None

    def launch_s(self, protocol: str) -> float:
        """Cost of a call before its first step."""
        short = self._short(protocol)
        return self.launch.si if short is None or short.launch is None else short.launch.si

    def step_s(self, protocol: str) -> float:
        """One step on the critical path."""
        short = self._short(protocol)
        if short is None:
            return self.step.si
        return 0.0 if short.step is None else short.step.si

    def inner_step_s(self, protocol: str, inside: Curve) -> float:
        """A step over the link ``inside`` the domains, in a collective that crosses this one."""
        if protocol != "Simple" or self.inner_step is None:
            return inside.step_s(protocol)
        return self.inner_step.si

    def part(self, protocol: str) -> float:
        """The part of the wire that large enough messages reach."""
        short = self._short(protocol)
        if short is None:
            return self.efficiency.si
        return _LEFT_BY_FLAGS[protocol] * self.efficiency.si if short.efficiency is None else short.efficiency.si

    def rate(self, protocol: str) -> float:
        """What one message reaches over any wire, bytes/s."""
        short = self._short(protocol)
        return float("inf") if short is None or short.rate is None else short.rate.si

    def slot_bytes(self, protocol: str) -> float:
        """The largest slot that the library sends so."""
        short = self._short(protocol)
        return float("inf") if short is None or short.slot is None else short.slot.si

    def ramp_s(self, protocol: str) -> float:
        """Filling time of the pipeline."""
        short = self._short(protocol)
        if short is None:
            return self.ramp.si
        return 0.0 if short.ramp is None else short.ramp.si

    @property
    def chunk_bytes(self) -> float:
        """What the channels hand over whole; zero for nothing."""
        return 0.0 if self.chunk is None else self.chunk.si

    @property
    def moved(self) -> float:
        """What the channels of a GPU move altogether, bytes/s."""
        if self.channels is None or self.channel is None:
            return float("inf")
        return self.channels.si * self.channel.si

    @property
    def copied_slots(self) -> float:
        """Slots copied locally."""
        return 0.0 if self.copy is None else self.copy.si

    def _short(self, protocol: str) -> Protocol | None:
        return self.ll if protocol == "LL" else self.ll128 if protocol == "LL128" else None


class SwitchCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reduction in the switch: NVLink SHARP inside a domain, InfiniBand SHARP between domains.

    Attributes
    ----------
    efficiency, launch, ramp : Figure
        As in `Curve`.
    onward_efficiency : Figure or None
        Of NVLink: part of the wire where the sums go on to other domains, as the same thread blocks then feed the NICs
        too; None for `efficiency`.
    minimum_group : Figure
        Fewest members (GPUs of a domain; domains of a group) for which the library uses it.
    """

    efficiency: Part
    onward_efficiency: Part | None = None
    launch: Seconds
    ramp: Seconds
    minimum_group: Count

    @property
    def onward(self) -> SwitchCurve:
        """The same where the sums go on to other domains."""
        return msgspec.structs.replace(self, efficiency=self.onward_efficiency or self.efficiency)

    def launch_s(self, protocol: str) -> float:
        """Cost of a call before its first step."""
        return self.launch.si

    def has(self, protocol: str) -> bool:
        """The switch reduces whole chunks only."""
        return protocol == "Simple"

    def part(self, protocol: str) -> float:
        """The part of the wire that large enough messages reach."""
        return self.efficiency.si

    def rate(self, protocol: str) -> float:
        """No limit."""
        return float("inf")

    def slot_bytes(self, protocol: str) -> float:
        """No limit."""
        return float("inf")

    def ramp_s(self, protocol: str) -> float:
        """Filling time of the pipeline."""
        return self.ramp.si


class Posting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the host needs to hand a collective to the GPUs, one after the other, when one process drives several.

    Attributes
    ----------
    launch : Figure
        One kernel on one GPU.
    message : Figure
        One send or receive of a grouped point-to-point operation.
    """

    launch: Seconds
    message: Seconds


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the library believes of its rings inside a domain when it chooses their protocol.

    Attributes
    ----------
    model : {"nccl-nvlink", "nccl-pcie", "nccl-2-8-nvlink"}
        The link class with its latencies, see `simllm.network.tuning`.
    bus : Figure
        What the rings carry that it finds.
    pair_bus : Figure or None
        The same between two devices; None for `bus`.
    ll : Figure or None
        The most that it takes LL to reach; None for no such limit.
    """

    model: Literal["nccl-nvlink", "nccl-pcie", "nccl-2-8-nvlink"]
    bus: BytesPerSecond
    pair_bus: BytesPerSecond | None = None
    ll: BytesPerSecond | None = None


class Earlier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What older versions of the library made of the same wires.

    Attributes
    ----------
    library : str
        Its name, as the column `library` of a table of collectives begins.
    version : str
        The last version to which the other class applies, such as ``2.10``.
    link : str
        That link class.
    source : str
        What shows that versions differ, and where.
    """

    library: str
    version: str
    link: str
    source: str


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of links.

    Attributes
    ----------
    name : str
        Canonical name, the file name.
    scope : str
        ``scale-up`` (inside a domain) or ``scale-out`` (between domains).
    like : str or None
        The class nearest in kind, whose figures hold where this one was never measured.
    pools : bool
        Whether this is no class of any machine but what the classes like it have in common: its figures are fitted to
        the measurements of all of them, and those of a class with few measurements stay near them.
    earlier : Earlier or None
        The class of the same wires under old versions of the library.
    algorithms : tuple of str
        Of a scale-up link: algorithms of the library that drives it.
    ring, all_to_all, p2p : Curve
        Ring collectives, all-to-all, send and receive.
    broadcast : Curve or None
        Broadcast along the ring; None for the figures of `ring`.
    tree : Curve or None
        Tree all-reduce across domains; of a scale-out link.
    pat : Curve or None
        Parallel aggregated trees, of a scale-out link; its inner step is the handling of one rank's part.
    overlap : Figure or None
        Of a scale-up link: the part by which kernels take longer while a collective runs beside them.
    switch : SwitchCurve or None
        In-switch reduction, where the switches of this class have it.
    pair : Curve or None
        Of PCIe: ring collectives of two GPUs, which meet at a switch below the host; None for the figures of `ring`.
    host_limit : Figure or None
        Of PCIe: the most that one GPU exchanges with others through the root complex of the host, whatever its slot.
    shared : bool
        Whether all members of a domain share the bandwidth of one link, as transfers staged in host memory do.
    rails : Figure or None
        Of a scale-up link: the most GPUs of a domain through which one collective leaves it; None for all of them.
    posting : Posting or None
        Of a scale-up link: cost of driving several GPUs from one process.
    tuning : Tuning or None
        Of a scale-up link: how the library chooses the protocol of a ring; None where it is only known from slots.
    tuner : bool
        Of a scale-out link: whether a plugin of its provider chooses algorithms, not the library.
    """

    kind: Literal["link"]
    name: str
    aliases: tuple[str, ...] = ()
    scope: Literal["scale-up", "scale-out"]
    description: str
    like: str | None = None
    pools: bool = False
    earlier: Earlier | None = None
    algorithms: tuple[Algorithm, ...] = ()
    ring: Curve
    broadcast: Curve | None = None
    tree: Curve | None = None
    pat: Curve | None = None
    switch: SwitchCurve | None = None
    all_to_all: Curve
    p2p: Curve
    pair: Curve | None = None
    host_limit: BytesPerSecond | None = None
    shared: bool = False
    rails: Count | None = None
    posting: Posting | None = None
    tuning: Tuning | None = None
    tuner: bool = False
    overlap: Extra | None = None

    def __post_init__(self) -> None:
        if self.scope == "scale-up" and not self.algorithms:
            raise ValueError(f"a scale-up link names the algorithms of its library; use {', '.join(ALGORITHMS)}")
        inside = (self.algorithms, self.rails, self.posting, self.shared, self.pair, self.host_limit, self.tuning)
        if self.scope == "scale-out" and any(inside):
            raise ValueError(
                "algorithms, rails, posting, shared, pair, host_limit and tuning belong to the scale-up link"
            )
        if self.scope == "scale-up" and self.tuner:
            raise ValueError("tuner belongs to the scale-out link of a system")
        if {"nvls", "nvls_tree"} & set(self.algorithms) and self.switch is None:
            raise ValueError("nvls and nvls_tree need the figures of `switch`")


def list_links() -> tuple[str, ...]:
    """Names of the link classes.

    >>> {"nvlink4", "infiniband", "ici"} <= set(list_links())
    True
    """
    return list_profiles("links")


@lru_cache(maxsize=256)
def load_link(name: str) -> Link:
    """A link class by name or alias, or from a YAML file of one's own, as `simllm calibrate collectives` writes it.

    Examples
    --------
    >>> link = load_link("nvlink4")
    >>> link.scope, link.switch.minimum_group.value
    ('scale-up', 5)
    """
    return load_profile_file(profile_file("links", name, "link class"), Link)


def link_of_library(name: str, library: str) -> str:
    """The class of the same wires under a version of the library, written as tables of collectives do.

    Examples
    --------
    >>> [link_of_library("nvlink3", library) for library in ("NCCL 2.8.4", "NCCL 2.27.3", "")]
    ['nvlink3-nccl-2-10', 'nvlink3', 'nvlink3']
    """
    earlier = load_link(name).earlier
    version = re.search(r"\d+(?:\.\d+)+(?!\w)", library)
    if earlier is None or version is None or not library.startswith(earlier.library):
        return name
    last = [int(part) for part in earlier.version.split(".")]
    given = [int(part) for part in version[0].split(".")][: len(last)]
    return earlier.link if given <= last else name


def link_beside(name: str, folder: Path) -> str:
    """A link class as a profile in ``folder`` names it: a path of one's own file is relative to that folder."""
    return str(folder / name) if name.lower().endswith((".yaml", ".yml")) else name


def _check(path: Path, data: dict[str, Any]) -> list[str]:
    link = load_profile(data, Link, str(path))
    if link.like is not None and link.like not in list_links():
        return [f"{path}: like: no link class {link.like!r}; use {', '.join(list_links())}"]
    if link.earlier is not None and link.earlier.link not in list_links():
        return [f"{path}: earlier: no link class {link.earlier.link!r}; use {', '.join(list_links())}"]
    return []


register_kind("link", _check)
