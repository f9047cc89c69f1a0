"""Systems as files: the node, the scale-up domain and the network of something that can be bought or rented."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from simllm.errors import InputError
from simllm.hardware.accelerator import load_accelerator
from simllm.hardware.fabric import FatTree, load_fabric
from simllm.hardware.figures import BytesPerSecond, Count
from simllm.hardware.host import Host
from simllm.hardware.links import link_beside, load_link
from simllm.hardware.profiles import load_profile, register_kind

__all__ = ["SystemProfile"]


class _Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host: its devices, and its ports into the network between nodes."""

    gpus: Count
    nics: Count | None = None
    nic_bandwidth: BytesPerSecond | None = None
    host_link: str | None = None


class _ScaleUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fast domain: `bandwidth` is one device's, in each direction."""

    link: str
    fabric: str
    domain_gpus: Count
    bandwidth: BytesPerSecond
    wiring: str | None = None


class _ScaleOut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network: `bandwidth` is one node's, in each direction.

    `attach` says whether devices reach their NICs over the host's PCIe or at the NICs' full rate.
    """

    link: str
    fabric: str
    bandwidth: BytesPerSecond
    attach: Literal["pcie", "accelerator"] = "pcie"
    network: str | None = None
    wiring: str | None = None
    oversubscription: str | None = None


class SystemProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of hardware_profiles/systems.

    `max_nodes` is where the machine ends; `published_nodes` is only the largest one written about.
    """

    kind: Literal["system"]
    name: str
    aliases: tuple[str, ...] = ()
    accelerator: str
    node: _Node
    scaleup: _ScaleUp
    scaleout: _ScaleOut | None = None
    host: Host | None = None
    max_nodes: Count | None = None
    published_nodes: Count | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        node, domain = self.node.gpus.value, self.scaleup.domain_gpus.value
        if domain % node:
            raise ValueError(f"scaleup.domain_gpus={domain} is not a multiple of node.gpus={node}")


def _check(path: Path, data: dict[str, Any]) -> list[str]:
    system: SystemProfile = load_profile(data, SystemProfile, str(path))
    problems = []
    try:
        load_accelerator(system.accelerator, beside=path.parent)
    except InputError as error:
        problems.append(f"{path}: accelerator: {error}")
    for key, part, leaves in (("scaleup", system.scaleup, False), ("scaleout", system.scaleout, True)):
        if part is None:
            continue
        try:
            if isinstance(load_fabric(part.fabric, beside=path.parent), FatTree) != leaves:
                problems.append(f"{path}: {key}.fabric: {part.fabric} joins {'devices' if leaves else 'nodes'}")
        except InputError as error:
            problems.append(f"{path}: {key}.fabric: {error}")
        try:
            load_link(link_beside(part.link, path.parent))
        except InputError as error:
            problems.append(f"{path}: {key}.link: {error}")
    node = system.node
    if system.scaleout and node.nics and node.nic_bandwidth:
        total = node.nics.si * node.nic_bandwidth.si
        if abs(total / system.scaleout.bandwidth.si - 1) > 0.01:
            problems.append(
                f"{path}: node.nics x node.nic_bandwidth is {total / 1e9:g} GB/s, but scaleout.bandwidth is "
                f"{system.scaleout.bandwidth.si / 1e9:g} GB/s"
            )
    return problems


register_kind("system", _check)
