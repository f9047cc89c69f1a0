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

import msgspec

from simllm.errors import InputError
from simllm.hardware import Cluster, load_cluster, make_cluster
from simllm.hardware.accelerator import load_accelerator
from simllm.hardware.figures import BytesPerSecond
from simllm.hardware.profiles import (
    find_profile,
    list_profiles,
    load_profile_file,
    profile_file,
    profiles_dir,
    slugify,
)
from simllm.hardware.system import SystemProfile
from simllm.network import Group
from simllm.units import to_si
from simllm.validation.table import Row

__all__ = ["Placed", "place", "row_cluster"]

#: Transports by the words that people write; the first that occurs counts.
_TRANSPORTS = (
    ("tcpxo", "gpudirect-tcpxo"),
    ("tcpx", "gpudirect-tcpx"),
    ("roce", "roce"),
    ("efa", "efa"),
    ("efav\\d", "efa"),
    ("ib|infiniband|[efhnx]dr\\d*", "infiniband"),
    ("ethernet|tcp|sockets|gbe", "ethernet"),
)
#: Gbit/s of one port of an InfiniBand generation.
_GENERATIONS = {"fdr": 56, "edr": 100, "hdr": 200, "ndr": 400, "xdr": 800}

_PORTS = re.compile(
    r"(?P<ports>\d+)\s*x\s*(?:[a-z][\w-]*\s+){0,2}"
    r"(?:(?P<generation>[efhnx]dr)\s*(?P<rate>\d{2,3})?\b|(?P<gbps>\d{2,4})\s*g(?:b(?:ps|e|it/s)?)?\b)"
    r"(?P<each>[^,;)]*\bper gpu)?"
)
_DEVICES = re.compile(r"(?P<count>\d+)\s*x\s*(?P<name>[A-Za-z][\w-]*(?:\s+\d[\w-]*)?)")
#: Words around the name of a device that do not tell devices apart.
_NOISE = re.compile(r"^(?:nvidia|amd|intel|tesla|geforce)\s+|[\s-]class\b|\bunspecified\b", re.IGNORECASE)


class _Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published name of a system leaves out."""

    scaleout_link: str
    scaleout_bandwidth: BytesPerSecond


class _PublishedSystems(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    systems: dict[str, _Described]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a collective ran.

    Attributes
    ----------
    cluster : Cluster
    group : Group
    assumptions : tuple of str
        What the row does not state.
    """

    cluster: Cluster
    group: Group
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """What is known of a machine; None where nothing is."""

    accelerator: str | None = None
    system: str | None = None
    gpus_per_node: int | None = None
    domain_gpus: int | None = None
    scaleout_link: str | None = None
    scaleout_bandwidth: float | None = None


def row_cluster(row: Row, cluster: str | None = None) -> tuple[Cluster, Group]:
    """The machine and the ranks of a row; what it does not state is added to its assumptions.

    Parameters
    ----------
    row : Row
        With the cells ``system``, ``gpu``, ``n_nodes``, ``n_gpus``, and where they are stated ``gpus_per_node``,
        ``domain_gpus``, ``scaleout_link``, ``scaleout_GBps_per_node``.
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
        stated=_Machine(
            gpus_per_node=row.integer("gpus_per_node"),
            domain_gpus=row.integer("domain_gpus"),
            scaleout_link=row.text("scaleout_link") or None,
            scaleout_bandwidth=bandwidth * 1e9 if bandwidth else None,
        ),
        cluster=cluster,
    )
    for sentence in placed.assumptions:
        row.assume(sentence)
    return placed.cluster, placed.group


@lru_cache(maxsize=4096)
def place(
    *,
    system: str,
    gpu: str,
    nodes: int | None,
    ranks: int | None,
    stated: _Machine = _Machine(),
    cluster: str | None = None,
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
        machine = _Machine(system=cluster, gpus_per_node=_load_system(cluster).gpus_per_node)
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
    out_of_domain = found.num_domains > 1
    if out_of_domain and machine.system is None and machine.scaleout_bandwidth is None:
        network = found.scaleout_bandwidth_per_node
        if network is None or found.scaleout_link is None:
            raise InputError(f"the network between the nodes is not stated, and {found.name} has no reference system")
        assumed.append(
            f"the network is not stated: {found.scaleout_link} with {network / 1e9:g} GB/s a node, as in the device's "
            "reference system"
        )
    used, stride = ranks // nodes, 1
    if nodes > 1 and (ranks % nodes or per_node % used):
        assumed.append(f"{ranks} ranks do not spread evenly over {nodes} nodes of {per_node}: they fill nodes in order")
    elif nodes > 1:
        stride = per_node // used
    return Placed(cluster=found, group=Group(size=ranks, stride=stride), assumptions=tuple(assumed))


def _machine(system: str, gpu: str, stated: _Machine, assumed: list[str]) -> _Machine:
    """What columns, the catalog and the words of ``system`` say."""
    device = _device(gpu) if gpu else None
    if gpu and device is None:
        raise InputError(f"gpu={gpu!r} is no device of the catalog (`simllm hardware list`), or one of several")
    if device and (_accelerator(slugify(gpu)) is None or re.search("class|unspecified", gpu, re.IGNORECASE)):
        assumed.append(f"gpu={gpu!r} is taken as {device}")
    found = _catalog_system(system, device)
    count, named = _devices_a_node(system)
    if device is None and found is None:
        device = named
        if device is None:
            raise InputError("gpu is not stated, and system names neither a device nor a system of the catalog")
    text = _network(system)
    if found is not None:
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
    if known is not None and "scaleout_bandwidth" not in own and base.scaleout_bandwidth is None:
        figure = known.scaleout_bandwidth
        own |= {"scaleout_link": known.scaleout_link, "scaleout_bandwidth": figure.si}
        assumed.append(f"network: {known.scaleout_link} with {figure.si / 1e9:g} GB/s a node ({figure.source})")
    return replace(base, **own, system=None) if own else base


@lru_cache(maxsize=1)
def published_systems() -> dict[str, _Described]:
    """What published names of systems leave out, from hardware_profiles/published_systems.yaml."""
    path = profiles_dir() / "published_systems.yaml"
    return load_profile_file(path, _PublishedSystems).systems


def _device(text: str) -> str | None:
    """The accelerator of the catalog that a name means, also as drivers write it.

    >>> _device("NVIDIA H100 80GB HBM3"), _device("Tesla V100-SXM2-16GB"), _device("unspecified (A100-class)")
    ('h100-sxm', 'v100-sxm-16gb', 'a100-sxm-80gb')
    >>> _device("Arc Pro B60") is None
    True
    """
    outside, inside = re.sub(r"\([^)]*\)", " ", text), " ".join(re.findall(r"\(([^)]*)\)", text))
    for part in (text, outside, inside):
        if name := _accelerator(slugify(part)):
            return name
        several = {name for word in part.split("/") if (name := _spelled(word))}
        if len(several) == 1:
            return several.pop()
    return None


def _spelled(text: str) -> str | None:
    """A device by its name without the vendor's, without words behind it that the catalog does not write."""
    tokens = slugify(_NOISE.sub(" ", _NOISE.sub(" ", text.strip()).strip())).split("-")
    for length in range(len(tokens), 0, -1):
        name = _accelerator("-".join(tokens[:length]))
        # A name cut down to letters alone ("rtx", "arc") would be any of a family.
        if name and (length == len(tokens) or any(char.isdigit() for char in tokens[length - 1])):
            return name
    return None


@lru_cache(maxsize=4096)
def _accelerator(slug: str) -> str | None:
    try:
        return find_profile("accelerators", slug, "accelerator").stem if slug else None
    except InputError:
        return None


@lru_cache(maxsize=1)
def _system_names() -> dict[str, _Machine]:
    """Every name and alias of the catalog's systems in the spelling of file names."""
    names: dict[str, _Machine] = {}
    for name in list_profiles("systems"):
        system = load_profile_file(profiles_dir() / "systems" / f"{name}.yaml", SystemProfile)
        names |= {slugify(spelled): _facts(system) for spelled in (*system.aliases, name)}
    return names


def _facts(system: SystemProfile) -> _Machine:
    return _Machine(
        accelerator=system.accelerator,
        system=system.name,
        gpus_per_node=int(system.node.gpus.value),
        domain_gpus=int(system.scaleup.domain_gpus.value),
        scaleout_link=system.scaleout.link if system.scaleout else None,
        scaleout_bandwidth=system.scaleout.bandwidth.si if system.scaleout else None,
    )


def _load_system(name: str) -> _Machine:
    """A system by its name in the catalog or its file."""
    path = profile_file("systems", name, "cluster", "(`simllm hardware list` shows all; a YAML file works too)")
    return _facts(load_profile_file(path, SystemProfile))


def _catalog_system(text: str, device: str | None) -> _Machine | None:
    """The catalog's system with the longest name that occurs in a text and holds the device."""
    words = f"-{slugify(text)}-"
    whole = _system_names().get(slugify(text))
    if whole is not None and device not in (None, whole.accelerator):
        raise InputError(f"system={text} has {whole.accelerator}, but the row's gpu is {device}")
    found = [
        (len(slug), machine)
        for slug, machine in _system_names().items()
        if f"-{slug}-" in words and device in (None, machine.accelerator)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _devices_a_node(text: str) -> tuple[int | None, str | None]:
    """The first ``8xH100`` of a text that names a device of the catalog.

    >>> _devices_a_node("ABCI Compute Node (V): 4xV100-SXM2-16GB NVLink2, 2xIB EDR")
    (4, 'v100-sxm-16gb')
    >>> _devices_a_node("2x DGX H100")
    (None, None)
    """
    for match in _DEVICES.finditer(text):
        device = _device(match["name"])
        if device is not None:
            return int(match["count"]), device
    return None, None


def _network(text: str) -> _Machine:
    """Ports and transport that a text states.

    >>> found = _network("2 nodes 8xMI300X, 8x mlx5 400G RoCE")
    >>> found.scaleout_link, found.scaleout_bandwidth
    ('roce', 400000000000.0)
    >>> _network("4xIB HDR200").scaleout_bandwidth, _network("16x200G RoCE").scaleout_bandwidth
    (100000000000.0, 400000000000.0)
    """
    lower = text.casefold()
    link = next((name for words, name in _TRANSPORTS if re.search(rf"(?<![a-z])(?:{words})\b", lower)), None)
    ports = _PORTS.search(lower)
    if ports is None or ports["each"]:
        return _Machine()
    rate = ports["gbps"] or ports["rate"] or _GENERATIONS[ports["generation"]]
    bandwidth = int(ports["ports"]) * to_si(float(rate), "Gbps")
    return _Machine(scaleout_link=link, scaleout_bandwidth=bandwidth)


def _usual_node(machine: _Machine, nodes: int | None, ranks: int | None, assumed: list[str]) -> int:
    """Devices of a node where nothing states them: those of the reference system, or as many as were used."""
    references = load_accelerator(machine.accelerator).reference_systems if machine.accelerator else ()
    used = math.ceil((ranks or 1) / (nodes or 1))
    if references:
        usual = _load_system(references[0]).gpus_per_node or used
        if usual >= used or nodes is None:
            if (nodes or 2) > 1:
                assumed.append(f"gpus_per_node is not stated: {usual}, as in {references[0]}")
            return usual
    if (nodes or 2) > 1 or not references:
        assumed.append(f"gpus_per_node is not stated: {used}, all of them in use")
    return used


@lru_cache(maxsize=1024)
def _build(machine: _Machine, num_gpus: int, per_node: int) -> Cluster:
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
