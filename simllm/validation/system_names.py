"""What names of published systems say: devices as drivers write them, systems of the catalog, ports of a network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import BytesPerSecond, Count
from simllm.hardware.profiles import (
    find_profile,
    list_profiles,
    load_profile_file,
    profile_file,
    profiles_dir,
    slugify,
)
from simllm.hardware.system import SystemProfile
from simllm.units import to_si

__all__ = [
    "UNSTATED",
    "Machine",
    "device_name",
    "devices_a_node",
    "exact_device",
    "known_system",
    "network",
    "published_systems",
    "system_in",
]

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
_NOISE = re.compile(r"^(?:nvidia|amd|intel|tesla|geforce|instinct)\s+|[\s-]class\b|\bunspecified\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is known of a machine; None where nothing is."""

    accelerator: str | None = None
    system: str | None = None
    gpus_per_node: int | None = None
    domain_gpus: int | None = None
    scaleout_link: str | None = None
    scaleout_bandwidth: float | None = None


#: A machine of which nothing is known.
UNSTATED = Machine()


class _Island(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of a node joined by faster links than the others."""

    fabric: str
    gpus: Count
    scaleup_link: str
    scaleup_bandwidth: BytesPerSecond


class Described(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published name leaves out.

    `peer_access` is the most devices that reach each other directly, `staged_link` the link class of larger groups;
    `one_process` says that one process drove all devices of a node, `algorithm` which all-reduce ran, `library` whose
    version the times are like where a row states none, `nics` how many
    a node has, `network_stated` whether anything tells the network of its rows over several nodes, `device_stated`
    whether anything but the bandwidth reached tells the device, `fit_up_to` the largest group whose times tell about
    other machines with such links. What is not known, or holds for one host alone, can be priced, but nothing is
    fitted to it.
    """

    peer_access: Count | None = None
    staged_link: str | None = None
    one_process: bool = False
    algorithm: str | None = None
    library: str | None = None
    network_stated: bool = True
    device_stated: bool = True
    fit_up_to: Count | None = None
    scaleout_link: str | None = None
    scaleout_bandwidth: BytesPerSecond | None = None
    nics: Count | None = None
    island: _Island | None = None


class _PublishedSystems(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    systems: dict[str, Described]


@lru_cache(maxsize=1)
def published_systems() -> dict[str, Described]:
    """What published names of systems leave out, from hardware_profiles/published_systems.yaml."""
    path = profiles_dir() / "published_systems.yaml"
    return load_profile_file(path, _PublishedSystems).systems


def device_name(text: str) -> str | None:
    """The accelerator of the catalog that a name means, also as drivers write it.

    >>> device_name("NVIDIA H100 80GB HBM3"), device_name("unspecified (A100-class)")
    ('h100-sxm', 'a100-sxm-80gb')
    >>> device_name("Arc Pro B60") is None
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


def exact_device(text: str) -> bool:
    """Whether a name or alias of the catalog's accelerators is written just so."""
    return _accelerator(slugify(text)) is not None


@lru_cache(maxsize=4096)
def _accelerator(slug: str) -> str | None:
    try:
        return find_profile("accelerators", slug, "accelerator").stem if slug else None
    except InputError:
        return None


@lru_cache(maxsize=1)
def _system_names() -> dict[str, Machine]:
    """Every name and alias of the catalog's systems in the spelling of file names."""
    names: dict[str, Machine] = {}
    for name in list_profiles("systems"):
        system = load_profile_file(profiles_dir() / "systems" / f"{name}.yaml", SystemProfile)
        names |= {slugify(spelled): _facts(system) for spelled in (*system.aliases, name)}
    return names


def _facts(system: SystemProfile) -> Machine:
    return Machine(
        accelerator=system.accelerator,
        system=system.name,
        gpus_per_node=int(system.node.gpus.value),
        domain_gpus=int(system.scaleup.domain_gpus.value),
        scaleout_link=system.scaleout.link if system.scaleout else None,
        scaleout_bandwidth=system.scaleout.bandwidth.si if system.scaleout else None,
    )


def known_system(name: str) -> Machine:
    """A system by its name in the catalog or its file."""
    path = profile_file("systems", name, "cluster", "(`simllm hardware list` shows all; a YAML file works too)")
    return _facts(load_profile_file(path, SystemProfile))


def system_in(text: str, device: str | None) -> Machine | None:
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


def devices_a_node(text: str) -> tuple[int | None, str | None]:
    """The first ``8xH100`` of a text that names a device of the catalog.

    >>> devices_a_node("ABCI Compute Node (V): 4xV100-SXM2-16GB NVLink2, 2xIB EDR")
    (4, 'v100-sxm-16gb')
    >>> devices_a_node("2x DGX H100")
    (None, None)
    """
    for match in _DEVICES.finditer(text):
        device = device_name(match["name"])
        if device is not None:
            return int(match["count"]), device
    return None, None


def network(text: str) -> Machine:
    """Ports and transport that a text states.

    >>> found = network("2 nodes 8xMI300X, 8x mlx5 400G RoCE")
    >>> found.scaleout_link, found.scaleout_bandwidth
    ('roce', 400000000000.0)
    >>> network("4xIB HDR200").scaleout_bandwidth, network("16x200G RoCE").scaleout_bandwidth
    (100000000000.0, 400000000000.0)
    """
    lower = text.casefold()
    link = next((name for words, name in _TRANSPORTS if re.search(rf"(?<![a-z])(?:{words})\b", lower)), None)
    ports = _PORTS.search(lower)
    if ports is None or ports["each"]:
        return Machine()
    rate = ports["gbps"] or ports["rate"] or _GENERATIONS[ports["generation"]]
    bandwidth = int(ports["ports"]) * to_si(float(rate), "Gbps")
    return Machine(scaleout_link=link, scaleout_bandwidth=bandwidth)
