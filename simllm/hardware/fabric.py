"""Fabrics: how devices and nodes are wired, apart from how fast one link is.

A scale-up fabric joins the devices of one domain (an NVSwitch, a mesh, a torus, a PCIe box); a scale-out fabric joins
nodes. Each wiring has its own class, told apart by the key ``topology``, because each needs different facts.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import BytesPerSecond, Count, Ratio
from simllm.hardware.profiles import load_profile, load_profile_file, profile_file, register_kind

__all__ = ["CubeMesh", "Fabric", "FatTree", "Mesh", "NVSwitch", "PCIe", "ScaleUpFabric", "Tier", "Torus", "load_fabric"]


class Fabric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="topology"):
    """What every fabric file says."""

    kind: Literal["fabric"]
    name: str
    aliases: tuple[str, ...] = ()
    notes: str | None = None


class Tier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One level of a fat tree.

    `nodes` is how many nodes lie below one group of switches of this level; `oversubscription` is what those nodes
    can send over what can leave the group upwards.
    """

    nodes: Count
    oversubscription: Ratio


class FatTree(Fabric, frozen=True, tag="fat-tree"):
    """Leaf, spine and core switches (Leiserson 1985; Al-Fares et al. 2008).

    In a rail-optimised tree the i-th NIC of every node below a leaf group goes to the i-th leaf switch of the group,
    so that equal local ranks meet at the first switch.
    """

    rail_optimised: bool
    switch_ports: Count
    leaf: Tier
    pod: Tier | None = None

    def __post_init__(self) -> None:
        if self.pod is not None:
            if self.pod.nodes.value % self.leaf.nodes.value:
                raise ValueError(
                    f"pod.nodes={self.pod.nodes.value} is not a multiple of leaf.nodes={self.leaf.nodes.value}"
                )
            if self.pod.oversubscription.si < self.leaf.oversubscription.si:
                raise ValueError("pod.oversubscription counts from the nodes, so it is at least leaf.oversubscription")


class NVSwitch(Fabric, frozen=True, tag="nvswitch"):
    """A non-blocking switched domain; every device spreads its links over all `switches`."""

    switches: Count


class Mesh(Fabric, frozen=True, tag="mesh"):
    """A direct link between every two devices: of the domain, or of each `island` of it.

    Islands reach each other through the hosts: `between_islands` is what one can send to the others at once.
    """

    island: Count | None = None
    between_islands: BytesPerSecond | None = None

    def __post_init__(self) -> None:
        if self.between_islands is not None and self.island is None:
            raise ValueError("between_islands is given, but no island; give the devices of an island")


class CubeMesh(Fabric, frozen=True, tag="cube-mesh"):
    """Eight devices at the corners of a cube: `wires` lists [device, device, number of links]."""

    wires: tuple[tuple[int, int, int], ...]
    source: str

    def __post_init__(self) -> None:
        for wire in self.wires:
            if min(wire) < 0 or wire[0] == wire[1] or wire[2] < 1:
                raise ValueError(f"wire {list(wire)} is not [device, another device, links above zero]")

    @property
    def corners(self) -> int:
        """How many devices it joins."""
        return 1 + max(max(a, b) for a, b, _ in self.wires)

    @property
    def links_per_device(self) -> int:
        """Links of the best connected device; its bandwidth is spread over them."""
        return max(sum(links for a, b, links in self.wires if i in (a, b)) for i in range(self.corners))


class PCIe(Fabric, frozen=True, tag="pcie"):
    """Devices that meet at the root complex of their host."""


class Torus(Fabric, frozen=True, tag="torus"):
    """A grid of devices with a link to the next device each way along every axis.

    An axis closes to a ring when its length is a multiple of `wrap_multiple`; shorter slices end at their faces.
    `max_axis` is the longest axis that can be cut out, where the wiring is fixed.
    """

    dimensions: Count
    wrap_multiple: Count
    max_axis: Count | None = None

    def slice_shape(self, devices: int) -> tuple[int, ...]:
        """The most compact grid of so many devices, axes in rising order.

        >>> load_fabric("torus-3d").slice_shape(128), load_fabric("torus-2d-16").slice_shape(256)
        ((4, 4, 8), (16, 16))
        """
        limit = int(self.max_axis.value) if self.max_axis else devices
        shape = _compact_grid(devices, int(self.dimensions.value), limit)
        if shape is None:
            raise InputError(
                f"no slice of {self.name} has {devices} chips: no {self.dimensions.value}-d grid with axes up to "
                f"{limit} holds exactly that many; use a multiple of {limit} or a power of two"
            )
        return shape

    def wraps(self, axis: int) -> bool:
        """Whether an axis of this length is closed to a ring."""
        return axis > 2 and axis % int(self.wrap_multiple.value) == 0


ScaleUpFabric = NVSwitch | Mesh | CubeMesh | PCIe | Torus
AnyFabric = FatTree | NVSwitch | Mesh | CubeMesh | PCIe | Torus


@lru_cache(maxsize=1024)
def _compact_grid(devices: int, dimensions: int, limit: int) -> tuple[int, ...] | None:
    if dimensions == 1:
        return (devices,) if devices <= limit else None
    best: tuple[int, ...] | None = None
    first = 1
    while first**dimensions <= devices:
        if devices % first == 0 and first <= limit:
            rest = _compact_grid(devices // first, dimensions - 1, limit)
            if rest is not None and rest[0] >= first:
                shape = (first, *rest)
                # Fewer hops in the longest axis first, then the shape nearest to a cube.
                if best is None or (shape[-1], _spread(shape)) < (best[-1], _spread(best)):
                    best = shape
        first += 1
    return best


def _spread(shape: tuple[int, ...]) -> int:
    return sum(b - a for a, b in pairwise(shape))


def load_fabric(name_or_path: str, *, beside: Path | None = None) -> AnyFabric:
    """A fabric of the catalog by name, or from a YAML file of one's own.

    >>> load_fabric("rail-optimised-ndr").leaf.nodes.value
    32
    """
    path = profile_file("fabrics", name_or_path, "fabric", beside=beside)
    # A union is a shape to msgspec, but not a type to mypy.
    return cast("AnyFabric", load_profile_file(path, cast("type[Fabric]", AnyFabric)))


def _check(path: Path, data: dict[str, Any]) -> list[str]:
    load_profile(data, AnyFabric, str(path))
    return []


register_kind("fabric", _check)
