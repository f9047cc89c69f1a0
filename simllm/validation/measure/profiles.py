"""Measurements of this machine as profiles: accelerator, kernels, links and the system that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.kernels.calibrate import Calibration, fit_kernels
from simllm.kernels.measurements import parse_rows
from simllm.kernels.profile import load_form
from simllm.kernels.rows import MatmulRow
from simllm.kernels.schema import Fraction, KernelFile
from simllm.kernels.write import kernel_yaml, yaml_text
from simllm.validation.measure.device import TorchDevice

__all__ = ["MachineFit", "fit_machine", "profile_texts"]

#: Class of the link between ranks before it is measured, and the fabric that joins them.
_LINK, _FABRIC = "host-staged", "pcie-box"


@dataclass(frozen=True, kw_only=True)
class MachineFit:
    """A machine as its measurements show it.

    Attributes
    ----------
    accelerator : Accelerator
    known : bool
        Whether the catalog has it: peaks and bandwidth are then its vendor's.
    fits : Calibration
        The fitted curves, with what the fit leaves over.
    kernels : KernelFile
        The kernel profile.
    """

    accelerator: Accelerator
    known: bool
    fits: Calibration
    kernels: KernelFile


def fit_machine(device: TorchDevice, rows: Sequence[Mapping[str, str]], name: str) -> MachineFit:
    """The curves of a device through its measurements.

    Parameters
    ----------
    device : TorchDevice
    rows : sequence of mapping
        One for each kernel, as `simllm.validation.measure.raw.reduce_visits` gives them.
    name : str
        What the device is to be called.
    """
    known = _in_catalog(device)
    accelerator = known or _described(device, rows, name)
    copies = [float(row["bytes"]) / float(row["time_us"]) * 1e6 for row in rows if row["op"] == "copy"]
    if copies:
        accelerator = replace(accelerator, pcie_bandwidth=max(copies))
    accelerator = replace(accelerator, name=name, kernels=None)
    fits = fit_kernels(rows, device=accelerator, borrows=known.name if known else None)
    if name not in fits.profiles:
        raise InputError("nothing that a curve can be fitted to was measured")
    file = fits.profiles[name]
    fused = [kind for kind, both in file.attention.items() if both.forward and both.backward and both.backward.residual]
    sustained = _sustained(rows)
    return MachineFit(
        accelerator=accelerator,
        known=known is not None,
        fits=fits,
        kernels=_with_choice(file, fused, sustained, device),
    )


def _with_choice(
    file: KernelFile, fused: Sequence[str], sustained: Mapping[str, Fraction], device: TorchDevice
) -> KernelFile:
    import msgspec

    def cost(kind: str) -> float:
        both = file.attention[kind]
        assert both.forward is not None
        assert both.backward is not None
        return sum(1 / min(entry.rate.values()) for entry in (both.forward, both.backward))

    return msgspec.structs.replace(
        file,
        note=f"{device.name}, measured with {device.library}.",
        sustained_fraction={**file.sustained_fraction, **sustained},
        default_attention=min(fused, key=cost) if fused else file.default_attention,
    )


def _in_catalog(device: TorchDevice) -> Accelerator | None:
    if device.kind == "cpu":
        return None
    try:
        return load_accelerator(device.name)
    except InputError:
        return None


def _described(device: TorchDevice, rows: Sequence[Mapping[str, str]], name: str) -> Accelerator:
    """A device that nobody printed figures of: its fastest kernels reach `peak_share` of what it is taken to have."""
    share = load_form().fit.peak_share
    fastest: dict[str, float] = {}
    for row in parse_rows(rows, accelerator=name).matmuls:
        peak = load_form().precisions[row.precision].peak
        fastest[peak] = max(fastest.get(peak, 0.0), _rate(row))
    streams = [float(row["bytes"]) / float(row["time_us"]) * 1e6 for row in rows if row.get("operator") == "copy"]
    if not fastest or not streams:
        raise InputError("neither matmuls nor copies were measured; without them there is no profile")
    return Accelerator(
        name=name,
        vendor=device.vendor,
        memory_bytes=device.memory_bytes,
        memory_bandwidth=_rounded(max(streams) / share),
        peak_flops={precision: _rounded(rate / share) for precision, rate in fastest.items()},
        compute_units=device.units,
    )


def _rate(row: MatmulRow) -> float:
    return 2.0 * row.m * row.n * row.k * row.count / row.time_s


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _sustained(rows: Sequence[Mapping[str, str]]) -> dict[str, Fraction]:
    """Rates of long runs over those of short ones, of the same matmul."""
    short = {_problem(row): float(row["time_us"]) for row in rows if row["op"] == "gemm" and row["notes"] == "forward"}
    found = {}
    for row in rows:
        if row["op"] == "sustained" and _problem(row) in short:
            share = min(1.0, short[_problem(row)] / float(row["time_us"]))
            found[row["dtype"]] = Fraction(
                value=round(share, 4), unit="fraction", source=row["source"], basis="measured", note=row["notes"]
            )
    return found


def _problem(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("dtype", "m", "n", "k"))


def profile_texts(
    machine: MachineFit, stem: str, device: TorchDevice, ranks: int, source: str, link: str | None
) -> dict[str, str]:
    """The files of a machine by name: the system that `--cluster` takes, its accelerator and its kernels.

    Parameters
    ----------
    machine : MachineFit
    stem : str
        Name of the system's file without its ending.
    device : TorchDevice
    ranks : int
        Devices that one node has.
    source : str
        Where the figures come from: software and date.
    link : str or None
        File of a measured link between ranks; None for a class of the catalog.
    """
    card = machine.accelerator
    measured = {"source": source, "basis": "measured"}
    stated = {"source": "as the operating system says", "basis": "vendor"}
    peak = {"source": source, "basis": "derived", "note": "fastest kernel over the peak_share of form.yaml"}
    if machine.known:
        peak = {"source": f"catalog entry of {device.name}", "basis": "vendor"}

    def figure(value: float, unit: str, words: Mapping[str, str]) -> dict[str, Any]:
        return {"value": value, "unit": unit, **words}

    accelerator: dict[str, Any] = {
        "kind": "accelerator",
        "name": card.name,
        "vendor": card.vendor,
        "memory": figure(card.memory_bytes, "B", stated),
        "memory_bandwidth": figure(_rounded(card.memory_bandwidth / 1e9), "GB/s", peak),
        "peak_flops": {
            name: figure(_rounded(rate / 1e12), "TOP/s" if name == "int8" else "TFLOP/s", peak)
            for name, rate in card.peak_flops.items()
        },
        "compute_units": figure(card.compute_units or 1, "count", stated),
        "kernels": f"{stem}-kernels.yaml",
        "notes": machine.kernels.note,
    }
    if card.pcie_bandwidth is not None:
        accelerator["pcie_bandwidth"] = figure(_rounded(card.pcie_bandwidth / 1e9), "GB/s", measured)
    system = {
        "kind": "system",
        "name": stem,
        "accelerator": f"{stem}-accelerator.yaml",
        "node": {"gpus": figure(ranks, "count", stated)},
        "scaleup": {
            "link": link or _LINK,
            "fabric": _FABRIC,
            "domain_gpus": figure(ranks, "count", stated),
            "bandwidth": figure(
                _rounded(card.memory_bandwidth / 1e9),
                "GB/s",
                {"source": "ranks meet in the memory of the host", "basis": "assumed"},
            ),
        },
        "max_nodes": figure(1, "count", stated),
        "notes": f"{source}; `simllm estimate MODEL --cluster {stem}.yaml` uses it.",
    }
    return {
        f"{stem}.yaml": yaml_text(system),
        f"{stem}-accelerator.yaml": yaml_text(accelerator),
        f"{stem}-kernels.yaml": kernel_yaml(machine.kernels, f"{stem}-kernels"),
    }
