"""What one group sees of a cluster: the bandwidth its shape can use at every level, and the cuts its traffic crosses.

The general rule is that of a cut: a collective takes at least the bytes that must cross a set of links divided by what
those links carry together, and the worst cut decides. The cuts of a cluster are the boundary of the scale-up domain and
every subtree of the scale-out network whose uplinks are tapered. All GPUs of a node are taken to be busy with sister
groups of the same shape, so a member owns an equal share of its node's NICs and of a subtree's uplinks, unless the
group says how many run at once: their members share what there is, and each has at most its own NICs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simllm.errors import InputError
from simllm.hardware.fabric import CubeMesh, Mesh, Torus
from simllm.hardware.links import Curve, Link, load_link
from simllm.network.cube import slots_per_link
from simllm.network.group import Group, Spread, spread
from simllm.network.torus import Grid, grid

if TYPE_CHECKING:
    from simllm.hardware.cluster import Cluster

__all__ = ["Cut", "Fabric", "fabric", "scaleup_share"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The boundary of the scale-up domains, or of the subtrees below a tapered tier, that a group spans.

    Parameters
    ----------
    name : str
        Link that crosses the boundary, as a person would name it.
    blocks : int
        Domains or subtrees with members of the group.
    least : int
        Members in the emptiest of them.
    members : float
        Those of them whose share of the boundary carries the traffic of a ring or tree.
    bandwidth : float
        One member's share of the boundary, bytes/s each way.
    """

    name: str
    blocks: int
    least: int
    members: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fabric:
    """A group's view of a cluster.

    Parameters
    ----------
    size : int
        Ranks in the group.
    domain : Spread
        How they fall on scale-up domains.
    up, out : Link
        Link class inside a domain and between domains (None where the group stays inside one).
    up_bandwidth : float
        What one GPU can send to the other members of its domain at once, bytes/s.
    shuffle_bandwidth : float
        The same when every member sends different bytes to every other; less than `up_bandwidth` on a torus or cube.
    pair_bandwidth : float
        What one GPU can send to its neighbour in the group, bytes/s.
    cuts : tuple of Cut
        Boundaries the group crosses, the domain's own first; empty inside one domain.
    grid : Grid or None
        Axes of a torus that the members of one domain span; None on other topologies.
    paired : bool
        Whether the members of a domain are two GPUs below one PCIe switch.
    ranks_per_process : int
        Ranks that one process drives.
    """

    size: int
    domain: Spread
    up: Link
    out: Link | None
    up_bandwidth: float
    shuffle_bandwidth: float
    pair_bandwidth: float
    cuts: tuple[Cut, ...]
    grid: Grid | None
    paired: bool = False
    ranks_per_process: int = field(default=1, compare=False)

    @property
    def up_ring(self) -> Curve:
        """Figures of rings inside the domain: two GPUs below one PCIe switch have their own."""
        return self.up.pair if self.paired and self.up.pair is not None else self.up.ring


def scaleup_share(cluster: Cluster, members: int, stride: int = 1) -> float:
    """The part of a GPU's scale-up bandwidth that leads to the other members of a group in its domain.

    Behind a switch every link reaches every GPU. In a full mesh each of the peers has its own links, and only those to
    members count (MI300X: 7 links of 64 GB/s, one for each peer). In a cube mesh the least connected member decides.

    Examples
    --------
    >>> from simllm.hardware.cluster import load_cluster
    >>> scaleup_share(load_cluster("dgx-h100", 8), 2), scaleup_share(load_cluster("mi300x-platform", 8), 2)
    (1.0, 0.14285714285714285)
    """
    wiring = cluster.scaleup_fabric
    if members < 2:
        return 1.0
    if isinstance(wiring, Mesh):
        meshed = min(cluster.domain_gpus, int(wiring.island.value) if wiring.island else cluster.domain_gpus)
        near = min(members, max(1, meshed // stride))
        return max(1, near - 1) / (meshed - 1)
    if isinstance(wiring, CubeMesh):
        ranks = {i * stride for i in range(members)}
        wires = [(a, b, links) for a, b, links in wiring.wires if a in ranks and b in ranks]
        fewest = min(sum(links for a, b, links in wires if rank in (a, b)) for rank in ranks)
        # Members without a wire between them are routed through a GPU that forwards, over one link.
        return max(fewest, 1) / wiring.links_per_device
    return 1.0


def fabric(cluster: Cluster, group: Group) -> Fabric:
    """The links and shares that ``group`` has on ``cluster``.

    Raises
    ------
    InputError
        When the group does not fit the cluster, or leaves its domain on a cluster without a scale-out network.
    """
    group.check_fits(cluster)
    if cluster.scaleup_bandwidth <= 0 or cluster.scaleout_bandwidth_per_node == 0:
        raise InputError(f"a link of cluster {cluster.name} has no bandwidth; every link needs more than 0 bytes/s")
    domain = spread(group.size, group.stride, cluster.gpus_per_domain)
    up = load_link(cluster.scaleup_link)
    out, cuts = _outside(cluster, group, domain, up)
    axes = None
    if isinstance(cluster.scaleup_fabric, Torus):
        axes = grid(cluster.scaleup_fabric, cluster.torus_shape, domain.most, group.stride, cluster.scaleup_bandwidth)
    share = scaleup_share(cluster, domain.most, group.stride)
    wire = cluster.scaleup_bandwidth * share
    paired = domain.most == 2 and group.stride == 1 and up.pair is not None
    bandwidth = wire if up.host_limit is None else min(wire, up.host_limit.si)
    if up.shared:
        bandwidth /= domain.most
    between = _between_islands(cluster, (domain.most - 1) * group.stride)
    if between is not None:
        # A ring crosses from island to island once each way, so all of its channels share what joins them.
        bandwidth = wire = min(bandwidth, between)
    return Fabric(
        size=group.size,
        domain=domain,
        up=up,
        out=out,
        up_bandwidth=axes.ring_bandwidth if axes else wire if paired else bandwidth,
        shuffle_bandwidth=axes.shuffle_bandwidth if axes else _shuffled(cluster, domain.most, group.stride, bandwidth),
        pair_bandwidth=axes.pair_bandwidth if axes else min(bandwidth, _pair_bandwidth(cluster)),
        cuts=cuts,
        grid=axes,
        paired=paired,
        ranks_per_process=group.ranks_per_process,
    )


def _shuffled(cluster: Cluster, members: int, stride: int, bandwidth: float) -> float:
    """What a GPU sends in an all-to-all: on a cube mesh the links also carry what members hand on for others."""
    wiring = cluster.scaleup_fabric
    if not isinstance(wiring, CubeMesh) or members < 2:
        return bandwidth
    ranks = tuple(i * stride for i in range(members))
    slots = slots_per_link(wiring.wires, cluster.gpus_per_domain, ranks)
    return min(bandwidth, cluster.scaleup_bandwidth / wiring.links_per_device * (members - 1) / slots)


def _between_islands(cluster: Cluster, reach: int) -> float | None:
    """What joins the islands of a domain, if a group that reaches so many ranks leaves one."""
    wiring = cluster.scaleup_fabric
    if not isinstance(wiring, Mesh) or wiring.island is None or wiring.between_islands is None:
        return None
    return wiring.between_islands.si if reach >= wiring.island.value else None


def _pair_bandwidth(cluster: Cluster) -> float:
    return cluster.scaleup_bandwidth * scaleup_share(cluster, 2)


def _outside(cluster: Cluster, group: Group, domain: Spread, up: Link) -> tuple[Link | None, tuple[Cut, ...]]:
    if domain.blocks == 1:
        return None, ()
    nic = cluster.scaleout_bandwidth_per_gpu
    if cluster.scaleout_link is None or nic is None:
        raise InputError(
            f"a group of {group.size} ranks with stride {group.stride} leaves the {cluster.gpus_per_domain}-GPU domain "
            f"of cluster {cluster.name}, which has no scale-out network; use a group inside one domain"
        )
    out = load_link(cluster.scaleout_link)
    # The share of a member grows as fewer GPUs of its domain talk, up to the NICs that are its own.
    spare = cluster.gpus_per_domain / _busy(cluster, group, domain)
    uplink, nic = nic * spare, min(nic * spare, _own_nics(cluster, nic))
    active = 1.0 if up.rails is None else min(1.0, up.rails.si / domain.least)
    cuts = [Cut(name=out.name, blocks=domain.blocks, least=domain.least, members=active * domain.least, bandwidth=nic)]
    for gpus_below, ratio in cluster.taper:
        pods = spread(group.size, group.stride, gpus_below)
        if pods.blocks > 1:
            cuts.append(
                Cut(
                    name=f"{out.name} uplinks of {gpus_below} GPUs",
                    blocks=pods.blocks,
                    least=pods.least,
                    members=active * pods.least,
                    bandwidth=uplink / ratio,
                )
            )
    return out, tuple(cuts)


def _busy(cluster: Cluster, group: Group, domain: Spread) -> int:
    """GPUs of a domain that talk at once: all of them, or the members of as many groups as are said to run."""
    if group.concurrent is None:
        return cluster.gpus_per_domain
    busy = group.concurrent * domain.most
    if busy > cluster.gpus_per_domain:
        raise InputError(
            f"{group.concurrent} concurrent groups with {domain.most} members in each domain need {busy} GPUs, but a "
            f"domain of {cluster.name} has {cluster.gpus_per_domain}; give at most "
            f"{cluster.gpus_per_domain // domain.most}"
        )
    return busy


def _own_nics(cluster: Cluster, share: float) -> float:
    """The most that one GPU sends out of its node: the NICs at its side, bytes/s."""
    total = cluster.scaleout_bandwidth_per_node
    if cluster.nics_per_node is None or total is None:
        return share
    return max(share, total / cluster.nics_per_node)
