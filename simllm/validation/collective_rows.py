"""Rows of a table of collectives, or of a log, as questions to the network with what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.hardware.links import ALGORITHMS
from simllm.network import OPERATIONS, CollectiveCost, Group, bus_factor, price
from simllm.network.fabric import fabric
from simllm.validation.nccl_log import is_log, log_rows, read_text
from simllm.validation.row_cluster import row_cluster
from simllm.validation.table import Row, read_table

__all__ = [
    "NEEDED_COLUMNS",
    "Measurement",
    "Series",
    "measured_series",
    "measurement",
    "operation_name",
    "read_rows",
]

#: Columns without which no row can be priced; the others may be missing or empty.
NEEDED_COLUMNS = ("collective", "n_gpus", "message_bytes", "time_us")

#: A bus bandwidth printed with two decimals tells the time to a tenth from here on, GB/s.
_FINEST_BUSBW = 0.05

#: The names that the test programs of the libraries have for an operation.
_NAMES = {"alltoall": "all_to_all", "sendrecv": "send_recv", "p2p": "send_recv"}


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
    fitted : bool
        Whether so much of the machine is known that the time tells about links.
    """

    operation: str
    algorithm: str | None
    cluster: Cluster
    group: Group
    size_bytes: float
    time_s: float
    fitted: bool = True

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
    if "acceptance threshold" in f"{row.text('system')} {row.text('notes')}":
        raise InputError("a threshold for acceptance, not a measurement")
    if "2-decimals" in row.text("notes") and (row.number("busbw_GBps") or 0) < _FINEST_BUSBW:
        raise InputError("the bandwidth is printed too coarsely to tell the time")
    operation = operation_name(row.text("collective"))
    if operation not in OPERATIONS:
        raise InputError(f"collective={row.text('collective')} is not priced; priced are {', '.join(OPERATIONS)}")
    size = row.number("message_bytes")
    if size is None:
        raise InputError("message_bytes is not stated")
    algorithm = _algorithm(row.text("algorithm"))
    placed = row_cluster(row, cluster)
    if algorithm is None and operation == "all_reduce" and placed.algorithm is not None:
        algorithm = placed.algorithm
        row.assume(f"algorithm={algorithm}, inferred from the bandwidth reached")
    if row.text("protocol"):
        row.assume(f"protocol={row.text('protocol')} was forced; the cheapest one is priced")
    return Measurement(
        operation=operation,
        algorithm=algorithm,
        cluster=placed.cluster,
        group=placed.group,
        size_bytes=size,
        time_s=_measured_time(row, operation, placed.group.size, size),
        fitted=placed.fitted,
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


@dataclass(frozen=True, kw_only=True)
class Series:
    """Measured times of one collective over sizes.

    Attributes
    ----------
    label : str
        What the source calls the machine.
    sweep : str
    sizes_bytes, times_s : tuple of float
        By rising size.
    """

    label: str
    sweep: str
    sizes_bytes: tuple[float, ...]
    times_s: tuple[float, ...]


def measured_series(
    path: str | Path, operation: str, cluster: Cluster, group: Group, algorithm: str | None = None
) -> list[Series]:
    """The sweeps of a table that measured an operation on a group like this one.

    A group is like another one if it has the same accelerator and sees the same links: as many ranks in as many
    domains, link classes and bandwidths.

    Parameters
    ----------
    path : str or Path
        A table or log as in `validate_collectives`.
    operation : str
    cluster : Cluster
    group : Group
    algorithm : str, optional
        Leave out sweeps that forced another one.

    Raises
    ------
    InputError
        The file cannot be read or lacks a needed column.
    """
    here = fabric(cluster, group)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read_rows(path, operation, group.size):
        if operation_name(row.text("collective")) != operation or row.text("n_gpus") == "":
            continue
        try:
            found = measurement(row)
        except InputError:
            continue  # `simllm validate collectives` says why
        same_device = found.cluster.accelerator.name == cluster.accelerator.name
        forced_other = found.algorithm is not None and algorithm not in (None, found.algorithm)
        if found.group.size != group.size or not same_device or forced_other:
            continue
        if fabric(found.cluster, found.group) == here:
            key = (row.text("system") or found.cluster.name, row.text("sweep"))
            points.setdefault(key, []).append((found.size_bytes, found.time_s))
    return [
        Series(
            label=label,
            sweep=sweep,
            sizes_bytes=tuple(size for size, _ in sorted(members)),
            times_s=tuple(seconds for _, seconds in sorted(members)),
        )
        for (label, sweep), members in points.items()
    ]
