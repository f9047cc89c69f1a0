"""Kernel profiles: how close one accelerator comes to its peaks, as data with sources.

A profile lives in ``hardware_profiles/kernels/NAME.yaml``. It holds fractions, not rates: a matmul curve per precision,
attention by implementation and direction, the share of the bandwidth that streaming kernels reach, launch latency, and
the share of the benchmark rate that a long run sustains. A file may borrow from a sibling and replace entries;
``default-CLASS.yaml`` and ``default.yaml`` stand in for what nobody measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from simllm.errors import InputError, unknown_name
from simllm.hardware.profiles import profiles_dir
from simllm.kernels.schema import (
    AttentionDirections,
    FormFile,
    Fraction,
    KernelFile,
    MatmulEntry,
    Seconds,
    read_form,
    read_kernels,
)

__all__ = [
    "KernelProfile",
    "kernel_folder",
    "known_kernel_profiles",
    "load_form",
    "load_kernel_profile",
    "own_kernel_profile",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelProfile:
    """The fractions that price kernels on one accelerator, and where they come from.

    Attributes
    ----------
    name : str
        The accelerator asked for.
    origin : str
        Where its matmul curves come from: its ``own`` file, ``borrowed`` from a sibling, a ``class default`` or the
        ``generic default``.
    files : tuple of str
        Names of the files read, the most specific first.
    matmul : mapping of str to MatmulEntry
        Curve by precision.
    attention : mapping of str to AttentionDirections
        Entries by implementation (``flash2``, ``cudnn``, ...).
    default_attention : str
        What a current framework picks on this device: an implementation, or ``unfused``.
    memory_efficiency : float
        Share of the memory bandwidth that elementwise kernels reach.
    launch_s : float
        Shortest time of a small kernel, seconds.
    stream_efficiency : mapping of str to float
        The same for kernels of one kind, by operator and direction, where these were measured.
    sustained : mapping of str to float
        Long-run over benchmark matmul rate, by precision.
    sustained_from : mapping of str to str
        Name of the file that says so, by precision.
    assumptions : tuple of str
        What stands in for a measurement, for a person to read.
    """

    name: str
    origin: str
    files: tuple[str, ...]
    matmul: Mapping[str, MatmulEntry]
    attention: Mapping[str, AttentionDirections]
    default_attention: str
    memory_efficiency: float
    launch_s: float
    stream_efficiency: Mapping[str, float]
    sustained: Mapping[str, float]
    sustained_from: Mapping[str, str]
    assumptions: tuple[str, ...]


def kernel_folder() -> Path:
    """The shipped ``hardware_profiles/kernels``."""
    return profiles_dir() / "kernels"


def known_kernel_profiles(folder: Path | None = None) -> tuple[str, ...]:
    """Accelerators with a kernel file of their own, measured or borrowing.

    >>> "h100-sxm" in known_kernel_profiles(), "form" in known_kernel_profiles()
    (True, False)
    """
    names = (path.stem for path in (folder or kernel_folder()).glob("*.yaml"))
    return tuple(sorted(name for name in names if _is_device(name)))


@lru_cache(maxsize=8)
def load_form(folder: Path | None = None) -> FormFile:
    """The shape of the cost formulas (``form.yaml``), common to all devices."""
    return read_form((folder or kernel_folder()) / "form.yaml")


@lru_cache(maxsize=256)
def load_kernel_profile(accelerator: str, vendor: str = "", folder: Path | None = None) -> KernelProfile:
    """The kernel profile of an accelerator, by the first rule that holds.

    1. its own file; what that file does not hold comes from the file it borrows from, if it names one;
    2. the class default with the longest prefix of the name in ``applies_to``, else the one that lists its vendor;
    3. the generic default.

    Parameters
    ----------
    accelerator : str
        Canonical name of the accelerator.
    vendor : str
        Its vendor; matters only where no file knows the name.
    folder : Path, optional
        Folder of kernel files; the shipped one if left out.

    Raises
    ------
    InputError
        If a file is wrong, borrows from nothing or in a circle, or the files together lack something.

    Examples
    --------
    >>> load_kernel_profile("h100-sxm").origin, load_kernel_profile("h800-sxm").origin
    ('own', 'borrowed')
    >>> load_kernel_profile("somebodys-chip").files
    ('default',)
    """
    folder = folder or kernel_folder()
    name, origin = _first_file(accelerator, vendor, folder)
    return _profile(accelerator, origin, [], name, folder)


def own_kernel_profile(accelerator: str, path: Path) -> KernelProfile:
    """The kernel profile of a device of one's own, from a file outside the catalog.

    What the file does not hold comes from the file of the catalog that it borrows from.

    Parameters
    ----------
    accelerator : str
        Name of the device.
    path : Path
        A file as `simllm calibrate` writes it.
    """
    file = read_kernels(path)
    return _profile(accelerator, "own", [file], file.borrows, kernel_folder())


def _profile(accelerator: str, origin: str, chain: list[KernelFile], name: str | None, folder: Path) -> KernelProfile:
    while name is not None:
        if name in [file.name for file in chain]:
            circle = " -> ".join([*(file.name for file in chain), name])
            raise InputError(
                f"{folder}: kernel profiles borrow in a circle: {circle}; end it with a file that borrows nothing"
            )
        if chain and not (folder / f"{name}.yaml").is_file():
            known = (*known_kernel_profiles(folder), *_defaults(folder))
            raise unknown_name(f"kernel profile (borrowed by {chain[-1].name})", name, known)
        chain.append(read_kernels(folder / f"{name}.yaml"))
        name = chain[-1].borrows
    if origin == "own" and not chain[0].matmul:
        origin = "borrowed"
    return _merge(accelerator, origin, chain)


def _is_device(name: str) -> bool:
    return name != "form" and name != "default" and not name.startswith("default-")


def _first_file(accelerator: str, vendor: str, folder: Path) -> tuple[str, str]:
    if _is_device(accelerator) and (folder / f"{accelerator}.yaml").is_file():
        return accelerator, "own"
    prefixes: dict[str, str] = {}
    vendors: dict[str, str] = {}
    for name in _defaults(folder):
        file = read_kernels(folder / f"{name}.yaml")
        prefixes |= dict.fromkeys(file.applies_to, name)
        vendors |= dict.fromkeys((known.casefold() for known in file.vendors), name)
    fitting = [prefix for prefix in prefixes if accelerator.startswith(prefix)]
    if fitting:
        return prefixes[max(fitting, key=len)], "class default"
    if vendor.casefold() in vendors:
        return vendors[vendor.casefold()], "class default"
    return "default", "generic default"


@lru_cache(maxsize=8)
def _defaults(folder: Path) -> tuple[str, ...]:
    names = (path.stem for path in folder.glob("default*.yaml"))
    return tuple(sorted(name for name in names if not _is_device(name)))


def _merge(accelerator: str, origin: str, chain: list[KernelFile]) -> KernelProfile:
    matmul: dict[str, MatmulEntry] = {}
    attention: dict[str, AttentionDirections] = {}
    sustained: dict[str, float] = {}
    sustained_from: dict[str, str] = {}
    streams: dict[str, float] = {}
    memory: Fraction | None = None
    launch: Seconds | None = None
    default_attention = "unfused"
    # The last file is the most general: the files before it replace its entries.
    for file in reversed(chain):
        matmul |= file.matmul
        for name, entry in file.attention.items():
            below = attention.get(name, AttentionDirections())
            attention[name] = AttentionDirections(
                forward=entry.forward or below.forward, backward=entry.backward or below.backward
            )
        sustained |= {precision: figure.si for precision, figure in file.sustained_fraction.items()}
        sustained_from |= dict.fromkeys(file.sustained_fraction, file.name)
        streams |= {kind: figure.si for kind, figure in file.stream_efficiency.items()}
        memory = file.memory_efficiency or memory
        launch = file.launch or launch
        default_attention = file.default_attention or default_attention
    first = chain[0].name
    if not matmul or memory is None or launch is None:
        wanted = {"matmul": matmul, "memory_efficiency": memory, "launch": launch}
        lacking = [key for key, found in wanted.items() if not found]
        raise InputError(f"kernel profile {first}: no {', '.join(lacking)} in it or in what it borrows from")
    if default_attention not in (*attention, "unfused"):
        raise unknown_name(f"default_attention of kernel profile {first}", default_attention, (*attention, "unfused"))
    return KernelProfile(
        name=accelerator,
        origin=origin,
        files=tuple(file.name for file in chain),
        matmul=matmul,
        attention=attention,
        default_attention=default_attention,
        memory_efficiency=memory.si,
        launch_s=launch.si,
        stream_efficiency=streams,
        sustained=sustained,
        sustained_from=sustained_from,
        assumptions=_assumptions(accelerator, origin, chain),
    )


def _assumptions(accelerator: str, origin: str, chain: list[KernelFile]) -> tuple[str, ...]:
    found = []
    if origin != "own":
        stands_in = next(file.name for file in chain if file.matmul)
        found.append(
            f"matmuls on {accelerator} are not measured; the shares of peak of {stands_in} stand in ({origin})"
        )
    curves = {precision: entry for file in reversed(chain) for precision, entry in file.matmul.items()}
    found += [
        f"{precision} matmuls on {accelerator} are assumed: {entry.note or entry.source}"
        for precision, entry in sorted(curves.items())
        if entry.basis == "assumed"
    ]
    return tuple(found)
