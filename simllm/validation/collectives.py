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
from simllm.hardware import Cluster
from simllm.hardware.links import ALGORITHMS
from simllm.network import OPERATIONS, CollectiveCost, Group, bus_factor, price
from simllm.validation.nccl_log import is_log, log_rows, read_text
from simllm.validation.row_cluster import row_cluster
from simllm.validation.scoring import Outcome, Score, score, score_by
from simllm.validation.table import Row, read_table

__all__ = [
    "NEEDED_COLUMNS",
    "REGIMES",
    "CollectiveReport",
    "CollectiveResult",
    "Measurement",
    "measurement",
    "operation_name",
    "read_rows",
    "regime",
    "validate_collectives",
]

#: Columns without which no row can be priced; the others may be missing or empty.
NEEDED_COLUMNS = ("collective", "n_gpus", "message_bytes", "time_us")

#: Sizes that behave alike, from the largest: the wire decides, the pipeline decides, the latency decides.
REGIMES: tuple[tuple[str, float], ...] = ((">= 64 MB", 64e6), ("64 KB to 64 MB", 64e3), ("< 64 KB", 0.0))

#: The names that the test programs of the libraries have for an operation.
_NAMES = {"alltoall": "all_to_all", "sendrecv": "send_recv", "p2p": "send_recv"}

_GROUPS = ("regime", "system", "collective", "gpu")


def regime(size_bytes: float) -> str:
    """The regime of a size.

    >>> regime(1024), regime(1e6), regime(2**26)
    ('< 64 KB', '64 KB to 64 MB', '>= 64 MB')
    """
    return next(name for name, least in REGIMES if size_bytes >= least)


def operation_name(name: str) -> str:
    """An operation of `simllm.network` by its name there or in the test programs.

    >>> operation_name("alltoall"), operation_name("all-gather"), operation_name("AllReduce")
    ('all_to_all', 'all_gather', 'all_reduce')
    """
    plain = name.strip().casefold().replace("-", "_")
    if plain in _NAMES:
        return _NAMES[plain]
    joined = {operation.replace("_", ""): operation for operation in OPERATIONS}
    return joined.get(plain.replace("_", ""), plain)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A row as a question to the network, and what was measured.

    Attributes
    ----------
    operation : str
        One of `simllm.network.OPERATIONS`.
    algorithm : str or None
        What the run forced.
    cluster : Cluster
    group : Group
    size_bytes, time_s : float
        As nccl-tests prints them, out of place.
    """

    operation: str
    algorithm: str | None
    cluster: Cluster
    group: Group
    size_bytes: float
    time_s: float

    def price(self) -> CollectiveCost:
        """The prediction."""
        return price(self.operation, self.size_bytes, self.cluster, self.group, self.algorithm)


def measurement(row: Row, cluster: str | None = None) -> Measurement:
    """What a row asks and what was measured.

    Parameters
    ----------
    row : Row
    cluster : str, optional
        Where it ran, whatever the row says.

    Raises
    ------
    InputError
        Something that nothing can stand in for is missing, wrong or not in the catalog.
    """
    if row.problem:
        raise InputError(row.problem)
    if row.flag("usable") is False:
        why = row.text("notes")
        raise InputError(f"the table marks the row as not usable{f': {why}' if why else ''}")
    operation = operation_name(row.text("collective"))
    if operation not in OPERATIONS:
        raise InputError(f"collective={row.text('collective')} is not priced; priced are {', '.join(OPERATIONS)}")
    size = row.number("message_bytes")
    if size is None:
        raise InputError("message_bytes is not stated")
    algorithm = _algorithm(row.text("algorithm"))
    where, group = row_cluster(row, cluster)
    if row.text("protocol"):
        row.assume(f"protocol={row.text('protocol')} was forced; the cheapest one is priced")
    return Measurement(
        operation=operation,
        algorithm=algorithm,
        cluster=where,
        group=group,
        size_bytes=size,
        time_s=_measured_time(row, operation, group.size, size),
    )


def _algorithm(name: str) -> str | None:
    if not name:
        return None
    plain = name.casefold().replace("_", "").replace("-", "")
    known = {algorithm.replace("_", ""): algorithm for algorithm in ALGORITHMS}
    if plain not in known:
        raise InputError(f"algorithm={name} is not priced; priced are {', '.join(ALGORITHMS)}")
    return known[plain]


def _measured_time(row: Row, operation: str, ranks: int, size: float) -> float:
    """Seconds as measured, or from the measured bandwidth."""
    stated = row.number("time_us")
    if stated is not None:
        return stated * 1e-6
    algbw, busbw = row.number("algbw_GBps"), row.number("busbw_GBps")
    if algbw is not None:
        row.assume("the measured time follows from algbw_GBps")
        return size / (algbw * 1e9)
    if busbw is not None and ranks > 1:
        row.assume("the measured time follows from busbw_GBps")
        return size * bus_factor(operation, ranks) / (busbw * 1e9)
    raise InputError("time_us is not stated, and neither is a bandwidth")


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
class CollectiveReport:
    """Every row, and the errors over all of them.

    Attributes
    ----------
    rows : tuple of CollectiveResult
    cross_validation : dict
        Errors on sweeps that the fit has not seen, by what was left out; empty if that was not asked for.
    """

    rows: tuple[CollectiveResult, ...]
    cross_validation: dict[str, Any] = field(default_factory=dict)

    def errors_by(self, group: str) -> dict[str, Score]:
        """Errors by a property of the rows: ``regime``, ``system``, ``collective``, ``gpu``."""
        pairs = [
            (getattr(row, group) or "not stated", outcome) for row in self.rows if (outcome := row.outcome) is not None
        ]
        found = score_by(pairs, lambda pair: pair[0], lambda pair: pair[1])
        if group == "regime":
            return {name: found[name] for name, _ in REGIMES if name in found}
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
        document = {"rows": [row.to_dict() for row in self.rows], "summary": self.summary}
        return document | ({"cross_validation": self.cross_validation} if self.cross_validation else {})


def read_rows(path: str | Path, collective: str | None = None, gpus: int | None = None) -> list[Row]:
    """The rows of a table of collectives, or of the tables in a log of nccl-tests or rccl-tests.

    Parameters
    ----------
    path : str or Path
    collective : str, optional
        What a log is of, where it does not say.
    gpus : int, optional
        Ranks of a log that does not list its devices.

    Raises
    ------
    InputError
        The file cannot be read, holds no table, or lacks a needed column.
    """
    file = Path(path)
    text = read_text(file)
    if is_log(text):
        return log_rows(text, file.name, collective, gpus)
    return read_table(file, NEEDED_COLUMNS)


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
