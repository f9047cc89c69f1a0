"""Published or own collectives beside predictions: `simllm validate collectives`.

Each row becomes an operation, a cluster and a group by the rules of `row_cluster`. What a row does not state is assumed
by a rule and listed; what cannot be priced is unsupported, with the reason. No row is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simllm.errors import InputError
from simllm.network import bus_factor
from simllm.validation.collective_rows import NEEDED_COLUMNS, measurement, operation_name, read_rows
from simllm.validation.scoring import Outcome, Score, score, score_by
from simllm.validation.table import Row

__all__ = [
    "NEEDED_COLUMNS",
    "REGIMES",
    "CollectiveReport",
    "CollectiveResult",
    "Farthest",
    "regime",
    "validate_collectives",
]

#: Regimes of message size that are scored apart: name, from and up to how many bytes.
REGIMES: tuple[tuple[str, float, float], ...] = (
    ("64 MB and more", 64e6, float("inf")),
    ("64 KB to 64 MB", 65536.0, 64e6),
    ("below 64 KB", 0.0, 65536.0),
)

_GROUPS = ("regime", "machine", "system", "collective", "gpu")


def regime(size_bytes: float) -> str:
    """The regime of a size.

    >>> regime(1024), regime(1e6), regime(2**26)
    ('below 64 KB', '64 KB to 64 MB', '64 MB and more')
    """
    return next(name for name, least, _ in REGIMES if size_bytes >= least)


@dataclass(frozen=True, kw_only=True)
class CollectiveResult:
    """One row of the table with its prediction.

    Attributes
    ----------
    id : str
        Number of the row and name of its sweep.
    sweep, system, gpu, collective : str
        As the table has them.
    ranks : int or None
    status : {"ok", "unsupported"}
    reason : str
        Why it is unsupported.
    size_bytes : float or None
    regime : str
        One of `REGIMES`; "" if the size is not known.
    machine : str
        ``stated``, or ``assumed`` where the device or the network of the row is a guess that nothing supports.
    measured_time_s, predicted_time_s : float or None
    measured_busbw_bytes_per_s, predicted_busbw_bytes_per_s : float or None
    algorithm, protocol, bottleneck : str
        Of the prediction; "" if unsupported.
    assumptions : tuple of str
        What the row does not state.
    """

    id: str
    sweep: str
    system: str
    gpu: str
    collective: str
    ranks: int | None = None
    status: Literal["ok", "unsupported"] = "unsupported"
    reason: str = ""
    size_bytes: float | None = None
    regime: str = ""
    machine: str = ""
    measured_time_s: float | None = None
    predicted_time_s: float | None = None
    measured_busbw_bytes_per_s: float | None = None
    predicted_busbw_bytes_per_s: float | None = None
    algorithm: str = ""
    protocol: str = ""
    bottleneck: str = ""
    assumptions: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome | None:
        """The time as something to score, if both sides are known."""
        if self.measured_time_s is None or self.predicted_time_s is None:
            return None
        return Outcome(key=self.id, predicted=self.predicted_time_s, measured=self.measured_time_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "assumptions": list(self.assumptions)
        }


@dataclass(frozen=True, kw_only=True)
class Farthest:
    """A point far from its prediction.

    Attributes
    ----------
    row : CollectiveResult
    error : float
        Predicted over measured less one.
    seen : tuple of str
        What the table shows against this point: a machine that is guessed at, other runs of the same configuration that
        differ, a smaller message that took longer. Empty where only the model can be at fault.
    """

    row: CollectiveResult
    error: float
    seen: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        return {"id": self.row.id, "error": self.error, "seen": list(self.seen)}


@dataclass(frozen=True, kw_only=True)
class CollectiveReport:
    """Every row, and the errors over all of them.

    Attributes
    ----------
    rows : tuple of CollectiveResult
    cross_validation : dict
        Errors on sweeps that the fit has not seen, by what was left out; empty if that was not asked for.
    noise_floor : dict of str to Score
        By regime: how far measurements of one configuration differ; empty if that was not asked for.
    farthest : tuple of Farthest
        The points farthest off, as many as were asked for.
    """

    rows: tuple[CollectiveResult, ...]
    cross_validation: dict[str, Any] = field(default_factory=dict)
    noise_floor: dict[str, Score] = field(default_factory=dict)
    farthest: tuple[Farthest, ...] = ()

    def errors_by(self, group: str) -> dict[str, Score]:
        """Errors by a property of the rows: ``regime``, ``machine``, ``system``, ``collective``, ``gpu``."""
        pairs = [
            (getattr(row, group) or "not stated", outcome) for row in self.rows if (outcome := row.outcome) is not None
        ]
        found = score_by(pairs, lambda pair: pair[0], lambda pair: pair[1])
        if group == "regime":
            return {name: found[name] for name, *_ in REGIMES if name in found}
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """Errors overall and by group."""
        priced = sum(row.status == "ok" for row in self.rows)
        return {
            "rows": len(self.rows),
            "ok": priced,
            "unsupported": len(self.rows) - priced,
            "overall": score(outcome for row in self.rows if (outcome := row.outcome) is not None).to_dict(),
            **{group: {name: found.to_dict() for name, found in self.errors_by(group).items()} for group in _GROUPS},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        document: dict[str, Any] = {"rows": [row.to_dict() for row in self.rows], "summary": self.summary}
        if self.cross_validation:
            document["cross_validation"] = self.cross_validation
        if self.farthest:
            document["noise_floor"] = {name: found.to_dict() for name, found in self.noise_floor.items()}
            document["worst"] = [point.to_dict() for point in self.farthest]
        return document


def validate_collectives(
    path: str | Path, cluster: str | None = None, progress: Callable[[int, int], None] | None = None
) -> CollectiveReport:
    """Price every row of a table of collectives.

    Parameters
    ----------
    path : str or Path
        A CSV file with the columns of tests/published/collectives.csv, of which `NEEDED_COLUMNS` must be there, or a
        log of nccl-tests or rccl-tests.
    cluster : str, optional
        A system of the catalog or a file of one's own on which all rows ran.
    progress : callable, optional
        Called with the rows done and their number after each row.

    Raises
    ------
    InputError
        The file cannot be read or lacks a needed column. What is wrong with one row is the reason of that row.
    """
    rows = read_rows(path)
    results = []
    for number, row in enumerate(rows, 1):
        results.append(_result(number, row, cluster))
        if progress is not None and (number % 100 == 0 or number == len(rows)):
            progress(number, len(rows))
    return CollectiveReport(rows=tuple(results))


def _result(number: int, row: Row, cluster: str | None) -> CollectiveResult:
    sweep = row.text("sweep")
    told: dict[str, Any] = {
        "id": f"{number}/{sweep}" if sweep else str(number),
        "sweep": sweep,
        "system": row.text("system") or cluster or "",
        "gpu": row.text("gpu"),
        "collective": operation_name(row.text("collective")),
    }
    told |= _stated(row)
    try:
        asked = measurement(row, cluster)
        cost = asked.price()
    except InputError as error:
        return CollectiveResult(**told, reason=str(error), assumptions=tuple(row.assumptions))
    if not cost.time_s:
        return CollectiveResult(**told, reason="one rank alone has nothing to exchange")
    factor = bus_factor(asked.operation, asked.group.size)
    told |= {"ranks": asked.group.size, "size_bytes": asked.size_bytes, "measured_time_s": asked.time_s}
    return CollectiveResult(
        **told,
        status="ok",
        machine="stated" if asked.fitted else "assumed",
        predicted_time_s=cost.time_s,
        measured_busbw_bytes_per_s=asked.size_bytes / asked.time_s * factor,
        predicted_busbw_bytes_per_s=cost.busbw,
        algorithm=cost.algorithm,
        protocol=cost.protocol,
        bottleneck=cost.bottleneck,
        assumptions=tuple(row.assumptions),
    )


def _stated(row: Row) -> dict[str, Any]:
    """Numbers of a row that can be read, for rows that are not priced too."""
    found: dict[str, Any] = {}
    for name, read in (
        ("ranks", lambda: row.integer("n_gpus")),
        ("size_bytes", lambda: row.number("message_bytes")),
        ("measured_time_s", lambda: time_us * 1e-6 if (time_us := row.number("time_us")) else None),
    ):
        with suppress(InputError):
            found[name] = read()
    if found.get("size_bytes"):
        found["regime"] = regime(found["size_bytes"])
    return found
