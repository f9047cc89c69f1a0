"""The cluster itself: so many devices of one kind, in nodes, in scale-up domains, on a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator
from simllm.hardware.fabric import CubeMesh, FatTree, ScaleUpFabric, Torus
from simllm.hardware.figures import Figure
from simllm.hardware.host import Host

__all__ = ["Cluster", "assemble", "require_count"]

# Beyond any machine that exists or is planned: a typing error, not a question.
_MOST_GPUS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many GPUs (or TPUs, NPUs) of one system, in SI units; bandwidths are per direction.

    Attributes
    ----------
    name : str
        Name of the system.
    accelerator : Accelerator
        The device.
    num_gpus, num_nodes : int
        Devices and nodes in use.
    gpus_per_node : int
        Devices a node physically has; a job smaller than a node uses `num_gpus` of them.
    domain_gpus : int
        Devices one scale-up domain physically has: the node of a DGX, 72 of an NVL72, a pod of TPUs.
    scaleup_topology : str
        ``nvswitch``, ``mesh``, ``cube-mesh``, ``pcie`` or ``torus``; its wiring is `scaleup_fabric`.
    scaleup_link : str
        Link class inside the domain.
    scaleup_bandwidth : float
        Bytes/s of one device into the domain.
    scaleout_link : str or None
        Link class between domains; None when there is no network.
    scaleout_bandwidth_per_node : float or None
        Bytes/s of one node into the network.
    nics_per_node : int
        Network ports of a node; 0 without a network, 1 where only the bandwidth is known.
    taper : tuple of (int, float)
        Oversubscribed levels of the network from below: with ``(gpus, ratio)``, that many devices share an uplink of
        ``1/ratio`` of their network bandwidth.
    max_gpus : int or None
        Most devices the system has; None if it can be built larger.
    scaleup_fabric, scaleout_fabric
        The wiring, for `simllm.hardware.topology.build_topology`.
    nic_attach : str
        ``pcie`` when devices reach their NICs over the host's PCIe, ``accelerator`` when nothing slower lies between.
    host : Host or None
        Memory, links and drives of a node's host, where they are known.
    figures : mapping of str to Figure
        Every number of the system as printed, with unit, source and basis, by key path.
    """

    name: str
    accelerator: Accelerator
    num_gpus: int
    gpus_per_node: int
    num_nodes: int
    domain_gpus: int
    scaleup_topology: str
    scaleup_link: str
    scaleup_bandwidth: float
    scaleout_link: str | None = None
    scaleout_bandwidth_per_node: float | None = None
    nics_per_node: int = 0
    taper: tuple[tuple[int, float], ...] = ()
    max_gpus: int | None = None
    scaleup_fabric: ScaleUpFabric
    scaleout_fabric: FatTree | None = None
    nic_attach: str = "pcie"
    host: Host | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, name_or_path: str | Path, num_gpus: int) -> Cluster:
        """A system of the catalog, or of a YAML file of one's own: `simllm.hardware.load_cluster`."""
        from simllm.hardware.cluster import load_cluster

        return load_cluster(name_or_path, num_gpus)

    def resized(self, num_gpus: int) -> Cluster:
        """The same system with another number of devices in use.

        >>> Cluster.load("dgx-h100", 64).resized(16).num_nodes
        2
        """
        require_count("num_gpus", num_gpus)
        cluster = replace(self, num_gpus=num_gpus, num_nodes=math.ceil(num_gpus / self.gpus_per_node))
        _check_size(cluster)
        return cluster

    @property
    def num_domains(self) -> int:
        """The fewest scale-up domains that hold all devices."""
        return math.ceil(self.num_gpus / self.domain_gpus)

    @property
    def gpus_per_domain(self) -> int:
        """Devices used in each domain when the nodes are spread evenly over the fewest domains.

        256 GPUs on NVL72 are 64 in each of four domains, as people run them, not 72 + 72 + 72 + 40.
        """
        if self.num_gpus <= self.gpus_per_node:
            return self.num_gpus
        return math.ceil(self.num_nodes / self.num_domains) * self.gpus_per_node

    @property
    def scaleout_bandwidth_per_gpu(self) -> float | None:
        """One device's share of its node's network bandwidth, in bytes/s."""
        if self.scaleout_bandwidth_per_node is None:
            return None
        return self.scaleout_bandwidth_per_node / self.gpus_per_node

    @property
    def torus_shape(self) -> tuple[int, ...]:
        """Axes of one slice of a torus, in rising order; empty for any other topology."""
        if not isinstance(self.scaleup_fabric, Torus):
            return ()
        return self.scaleup_fabric.slice_shape(self.gpus_per_domain)


def assemble(
    *,
    name: str,
    accelerator: Accelerator,
    num_gpus: int,
    gpus_per_node: int,
    domain_gpus: int,
    scaleup_link: str,
    scaleup_bandwidth: float,
    scaleup_fabric: ScaleUpFabric,
    scaleout_link: str | None,
    scaleout_bandwidth_per_node: float | None,
    scaleout_fabric: FatTree | None,
    nics_per_node: int | None,
    nic_attach: str,
    figures: Mapping[str, Figure],
    host: Host | None = None,
    max_nodes: int | None = None,
) -> Cluster:
    """A cluster from its facts, after every check that needs more than one of them.

    Raises
    ------
    InputError
        If the devices do not fill nodes, are more than there are, or cannot be wired as stated.
    """
    require_count("num_gpus", num_gpus)
    max_gpus = max_nodes * gpus_per_node if max_nodes else None
    if scaleout_link is None:
        max_gpus = min(domain_gpus, max_gpus or domain_gpus)
    if isinstance(scaleup_fabric, CubeMesh) and domain_gpus > scaleup_fabric.corners:
        raise InputError(f"{name}: a cube mesh joins {scaleup_fabric.corners} GPUs, not {domain_gpus}")
    tiers = [scaleout_fabric.leaf, scaleout_fabric.pod] if scaleout_fabric else []
    cluster = Cluster(
        name=name,
        accelerator=accelerator,
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        num_nodes=math.ceil(num_gpus / gpus_per_node),
        domain_gpus=domain_gpus,
        scaleup_topology=str(scaleup_fabric.__struct_config__.tag),
        scaleup_link=scaleup_link,
        scaleup_bandwidth=scaleup_bandwidth,
        scaleout_link=scaleout_link,
        scaleout_bandwidth_per_node=scaleout_bandwidth_per_node,
        nics_per_node=(nics_per_node or 1) if scaleout_link else 0,
        taper=tuple(
            (int(tier.nodes.value) * gpus_per_node, tier.oversubscription.si)
            for tier in tiers
            if tier and tier.oversubscription.si > 1
        ),
        max_gpus=max_gpus,
        scaleup_fabric=scaleup_fabric,
        scaleout_fabric=scaleout_fabric,
        nic_attach=nic_attach,
        host=host,
        figures=figures,
    )
    _check_size(cluster)
    return cluster


def _check_size(cluster: Cluster) -> None:
    """Refuse more devices than there are, nodes in use only in part, and slices that a torus does not have."""
    num_gpus, gpus_per_node, max_gpus = cluster.num_gpus, cluster.gpus_per_node, cluster.max_gpus
    if max_gpus is not None and num_gpus > max_gpus:
        why = "is all there is" if cluster.scaleout_link else "have no known network to others"
        raise InputError(
            f"num_gpus={num_gpus} is too many: the {max_gpus} GPUs of {cluster.name} {why}; use at most {max_gpus}"
        )
    if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
        below = num_gpus - num_gpus % gpus_per_node
        above = below + gpus_per_node
        near = f"{below} or {above}" if max_gpus is None or above <= max_gpus else str(below)
        raise InputError(
            f"num_gpus={num_gpus} does not fill whole nodes of {cluster.name} ({gpus_per_node} GPUs each); use {near}"
        )
    if isinstance(cluster.scaleup_fabric, Torus):
        if cluster.gpus_per_domain * cluster.num_domains != num_gpus:
            raise InputError(
                f"num_gpus={num_gpus} does not divide into {cluster.num_domains} equal slices of {cluster.name}; "
                f"use a multiple of {cluster.num_domains * gpus_per_node}"
            )
        _ = cluster.torus_shape  # refuses a number of chips that no slice has


def require_count(what: str, given: int) -> None:
    """Refuse what cannot be a number of devices."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise InputError(f"{what}={given!r} is not a whole number")
    if not 0 < given <= _MOST_GPUS:
        raise InputError(f"{what}={given} must be between 1 and {_MOST_GPUS}")
