"""Ways to a cluster: a system of the catalog or of one's own file, or devices and what is known of their nodes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.hardware.assembly import Cluster, assemble, require_count
from simllm.hardware.fabric import FatTree, Mesh, ScaleUpFabric, load_fabric
from simllm.hardware.figures import BytesPerSecond
from simllm.hardware.links import link_beside
from simllm.hardware.profiles import (
    figures_of,
    find_profile,
    list_profiles,
    load_profile_file,
    profile_file,
    slugify,
)
from simllm.hardware.system import SystemProfile

__all__ = ["Cluster", "load_cluster", "make_cluster"]


def load_cluster(name_or_path: str | Path, num_gpus: int) -> Cluster:
    """A system of the catalog, or of a YAML file of one's own, with so many GPUs.

    Parameters
    ----------
    name_or_path : str or Path
        ``"dgx-h100"``, ``"AWS p5.48xlarge"``, ``"my-cluster.yaml"``.
    num_gpus : int
        Devices in use: at most one node, or whole nodes.

    Raises
    ------
    InputError
        For an unknown name, an unusable file, GPUs that do not fill nodes or are more than there are.

    Examples
    --------
    >>> cluster = load_cluster("dgx-h100", 512)
    >>> cluster.num_nodes, cluster.domain_gpus, cluster.scaleup_bandwidth, cluster.scaleout_bandwidth_per_node
    (64, 8, 450000000000.0, 400000000000.0)
    >>> load_cluster("dgx-h100", 100)
    Traceback (most recent call last):
        ...
    simllm.errors.InputError: num_gpus=100 does not fill whole nodes of dgx-h100 (8 GPUs each); use 96 or 104
    """
    path = profile_file("systems", str(name_or_path), "cluster", _hint(str(name_or_path)))
    system = load_profile_file(path, SystemProfile)
    accelerator = load_accelerator(system.accelerator, beside=path.parent)
    scaleup = system.scaleup
    scaleout = system.scaleout
    return assemble(
        name=system.name,
        accelerator=accelerator,
        num_gpus=num_gpus,
        gpus_per_node=int(system.node.gpus.value),
        domain_gpus=int(scaleup.domain_gpus.value),
        scaleup_link=link_beside(scaleup.link, path.parent),
        scaleup_bandwidth=scaleup.bandwidth.si,
        scaleup_fabric=_scaleup_fabric(scaleup.fabric, path.parent),
        scaleout_link=link_beside(scaleout.link, path.parent) if scaleout else None,
        scaleout_bandwidth_per_node=scaleout.bandwidth.si if scaleout else None,
        scaleout_fabric=_scaleout_fabric(scaleout.fabric, path.parent) if scaleout else None,
        nics_per_node=int(system.node.nics.value) if system.node.nics else None,
        nic_attach=scaleout.attach if scaleout else "pcie",
        max_nodes=int(system.max_nodes.value) if system.max_nodes else None,
        host=system.host,
        figures=figures_of(system),
    )


def make_cluster(
    *,
    accelerator: str | Accelerator,
    num_gpus: int,
    gpus_per_node: int | None = None,
    domain_gpus: int | None = None,
    scaleout_bandwidth_per_node: float | None = None,
    scaleout_link: str | None = None,
) -> Cluster:
    """A cluster described only by its devices and what is known of its nodes, as published runs are.

    What is not stated is that of the accelerator's reference system with the same number of devices a node (or of
    the first one); the links inside the domain are the accelerator's own.

    Parameters
    ----------
    accelerator : str or Accelerator
        The device.
    num_gpus : int
        Devices in use.
    gpus_per_node, domain_gpus : int, optional
        Devices of one node and of one scale-up domain.
    scaleout_bandwidth_per_node : float, optional
        Bytes/s each way between one node and the network.
    scaleout_link : str, optional
        Link class between nodes.

    Examples
    --------
    >>> cluster = make_cluster(accelerator="a800-sxm-80gb", num_gpus=16)
    >>> cluster.gpus_per_node, cluster.scaleup_bandwidth, cluster.scaleout_link
    (8, 200000000000.0, 'infiniband')
    """
    card = load_accelerator(accelerator) if isinstance(accelerator, str) else accelerator
    systems = [
        load_profile_file(find_profile("systems", name, "system"), SystemProfile) for name in card.reference_systems
    ]
    reference = next((s for s in systems if s.node.gpus.value == gpus_per_node), systems[0] if systems else None)
    if gpus_per_node is None:
        if reference is None:
            raise InputError(f"{card.name} names no reference system to take gpus_per_node from; give gpus_per_node")
        gpus_per_node = int(reference.node.gpus.value)
    require_count("gpus_per_node", gpus_per_node)
    domain = _domain_like(card, reference, gpus_per_node, domain_gpus)
    network = reference.scaleout if reference else None
    nics: int | None = None
    figures = {key: figure for key, figure in card.figures.items() if key.startswith("scaleup.")}
    if reference is not None and network is not None:
        # A node with another number of devices is taken to have as many NICs for each as the reference.
        share = gpus_per_node / reference.node.gpus.value
        if reference.node.nics is not None and (reference.node.nics.value * share).is_integer():
            nics = int(reference.node.nics.value * share)
        if scaleout_bandwidth_per_node is None:
            scaleout_bandwidth_per_node = network.bandwidth.si * share
            figures["scaleout.bandwidth"] = network.bandwidth if share == 1 else _share_of(network.bandwidth, share)
        scaleout_link = scaleout_link or network.link
    if scaleout_bandwidth_per_node is None:
        if scaleout_link is not None:
            raise InputError(
                f"scaleout_link={scaleout_link} needs scaleout_bandwidth_per_node, which is not known here"
            )
    else:
        if not (math.isfinite(scaleout_bandwidth_per_node) and scaleout_bandwidth_per_node > 0):
            raise InputError(
                f"scaleout_bandwidth_per_node={scaleout_bandwidth_per_node} must be above zero, in bytes/s"
            )
        if scaleout_link is None:
            raise InputError(
                f"{card.name} names no reference system to take scaleout_link from; "
                f"give one of {', '.join(list_profiles('links'))}"
            )
        figures.setdefault(
            "scaleout.bandwidth",
            BytesPerSecond(
                value=scaleout_bandwidth_per_node, unit="B/s", source="stated for this cluster", basis="assumed"
            ),
        )
    has_network = scaleout_bandwidth_per_node is not None
    return assemble(
        name=f"{card.name} cluster",
        accelerator=card,
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        **domain,
        scaleout_link=scaleout_link if has_network else None,
        scaleout_bandwidth_per_node=scaleout_bandwidth_per_node,
        scaleout_fabric=_untapered(network.fabric if network else "fat-tree") if has_network else None,
        nics_per_node=nics,
        nic_attach=network.attach if network else "pcie",
        host=reference.host if reference is not None and reference.node.gpus.value == gpus_per_node else None,
        figures=figures,
    )


class _Domain(TypedDict):
    domain_gpus: int
    scaleup_link: str
    scaleup_bandwidth: float
    scaleup_fabric: ScaleUpFabric


def _domain_like(
    card: Accelerator, reference: SystemProfile | None, gpus_per_node: int, domain_gpus: int | None
) -> _Domain:
    """The scale-up domain of a node of `card`, wired as in the reference system."""
    if card.scaleup_fabric is None or card.scaleup_link is None or card.scaleup_bandwidth is None:
        raise InputError(f"{card.name} states no links between devices; describe the cluster in a YAML file instead")
    link, bandwidth = card.scaleup_link, card.scaleup_bandwidth
    if reference is None:
        fabric = _scaleup_fabric(card.scaleup_fabric)
        if isinstance(fabric, Mesh) and fabric.island and gpus_per_node > fabric.island.value:
            # A bridge joins few devices; a node of more is only as fast as the PCIe between the bridges.
            if card.pcie_link is None or card.pcie_bandwidth is None:
                raise InputError(f"{card.name} states no PCIe link to join {gpus_per_node} devices; give fewer a node")
            link, bandwidth, fabric = card.pcie_link, card.pcie_bandwidth, _scaleup_fabric("pcie-box")
    else:
        fabric = _scaleup_fabric(reference.scaleup.fabric)
        whole = int(reference.scaleup.domain_gpus.value)
        if reference.accelerator == card.name:
            bandwidth = reference.scaleup.bandwidth.si
        if domain_gpus is None:
            domain_gpus = gpus_per_node if whole == reference.node.gpus.value else max(whole, gpus_per_node)
        if isinstance(fabric, Mesh) and 1 < domain_gpus < whole:
            # On a smaller board each pair keeps its link, and the links to the missing devices are gone.
            bandwidth *= (domain_gpus - 1) / (whole - 1)
    domain_gpus = domain_gpus or gpus_per_node
    require_count("domain_gpus", domain_gpus)
    if domain_gpus % gpus_per_node:
        raise InputError(
            f"domain_gpus={domain_gpus} is not a multiple of gpus_per_node={gpus_per_node}; a domain is whole nodes"
        )
    return _Domain(domain_gpus=domain_gpus, scaleup_link=link, scaleup_bandwidth=bandwidth, scaleup_fabric=fabric)


def _scaleup_fabric(name: str, beside: Path | None = None) -> ScaleUpFabric:
    fabric = load_fabric(name, beside=beside)
    if isinstance(fabric, FatTree):
        raise InputError(f"fabric {name} joins nodes, not the devices of a domain; use for example nvswitch-gen3")
    return fabric


def _scaleout_fabric(name: str, beside: Path | None = None) -> FatTree:
    fabric = load_fabric(name, beside=beside)
    if not isinstance(fabric, FatTree):
        raise InputError(f"fabric {name} joins the devices of a domain, not nodes; use for example fat-tree")
    return fabric


def _untapered(name: str) -> FatTree:
    """The reference's network, unless it is tapered: a taper belongs to a site, and this is another one."""
    fabric = _scaleout_fabric(name)
    tiers = [tier for tier in (fabric.leaf, fabric.pod) if tier is not None]
    return fabric if all(tier.oversubscription.si == 1 for tier in tiers) else _scaleout_fabric("fat-tree")


def _share_of(figure: BytesPerSecond, share: float) -> BytesPerSecond:
    note = f"{share:g} of the reference system's node, which has {1 / share:g} times the devices"
    return BytesPerSecond(
        value=figure.value * share, unit=figure.unit, source=figure.source, basis="derived", note=note
    )


def _hint(name: str) -> str:
    if slugify(name) in list_profiles("accelerators"):
        holding = load_accelerator(name).reference_systems
        return f"({name} is an accelerator; a cluster holding it: {', '.join(holding) or 'none in the catalog'})"
    return "(`simllm hardware list` shows all; a YAML file of your own works too)"
