"""Published or own kernel timings beside predictions: `simllm validate kernels`.

Each row is priced with the shipped curves, and once more with curves fitted without its shape. A row that entered no
fit has not been seen by one: for it both are the same prediction. No row is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from simllm.errors import InputError
from simllm.kernels.calibrate import fit_kernels
from simllm.kernels.measurements import parse_rows, predict
from simllm.kernels.rows import AttentionRow, MatmulRow, StreamRow
from simllm.validation.scoring import Outcome, Score, score, score_by
from simllm.validation.table import read_table

__all__ = ["NEEDED_COLUMNS", "REGIMES", "KernelReport", "KernelResult", "validate_kernels"]

#: Columns without which a table says nothing of kernels.
NEEDED_COLUMNS = ("gpu", "op", "dtype", "library")
#: Sizes told apart: all sides of a matmul, the sequence, the bytes. The first of each pair is what training is made of.
REGIMES = (
    "matmul >= 1024",
    "matmul, smaller",
    "attention >= 1024",
    "attention, shorter",
    "stream >= 1 MiB",
    "stream, smaller",
)
_LARGE = REGIMES[::2]
_GROUPS = ("regime", "kind", "gpu", "precision", "implementation", "fitted")


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """One row of the table with its prediction.

    Attributes
    ----------
    id : str
        Number of the row.
    gpu : str
        The accelerator; as the table has it where the row is unsupported.
    kind : str
        ``matmul``, ``attention forward``, ``attention backward`` or ``stream``.
    precision, implementation, library : str
        Number format; attention implementation or kind of streaming kernel ("" for matmuls); what was timed.
    shape : str
        Equal for measurements of one problem.
    regime : str
        One of `REGIMES`; "" if unsupported.
    flops : float
        Work of the row as it is priced; 0 of streams.
    status : {"ok", "unsupported"}
    reason : str
        Why it is unsupported.
    fitted : str
        ``yes`` if a shipped curve was fitted to this row, else ``no``; "" where nothing was left out.
    measured_time_s, predicted_time_s : float or None
    left_out_time_s : float or None
        Prediction of curves that have not seen the row's shape.
    """

    id: str
    gpu: str
    kind: str = ""
    precision: str = ""
    implementation: str = ""
    library: str = ""
    shape: str = ""
    regime: str = ""
    flops: float = 0.0
    status: Literal["ok", "unsupported"] = "unsupported"
    reason: str = ""
    fitted: str = ""
    measured_time_s: float | None = None
    predicted_time_s: float | None = None
    left_out_time_s: float | None = None
    assumptions: tuple[str, ...] = ()

    def outcome(self, left_out: bool = False) -> Outcome | None:
        """The time as something to score, if both sides are known."""
        predicted = self.left_out_time_s if left_out else self.predicted_time_s
        if self.measured_time_s is None or predicted is None:
            return None
        key = "/".join((self.gpu, self.kind, self.precision, self.implementation, self.library, self.shape))
        return Outcome(key=key, predicted=predicted, measured=self.measured_time_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "assumptions": list(self.assumptions)
        }


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Every row, and the errors over all of them.

    Attributes
    ----------
    rows : tuple of KernelResult
    has_left_out : bool
        Whether curves were fitted again without shapes.
    """

    rows: tuple[KernelResult, ...]
    has_left_out: bool

    def errors_by(self, group: str, left_out: bool = False) -> dict[str, Score]:
        """Errors by a property of the rows; all but the regimes over rows of the sizes that training is made of."""
        pairs = [
            (getattr(row, group), outcome)
            for row in self.rows
            if (outcome := row.outcome(left_out)) is not None and (group == "regime" or row.regime in _LARGE)
        ]
        found = score_by(pairs, lambda pair: pair[0] or "-", lambda pair: pair[1])
        return {name: found[name] for name in REGIMES if name in found} if group == "regime" else found

    def _scores(self, left_out: bool) -> dict[str, Any]:
        found = [outcome for row in self.rows if row.regime in _LARGE and (outcome := row.outcome(left_out))]
        return {
            "overall": score(found).to_dict(),
            **{
                group: {name: errors.to_dict() for name, errors in self.errors_by(group, left_out).items()}
                for group in _GROUPS
            },
        }

    @property
    def summary(self) -> dict[str, Any]:
        """Errors overall and by group, of the shipped curves and, under ``left_out``, on shapes left out of the fit."""
        priced = sum(row.status == "ok" for row in self.rows)
        counts = {"rows": len(self.rows), "ok": priced, "unsupported": len(self.rows) - priced}
        return counts | self._scores(False) | ({"left_out": self._scores(True)} if self.has_left_out else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        return {"rows": [row.to_dict() for row in self.rows], "summary": self.summary}


def validate_kernels(
    path: str | Path, *, left_out: bool = True, progress: Callable[[int], None] | None = None
) -> KernelReport:
    """Price every row of a table of kernel timings.

    Parameters
    ----------
    path : str or Path
        A CSV file with the columns of tests/published/kernels.csv, of which `NEEDED_COLUMNS` must be there.
    left_out : bool
        Whether to fit every curve again without each fifth of its shapes, and predict those (needs scipy). Curves of
        8- and 4-bit matmuls then still share memory and launch with the 16-bit curve of all shapes.
    progress : callable, optional
        Called with the number of devices fitted after each.

    Raises
    ------
    InputError
        The file cannot be read or lacks a needed column. What is wrong with one row is the reason of that row.
    """
    table = read_table(path, NEEDED_COLUMNS)
    cells = [row.cells for row in table]
    rows = parse_rows(cells)
    unseen: Mapping[int, float] = {}
    seen: Mapping[int, float] = {}
    if left_out:
        fits = fit_kernels(cells, progress=progress)
        unseen, seen = fits.left_out_s, fits.fitted_s
    results = {
        row.index: KernelResult(
            id=str(row.index + 1),
            gpu=cells[row.index].get("gpu", ""),
            library=cells[row.index].get("library", ""),
            reason=row.reason,
        )
        for row in rows.skipped
    }
    timed: list[MatmulRow | AttentionRow | StreamRow] = [*rows.matmuls, *rows.attentions, *rows.streams]
    for row in timed:
        found = _result(row)
        if left_out and found.status == "ok":
            # A curve of few rows is fitted to all of them, and then nothing is known of its shapes left out.
            known = unseen.get(row.index) if row.index in seen else found.predicted_time_s
            found = replace(found, fitted="yes" if row.index in seen else "no", left_out_time_s=known)
        results[row.index] = found
    ordered = tuple(
        replace(results[index], reason=line.problem, status="unsupported") if line.problem else results[index]
        for index, line in enumerate(table)
    )
    return KernelReport(rows=ordered, has_left_out=left_out)


def _result(row: MatmulRow | AttentionRow | StreamRow) -> KernelResult:
    told: dict[str, Any] = {
        "id": str(row.index + 1),
        "gpu": row.accelerator,
        "library": row.library,
        "shape": "x".join(map(str, row.shape)),
        "measured_time_s": row.time_s,
        "regime": _regime(row),
    }
    if isinstance(row, MatmulRow):
        flops = 2.0 * row.m * row.n * row.k * row.count
        told |= {"kind": "matmul", "precision": row.precision, "flops": flops}
    elif isinstance(row, AttentionRow):
        told |= {
            "kind": f"attention {row.direction}",
            "precision": row.precision,
            "implementation": row.implementation,
            "flops": row.flops,
        }
    else:
        told |= {"kind": "stream", "implementation": row.kind}
    try:
        return KernelResult(**told, status="ok", predicted_time_s=predict(row))
    except InputError as error:
        return KernelResult(**told, reason=str(error))


def _regime(row: MatmulRow | AttentionRow | StreamRow) -> str:
    first = 0 if isinstance(row, MatmulRow) else 2 if isinstance(row, AttentionRow) else 4
    return REGIMES[first if row.scored else first + 1]
