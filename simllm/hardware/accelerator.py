"""Accelerators: what one device holds, computes and moves, as its vendor or a measurement says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from simllm.hardware.figures import (
    Bytes,
    BytesPerSecond,
    Count,
    DollarsPerHour,
    Figure,
    FlopsPerSecond,
    OpsPerSecond,
    Watts,
)
from simllm.hardware.profiles import (
    figures_of,
    list_profiles,
    load_profile,
    load_profile_file,
    profile_file,
    register_kind,
    slugify,
)
from simllm.units import to_si

__all__ = ["Accelerator", "load_accelerator"]


class _PeakFlops(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Dense rates; `fp32` without matrix units, all others on the matrix units where there are any."""

    fp32: FlopsPerSecond | None = None
    tf32: FlopsPerSecond | None = None
    fp16: FlopsPerSecond | None = None
    bf16: FlopsPerSecond | None = None
    fp8: FlopsPerSecond | None = None
    fp4: FlopsPerSecond | None = None
    int8: OpsPerSecond | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, precision) is None for precision in self.__struct_fields__):
            raise ValueError(f"no rate is given; give at least one of {', '.join(self.__struct_fields__)}")


class _ScaleUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device's own links to its neighbours, and the fabric they usually form."""

    link: str
    fabric: str
    bandwidth: BytesPerSecond
    links: Count | None = None
    wiring: str | None = None


class AcceleratorProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of hardware_profiles/accelerators."""

    kind: Literal["accelerator"]
    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    memory_type: str | None = None
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    peak_flops: _PeakFlops
    compute_units: Count | None = None
    l2_cache: Bytes | None = None
    pcie_link: str | None = None
    pcie_bandwidth: BytesPerSecond | None = None
    scaleup: _ScaleUp | None = None
    tdp: Watts | None = None
    price: DollarsPerHour | None = None
    reference_systems: tuple[str, ...] = ()
    kernels: str | None = None
    notes: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device, in SI units.

    Attributes
    ----------
    name, aliases, vendor, memory_type, notes
        Its canonical name, other spellings, maker, kind of memory, and what a reader must know.
    memory_bytes : int
        Capacity of the device memory.
    memory_bandwidth : float
        Peak bytes/s of the device memory.
    peak_flops : mapping of str to float
        Dense FLOP/s (operations/s for ``int8``) by precision; a precision that the device lacks is absent.
    compute_units : int or None
        SMs, compute units or cores that work is spread over.
    l2_bytes : int or None
        The last cache before the memory.
    pcie_link, pcie_bandwidth : str, float or None
        Link class, and bytes/s to the host in each direction.
    scaleup_link, scaleup_fabric : str or None
        Link class of the device's links to its neighbours, and the fabric they usually form.
    scaleup_bandwidth : float or None
        Bytes/s over all those links together, in each direction.
    tdp_w : float or None
        Power limit.
    price_usd_per_hour : float or None
        A list price for renting one device.
    sustained : tuple of (str, float)
        Share of a short benchmark's matmul rate that long runs keep, by precision, where it is not that of the kernel
        profile: devices with another power limit.
    reference_systems : tuple of str
        Systems of the catalog that hold this device or its nearest relative; the first is the usual one.
    kernels : Path or None
        Its own file of kernel curves; None for the catalog's.
    figures : mapping of str to Figure
        Every number as printed, with unit, source and basis, by key path.
    """

    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    memory_type: str | None = None
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: Mapping[str, float] = field(hash=False)
    compute_units: int | None = None
    l2_bytes: int | None = None
    pcie_link: str | None = None
    pcie_bandwidth: float | None = None
    scaleup_link: str | None = None
    scaleup_fabric: str | None = None
    scaleup_bandwidth: float | None = None
    tdp_w: float | None = None
    price_usd_per_hour: float | None = None
    sustained: tuple[tuple[str, float], ...] = ()
    reference_systems: tuple[str, ...] = ()
    kernels: Path | None = None
    notes: str | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict, compare=False, repr=False)


def load_accelerator(name_or_path: str | Path, *, beside: Path | None = None) -> Accelerator:
    """An accelerator of the catalog by name or alias, or from a YAML file of one's own.

    Parameters
    ----------
    name_or_path : str or Path
        ``"h100-sxm"``, ``"H100-SXM5-80GB"``, ``"my-card.yaml"``.
    beside : Path, optional
        Folder that a relative path starts from.

    Raises
    ------
    InputError
        For an unknown name (with the nearest known ones) or an unusable file.

    Examples
    --------
    >>> card = load_accelerator("h100-sxm")
    >>> card.memory_bytes == 80 * 2**30, card.peak_flops["bf16"], card.memory_bandwidth
    (True, 989400000000000.0, 3350000000000.0)
    """
    path = profile_file(
        "accelerators", str(name_or_path), "accelerator", "(`simllm hardware list` shows all)", beside=beside
    )
    return _accelerator(load_profile_file(path, AcceleratorProfile), path.parent)


def _accelerator(profile: AcceleratorProfile, folder: Path) -> Accelerator:
    peak = {key.removeprefix("peak_flops."): figure.si for key, figure in figures_of(profile.peak_flops).items()}
    return Accelerator(
        name=profile.name,
        aliases=profile.aliases,
        vendor=profile.vendor,
        memory_type=profile.memory_type,
        memory_bytes=round(profile.memory.si),
        memory_bandwidth=profile.memory_bandwidth.si,
        peak_flops=peak,
        compute_units=round(profile.compute_units.si) if profile.compute_units else None,
        l2_bytes=round(profile.l2_cache.si) if profile.l2_cache else None,
        pcie_link=profile.pcie_link,
        pcie_bandwidth=profile.pcie_bandwidth.si if profile.pcie_bandwidth else None,
        scaleup_link=profile.scaleup.link if profile.scaleup else None,
        scaleup_fabric=profile.scaleup.fabric if profile.scaleup else None,
        scaleup_bandwidth=profile.scaleup.bandwidth.si if profile.scaleup else None,
        tdp_w=profile.tdp.si if profile.tdp else None,
        price_usd_per_hour=profile.price.si / to_si(1, "USD/h") if profile.price else None,
        reference_systems=profile.reference_systems,
        kernels=folder / profile.kernels if profile.kernels else None,
        notes=profile.notes,
        figures=figures_of(profile),
    )


def _check(path: Path, data: dict[str, Any]) -> list[str]:
    profile: AcceleratorProfile = load_profile(data, AcceleratorProfile, str(path))
    wanted = [("systems", system, "reference_systems") for system in profile.reference_systems]
    if profile.scaleup:
        wanted += [
            ("fabrics", profile.scaleup.fabric, "scaleup.fabric"),
            ("links", profile.scaleup.link, "scaleup.link"),
        ]
    return [
        f"{path}: {key}: {name!r} is not in the catalog of {folder}"
        for folder, name, key in wanted
        if slugify(name) not in list_profiles(folder)
    ]


register_kind("accelerator", _check)
