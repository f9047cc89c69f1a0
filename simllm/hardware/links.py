"""Link classes: what a collective really gets out of a wire, and what a step over it costs.

A system says how fast its links are; the class of the link (`hardware_profiles/links/`) says which part of that a
collective reaches, how long a launch and a hop take, and which algorithms the library of that hardware has. These are
the constants of the formulas in `simllm.network`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from simllm.hardware.figures import Count, Figure
from simllm.hardware.profiles import find_profile, list_profiles, load_profile, load_profile_file, register_kind

__all__ = ["ALGORITHMS", "Curve", "Link", "Part", "Seconds", "SlotParts", "SwitchCurve", "list_links", "load_link"]

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "hierarchical", "torus"]

#: Algorithms that a link class may offer; point to point and all-to-all exist everywhere.
ALGORITHMS: tuple[str, ...] = ("ring", "tree", "nvls", "nvls_tree", "hierarchical", "torus")


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


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time of one way of using a link: ``launch + steps * step + S / (efficiency * B) + 2 sqrt(ramp * S / B)``.

    Attributes
    ----------
    efficiency : Figure
        Part of the wire's bandwidth that large messages reach.
    launch : Figure
        Cost of a call before its first step; of a scale-out link: what leaving the domain adds to it.
    step : Figure
        One step on the critical path in the protocol with the cheapest steps (LL).
    bulk_step : Figure or None
        The same in the protocol of large messages (Simple); None where both cost the same.
    inner_bulk_step : Figure or None
        Of a scale-out link: a step inside a domain in that protocol, in a collective that crosses this link; None for
        the step of the link inside. A collective that stays in its domain keeps cheap steps to larger sizes.
    ramp : Figure
        Filling time of the pipeline, see `simllm.network.terms`.
    copy : Figure or None
        Slots that each GPU copies locally, for rings and all-to-all; None for none.
    """

    efficiency: Part
    launch: Seconds
    step: Seconds
    bulk_step: Seconds | None = None
    inner_bulk_step: Seconds | None = None
    ramp: Seconds
    copy: SlotParts | None = None

    @property
    def bulk_step_s(self) -> float:
        """A step in the protocol of large messages, never cheaper than the other."""
        return self.step.si if self.bulk_step is None else max(self.step.si, self.bulk_step.si)

    def inner_bulk_step_s(self, inside: Curve) -> float:
        """A step over the link ``inside`` the domains, in a collective that crosses this one with large messages."""
        if self.inner_bulk_step is None:
            return inside.bulk_step_s
        return max(inside.step.si, self.inner_bulk_step.si)

    @property
    def copied_slots(self) -> float:
        """Slots copied locally."""
        return 0.0 if self.copy is None else self.copy.si


class SwitchCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In-switch reduction (NVLink SHARP): the switch adds, so a GPU sends its data once.

    Attributes
    ----------
    efficiency, launch, ramp : Figure
        As in `Curve`.
    minimum_group : Figure
        Fewest GPUs of a domain for which the library uses it.
    """

    efficiency: Part
    launch: Seconds
    ramp: Seconds
    minimum_group: Count


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of links.

    Attributes
    ----------
    name : str
        Canonical name, the file name.
    scope : str
        ``scale-up`` (inside a domain) or ``scale-out`` (between domains).
    algorithms : tuple of str
        Of a scale-up link: algorithms of the library that drives it.
    ring, all_to_all, p2p : Curve
        Ring collectives and broadcast, all-to-all, send and receive.
    tree : Curve or None
        Tree all-reduce across domains; of a scale-out link.
    switch : SwitchCurve or None
        In-switch reduction; of a scale-up link whose switch has it.
    rails : Figure or None
        Of a scale-up link: the most GPUs of a domain through which one collective leaves it; None for all of them.
    """

    kind: Literal["link"]
    name: str
    aliases: tuple[str, ...] = ()
    scope: Literal["scale-up", "scale-out"]
    description: str
    algorithms: tuple[Algorithm, ...] = ()
    ring: Curve
    tree: Curve | None = None
    switch: SwitchCurve | None = None
    all_to_all: Curve
    p2p: Curve
    rails: Count | None = None

    def __post_init__(self) -> None:
        if self.scope == "scale-up" and not self.algorithms:
            raise ValueError(f"a scale-up link names the algorithms of its library; use {', '.join(ALGORITHMS)}")
        if self.scope == "scale-out" and (self.algorithms or self.switch or self.rails):
            raise ValueError("algorithms, switch and rails belong to the scale-up link of a system")
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
    """A link class by name or alias.

    Examples
    --------
    >>> link = load_link("nvlink4")
    >>> link.scope, link.switch.minimum_group.value
    ('scale-up', 5)
    """
    return load_profile_file(find_profile("links", name, "link class"), Link)


def _check(path: Path, data: dict[str, Any]) -> list[str]:
    load_profile(data, Link, str(path))
    return []


register_kind("link", _check)
