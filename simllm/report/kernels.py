"""Kernel timings beside predictions, and fitted kernel curves, to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from simllm.kernels.calibrate import Calibration
from simllm.kernels.schema import KernelFile, Residual
from simllm.report.text import facts, heading, notes, paragraph, table
from simllm.report.validation import reason_table, unsupported
from simllm.units import format_bytes, format_duration
from simllm.validation.kernels import KernelReport
from simllm.validation.measure.run import Measured

__all__ = ["kernel_calibration_dict", "kernel_calibration_report", "kernel_validation_report", "machine_report"]

#: Kernels named that could not be measured; the document has all.
_FAILED_SHOWN = 8

_GROUPS = ("regime", "kind", "gpu", "precision", "implementation", "fitted")


def kernel_validation_report(report: KernelReport) -> list[RenderableType]:
    """The errors of kernels to read: of the shipped curves, and beside it with each shape left out of the fit.

    Parameters
    ----------
    report : KernelReport
    """
    summary = report.summary
    text = (
        "Errors are |predicted - measured| / measured of the time; repeated timings of one problem count once. Only "
        "the table by regime counts small shapes."
    )
    if report.has_left_out:
        text += (
            " Left out: predicted by curves fitted without the shape; rows that entered no fit count there as they "
            "are, and curves of too few rows to fit without some do not count."
        )
    parts: list[RenderableType] = [
        heading(
            "Predicted against measured",
            f"{summary['rows']} rows: {summary['ok']} priced, {summary['unsupported']} unsupported",
        ),
        paragraph(text),
        Text(),
        _scores("kernels", {"all": summary["overall"]}, _left_out(summary, "overall")),
    ]
    for group in _GROUPS:
        if summary[group] and set(summary[group]) != {"-"}:
            title = "in a fit" if group == "fitted" else f"by {group}"
            parts += [Text(), _scores(title, summary[group], summary.get("left_out", {}).get(group))]
    return [*parts, *unsupported(report.rows)]


def _left_out(summary: Mapping[str, Any], group: str) -> dict[str, Any] | None:
    return {"all": summary["left_out"][group]} if "left_out" in summary else None


def _scores(
    title: str, scores: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, Mapping[str, Any]] | None
) -> RenderableType:
    keys = ("median_absolute_percentage_error", "p90_absolute_percentage_error")
    columns = [title, "count", "mean error", "median", "p90", "bias"]
    if left_out is not None:
        columns += ["left out", "median left out", "p90 left out"]
    rows = []
    for name, found in scores.items():
        cells = [
            name,
            str(found["count"]),
            *(_percent(found[key]) for key in ("mean_absolute_percentage_error", *keys)),
        ]
        cells.append(_percent(found["bias"], sign=True))
        if left_out is not None:
            again = left_out.get(name, {"count": 0})
            cells += [str(again["count"]), *(_percent(again.get(key)) for key in keys)]
        rows.append(cells)
    return table(columns, rows, left=(title,), wrap=(title,))


def _percent(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1f}%" if sign else f"{value:.1f}%"


def kernel_calibration_dict(fits: Calibration) -> dict[str, Any]:
    """Fitted kernel profiles as plain data."""
    import msgspec

    return {
        "profiles": {name: msgspec.to_builtins(profile) for name, profile in fits.profiles.items()},
        "rows_fitted": len(fits.fitted_s),
        "skipped": [{"row": row.index + 1, "reason": row.reason} for row in fits.skipped],
    }


def kernel_calibration_report(fits: Calibration, written: Mapping[str, str]) -> list[RenderableType]:
    """Fitted curves with what the fits leave over.

    Parameters
    ----------
    fits : Calibration
    written : mapping of str to str
        File of each device.
    """
    parts: list[RenderableType] = []
    for name, profile in fits.profiles.items():
        parts += [Text()] if parts else []
        parts += [heading(name, f"written to {written[name]}"), _fit_table("curve", _residuals(profile))]
    if parts:
        parts += [
            Text(),
            paragraph("Scored: rows of sizes that training runs are made of. Left out: fits in five parts."),
        ]
    return [*parts, *reason_table("not fitted because", (row.reason for row in fits.skipped))]


def machine_report(found: Measured) -> list[RenderableType]:
    """A measured machine: its figures, its curves, and what the fits leave over.

    Parameters
    ----------
    found : Measured
    """
    card, file = found.machine.accelerator, found.machine.kernels
    peaks = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in card.peak_flops.items())
    sustained = ", ".join(f"{name} {figure.si:.1%}" for name, figure in file.sustained_fraction.items())
    parts: list[RenderableType] = [
        heading(
            found.device.name,
            f"{found.points} kernels, {found.visits} measurements now, which repeat within {found.spread:.0%}",
        ),
        facts(
            {
                "peaks": f"{peaks} ({'of the vendor' if found.machine.known else 'from the fastest kernels'})",
                "memory": f"{format_bytes(card.memory_bytes)}, {card.memory_bandwidth / 1e9:.4g} GB/s",
                **({"launch": format_duration(file.launch.si)} if file.launch else {}),
                **({"to the host": f"{card.pcie_bandwidth / 1e9:.3g} GB/s"} if card.pcie_bandwidth else {}),
                **({"sustained": f"{sustained} of the rate of a short run"} if sustained else {}),
            }
        ),
        Text(),
        _fit_table("curve", _residuals(file)),
    ]
    streams = [(kind, f"{figure.si:.1%}") for kind, figure in file.stream_efficiency.items()]
    parts += [Text(), table(("streaming kernels", "of the bandwidth"), streams, left=("streaming kernels",))]
    for fit in found.links:
        data = fit.to_dict()
        errors = (
            f"median {data['median_absolute_percentage_error']:.1f}%, p90 {data['p90_absolute_percentage_error']:.1f}%"
        )
        parts += [Text(), heading("link between ranks", f"{fit.points} points, {errors}, like {fit.link.name}")]
    failed = [f"{key}: {reason}" for key, reason in found.failed.items()]
    parts += notes("Not measured, because PyTorch said so", failed[:_FAILED_SHOWN])
    return parts + notes("Written", [str(path) for path in found.written])


def _fit_table(title: str, found: Iterable[tuple[str, Residual]]) -> RenderableType:
    columns = (title, "rows", "scored", "median", "p90", "left out: median", "p90 left out")
    rows = [
        (
            what,
            str(errors.rows),
            str(errors.scored),
            _share(errors.median),
            _share(errors.p90),
            _share(errors.held_out_median),
            _share(errors.held_out_p90),
        )
        for what, errors in found
    ]
    return table(columns, rows, left=columns[:1])


def _residuals(profile: KernelFile) -> Iterator[tuple[str, Residual]]:
    for precision, curve in profile.matmul.items():
        if curve.residual:
            yield f"{precision} matmul", curve.residual
    for implementation, both in profile.attention.items():
        for direction, entry in (("forward", both.forward), ("backward", both.backward)):
            if entry is not None and entry.residual:
                yield f"{implementation} attention {direction}", entry.residual
    yield from profile.stream_residual.items()


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
