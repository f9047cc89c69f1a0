"""The cluster and the ranks of a published collective, from what its row says about the machine.

In this order: columns that describe the machine, a system of the catalog that the row's ``system`` names, what else is
written there (``2 nodes, 8xNDR400``), and the reference system of the accelerator. What had to be taken from the last
is an assumption of the row.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from simllm.errors import InputError
from simllm.hardware import Cluster, load_cluster, make_cluster
from simllm.hardware.accelerator import load_accelerator
from simllm.hardware.fabric import Mesh, load_fabric
from simllm.hardware.links import link_of_library
from simllm.network import Group
from simllm.validation.system_names import (
    UNSTATED,
    Machine,
    device_name,
    devices_a_node,
    exact_device,
    known_system,
    network,
    published_systems,
    system_in,
)
from simllm.validation.table import Row

__all__ = ["Placed", "place", "row_cluster"]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a collective ran.

    Attributes
    ----------
    cluster : Cluster
    group : Group
    assumptions : tuple of str
        What the row does not state.
    fitted : bool
        Whether so much of the machine is known that its times tell about links.
    algorithm : str or None
        What its all-reduces are known to have run.
    """

    cluster: Cluster
    group: Group
    assumptions: tuple[str, ...]
    fitted: bool = True
    algorithm: str | None = None


def row_cluster(row: Row, cluster: str | None = None) -> Placed:
    """The machine and the ranks of a row; what it does not state is added to its assumptions.

    Parameters
    ----------
    row : Row
        With the cells ``system``, ``gpu``, ``n_nodes``, ``n_gpus``, and where they are stated ``gpus_per_node``,
        ``domain_gpus``, ``scaleout_link``, ``scaleout_GBps_per_node``, ``library``.
    cluster : str, optional
        A system of the catalog or a file of one's own that it ran on, whatever the row says.

    Raises
    ------
    InputError
        The row names no device of the catalog, or more devices than there are.
    """
    bandwidth = row.number("scaleout_GBps_per_node")
    placed = place(
        system=row.text("system"),
        gpu=row.text("gpu"),
        nodes=row.integer("n_nodes"),
        ranks=row.integer("n_gpus"),
        stated=Machine(
            gpus_per_node=row.integer("gpus_per_node"),
            domain_gpus=row.integer("domain_gpus"),
            scaleout_link=row.text("scaleout_link") or None,
            scaleout_bandwidth=bandwidth * 1e9 if bandwidth else None,
        ),
        cluster=cluster,
        ranks_per_process=_ranks_per_process(row),
        library=row.text("library"),
    )
    for sentence in placed.assumptions:
        row.assume(sentence)
    return placed


def _ranks_per_process(row: Row) -> int | None:
    """Ranks that one process drives, from a column or the notes; None where nothing is stated."""
    stated = row.integer("ranks_per_process")
    if stated is None and "single process" in row.text("notes"):
        return max((row.integer("n_gpus") or 1) // (row.integer("n_nodes") or 1), 1)
    return stated


@lru_cache(maxsize=4096)
def place(
    *,
    system: str,
    gpu: str,
    nodes: int | None,
    ranks: int | None,
    stated: Machine = UNSTATED,
    cluster: str | None = None,
    ranks_per_process: int | None = None,
    library: str = "",
) -> Placed:
    """The machine that the words of a table mean, and the ranks on it.

    Examples
    --------
    >>> found = place(system="2x DGX H100 (8xNDR400)", gpu="H100-SXM5-80GB", nodes=2, ranks=16)
    >>> found.cluster.name, found.group, found.assumptions
    ('dgx-h100', Group(size=16, stride=1), ())
    >>> found = place(system="our box", gpu="A100", nodes=4, ranks=4)
    >>> found.cluster.num_gpus, found.group.stride, found.assumptions[0]
    (32, 8, 'gpus_per_node is not stated: 8, as in dgx-a100')
    """
    assumed: list[str] = []
    if nodes is None and ranks is None:
        raise InputError("n_gpus is not stated")
    if cluster is not None:
        machine = Machine(system=cluster, gpus_per_node=known_system(cluster).gpus_per_node)
    else:
        machine = _machine(system, gpu, stated, assumed)
    per_node = machine.gpus_per_node or _usual_node(machine, nodes, ranks, assumed)
    if nodes is None:
        nodes = math.ceil((ranks or per_node) / per_node)
        assumed.append(f"n_nodes is not stated: {nodes}, as the GPUs fill nodes of {per_node}")
    if ranks is None:
        ranks = nodes * per_node
        assumed.append(f"n_gpus is not stated: {ranks}, all of the nodes")
    if ranks > nodes * per_node:
        raise InputError(f"n_gpus={ranks} is more than {nodes} node{'s' * (nodes > 1)} of {per_node} GPUs hold")
    if ranks < nodes:
        raise InputError(f"n_gpus={ranks} is less than one for each of n_nodes={nodes}")
    found = _build(machine, nodes * per_node, per_node)
    if nodes == 1 and cluster is None:
        found = _on_island(found, system, ranks)
    out_of_domain = found.num_domains > 1
    if out_of_domain and machine.system is None and machine.scaleout_bandwidth is None:
        bandwidth = found.scaleout_bandwidth_per_node
        if bandwidth is None or found.scaleout_link is None:
            raise InputError(f"the network between the nodes is not stated, and {found.name} has no reference system")
        assumed.append(
            f"the network is not stated: {found.scaleout_link} with {bandwidth / 1e9:g} GB/s a node, "
            "as in the device's reference system"
        )
    used, stride = ranks // nodes, 1
    if nodes > 1 and (ranks % nodes or per_node % used):
        assumed.append(f"{ranks} ranks do not spread evenly over {nodes} nodes of {per_node}: they fill nodes in order")
    elif nodes > 1:
        stride = per_node // used
    one_process, fitted, algorithm = False, True, None
    if cluster is None and (known := published_systems().get(system)) is not None:
        one_process, algorithm = known.one_process, known.algorithm
        fitted = known.device_stated and (known.network_stated or nodes == 1)
        fitted = fitted and (known.fit_up_to is None or ranks <= known.fit_up_to.value)
        if known.nics is not None:
            found = replace(found, nics_per_node=int(known.nics.value))
        if known.library is not None and not library:
            library = known.library
            assumed.append(f"library={library}, inferred from the times of middle-sized messages")
        if not known.network_stated and nodes > 1:
            assumed.append(f"the network of {system} is not stated: that of {found.name}")
        if known.peer_access and known.staged_link and ranks > known.peer_access.value:
            found = replace(found, scaleup_link=known.staged_link)
            assumed.append(f"groups of more than {known.peer_access.value} GPUs are staged in host memory")
    if one_process and ranks_per_process is None:
        assumed.append("one process drives all devices of a node")
    driven = ranks_per_process or (max(used, 1) if one_process else 1)
    # What is measured runs alone: the GPUs that it leaves out are idle.
    alone = 1 if nodes > 1 and ranks == nodes * used and stride > 1 else None
    group = Group(size=ranks, stride=stride, concurrent=alone, ranks_per_process=driven)
    if cluster is None and library:
        found = _of_library(found, library)
    return Placed(cluster=found, group=group, assumptions=tuple(assumed), fitted=fitted, algorithm=algorithm)


def _of_library(cluster: Cluster, library: str) -> Cluster:
    """The same wires under the version of the library that drove them."""
    out = cluster.scaleout_link
    return replace(
        cluster,
        scaleup_link=link_of_library(cluster.scaleup_link, library),
        scaleout_link=out and link_of_library(out, library),
    )


def _machine(system: str, gpu: str, stated: Machine, assumed: list[str]) -> Machine:
    """What columns, the catalog and the words of ``system`` say."""
    device = device_name(gpu) if gpu else None
    if gpu and device is None:
        raise InputError(f"gpu={gpu!r} is no device of the catalog (`simllm hardware list`), or one of several")
    if device and not (exact_device(gpu) and not re.search("class|unspecified", gpu, re.IGNORECASE)):
        assumed.append(f"gpu={gpu!r} is taken as {device}")
    found = system_in(system, device)
    count, named = devices_a_node(system)
    if device is None and found is None:
        device = named
        if device is None:
            raise InputError("gpu is not stated, and system names neither a device nor a system of the catalog")
    text = network(system)
    if found is not None:
        if re.search(r"\b(?:like|class)\b", system, re.IGNORECASE):
            assumed.append(f"system={system!r} is taken as {found.system}")
        differs = text.scaleout_bandwidth and not math.isclose(
            text.scaleout_bandwidth, found.scaleout_bandwidth or 0.0, rel_tol=0.01
        )
        base = replace(found, system=None if differs else found.system)
        if differs:
            base = replace(
                base,
                scaleout_link=text.scaleout_link or found.scaleout_link,
                scaleout_bandwidth=text.scaleout_bandwidth,
            )
    else:
        base = replace(text, accelerator=device, gpus_per_node=count if named == device else None)
    own = {name: value for name in stated.__dataclass_fields__ if (value := getattr(stated, name)) is not None}
    known = published_systems().get(system)
    figure = known.scaleout_bandwidth if known else None
    if known and figure and "scaleout_bandwidth" not in own:
        own |= {"scaleout_link": known.scaleout_link, "scaleout_bandwidth": figure.si}
        assumed.append(f"network: {known.scaleout_link} with {figure.si / 1e9:g} GB/s a node ({figure.source})")
    return replace(base, **own, system=None) if own else base


def _on_island(cluster: Cluster, system: str, ranks: int) -> Cluster:
    """The bridged devices of a node, where a published system has them and they hold all ranks."""
    known = published_systems().get(system)
    island = known.island if known else None
    if island is None or ranks > island.gpus.value:
        return cluster
    gpus, fabric = int(island.gpus.value), load_fabric(island.fabric)
    if not isinstance(fabric, Mesh):
        raise InputError(f"hardware_profiles/published_systems.yaml: {system}: {island.fabric} is no mesh")
    return replace(
        cluster,
        num_gpus=gpus,
        gpus_per_node=gpus,
        domain_gpus=gpus,
        max_gpus=gpus,
        scaleup_topology="mesh",
        scaleup_link=island.scaleup_link,
        scaleup_bandwidth=island.scaleup_bandwidth.si,
        scaleup_fabric=fabric,
    )


def _usual_node(machine: Machine, nodes: int | None, ranks: int | None, assumed: list[str]) -> int:
    """Devices of a node where nothing states them: those of the reference system, or as many as were used."""
    references = load_accelerator(machine.accelerator).reference_systems if machine.accelerator else ()
    used = math.ceil((ranks or 1) / (nodes or 1))
    if references:
        usual = known_system(references[0]).gpus_per_node or used
        if usual >= used or nodes is None:
            if (nodes or 2) > 1:
                assumed.append(f"gpus_per_node is not stated: {usual}, as in {references[0]}")
            return usual
    if (nodes or 2) > 1 or not references:
        assumed.append(f"gpus_per_node is not stated: {used}, all of them in use")
    return used


@lru_cache(maxsize=1024)
def _build(machine: Machine, num_gpus: int, per_node: int) -> Cluster:
    if machine.system is not None:
        return load_cluster(machine.system, num_gpus)
    assert machine.accelerator is not None
    return make_cluster(
        accelerator=machine.accelerator,
        num_gpus=num_gpus,
        gpus_per_node=per_node,
        domain_gpus=machine.domain_gpus,
        scaleout_bandwidth_per_node=machine.scaleout_bandwidth,
        scaleout_link=machine.scaleout_link,
    )
