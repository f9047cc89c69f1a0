"""Reading the output of nccl-tests and rccl-tests: the tables, and the lines above them that say where it ran.

Both print the same table, with columns that came and went over the years (``root``, ``redop``, ``error`` for
``#wrong``); the header above a table says which there are. A log may hold several runs, prefixes of a launcher
(``[1,0]<stdout>:``, ``0:``) and the library's own debug lines between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simllm.errors import InputError
from simllm.network import OPERATIONS, bus_factor
from simllm.validation.table import Row

__all__ = ["LogRun", "is_log", "log_rows", "parse_log", "read_text"]

#: The largest file that is read; a day of benchmarks is a few megabytes.
_LARGEST_LOG_BYTES = 256 * 2**20

#: Programs of the test suites whose names are not those of the collective.
_PROGRAMS = {"alltoall": "all_to_all", "sendrecv": "send_recv"}

_PREFIX = re.compile(r"^(?:\[\d+,\d+\]<(?:stdout|stderr)>:|\d+:\s(?=\s*#|\s*\d+\s+\d+\s))\s*")
_RANK = re.compile(
    r"#\s+Rank\s+(?P<rank>\d+)\s+(?:Group\s+\d+\s+)?Pid\s+(?P<pid>\d+)\s+on\s+(?P<host>\S+)\s+device\s+"
    r"(?P<device>\d+)\s+\[[^\]]*\]\s*(?P<gpu>.*?)\s*$"
)
_SETTINGS = re.compile(r"#\s+nThreads?:?\s+(?P<threads>\d+)\s+nGpus:?\s+(?P<gpus>\d+)")
_PROGRAM = re.compile(r"\b(?P<name>[a-z][a-z_]*?)_perf(?:_mpi)?\b")
_HEADER = re.compile(r"#\s+size\s+count\b.*\btime\b.*\bbusbw\b")
_LIBRARY = re.compile(r"\b(?P<name>NCCL|RCCL) version[ :]+(?P<version>\d[\w.]*)")


@dataclass(kw_only=True)
class LogRun:
    """One table of a log.

    Attributes
    ----------
    collective : str
        As the log names it or its columns tell; "" where they do not.
    ranks, nodes : int
        From the list of devices; 0 where the log has none.
    processes : int
        Processes that drive them; fewer than the ranks where one drives several.
    gpu : str
        What the devices call themselves.
    library : str
        Version of the library, if it was printed.
    points : list of (int, float, float)
        Line, bytes and seconds (out of place) of each row.
    """

    collective: str = ""
    ranks: int = 0
    nodes: int = 0
    processes: int = 0
    gpu: str = ""
    library: str = ""
    points: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class _Place:
    """What the lines above a table have said so far."""

    collective: str = ""
    library: str = ""
    ranks: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    stated_ranks: int = 0
    has_table: bool = False

    def started(self) -> _Place:
        """For the next run: nothing of the last one's devices; what a line before it said of the collective stays."""
        return _Place(library=self.library, collective="" if self.has_table else self.collective)


def read_text(path: Path) -> str:
    """A log or table as text.

    Raises
    ------
    InputError
        It is not there, is empty, too large or not text.
    """
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist; give a log of nccl-tests or rccl-tests, or a CSV file")
        if not path.is_file():
            raise InputError(f"{path} is not a file; give a log of nccl-tests or rccl-tests, or a CSV file")
        if path.stat().st_size > _LARGEST_LOG_BYTES:
            raise InputError(f"{path} is larger than {_LARGEST_LOG_BYTES >> 20} MiB; this is not a log of nccl-tests")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise InputError(f"{path} is empty; give a log of nccl-tests or rccl-tests, or a CSV file")
    return text


def is_log(text: str) -> bool:
    """Whether a text is a log rather than a CSV table, which begins with a line of column names and commas.

    >>> is_log("# nThread 1 nGpus 8 minBytes 8"), is_log("collective,message_bytes,time_us\\nall_reduce,8,9.5")
    (True, False)
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    return first.lstrip().startswith("#") or "," not in first or _HEADER.search(text) is not None


def parse_log(text: str, name: str = "log") -> list[LogRun]:
    """The tables of a log.

    Parameters
    ----------
    text : str
    name : str
        What to call it in errors.

    Raises
    ------
    InputError
        There is no table in it, or a row of a table has a size or time that cannot be.

    Examples
    --------
    >>> run, = parse_log('''# nThread 1 nGpus 2 minBytes 8 maxBytes 16 step: 2(factor) warmup iters: 5 iters: 20
    ... #  Rank  0 Group  0 Pid  101 on  node1 device  0 [0x1a] NVIDIA H100 80GB HBM3
    ... #  Rank  1 Group  0 Pid  101 on  node1 device  1 [0x1b] NVIDIA H100 80GB HBM3
    ... #     size    count  type  redop  root   time  algbw   busbw #wrong   time  algbw   busbw #wrong
    ...          8        2 float    sum    -1   9.51   0.00    0.00      0   9.40   0.00    0.00      0
    ...   16777216  4194304 float    sum    -1  96.62 173.64  173.64      0  95.01 176.58  176.58      0
    ... ''')
    >>> run.collective, run.ranks, run.nodes, run.gpu, [size for _, size, _ in run.points]
    ('all_reduce', 2, 1, 'NVIDIA H100 80GB HBM3', [8.0, 16777216.0])
    """
    runs: list[LogRun] = []
    factors: list[float] = []
    hints: list[tuple[str, str]] = []
    place, columns = _Place(), []
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PREFIX.sub("", raw.strip())
        if _HEADER.match(line):
            columns = line.replace("#", " ", 1).split()
            place.has_table = True
            runs.append(_run(place))
            factors.append(0.0)
            hints.append(("", ""))
        elif runs and columns and (cells := _cells(line, columns)) is not None:
            point = _point(number, cells, name)
            if point is not None:
                runs[-1].points.append(point)
                factors[-1] = _factor(cells) or factors[-1]
                hints[-1] = (cells.get("redop", ""), cells.get("root", ""))
        else:
            columns = [] if line.startswith("# Out of bounds") else columns
            place = _said(line, place)
    if not runs:
        raise InputError(
            f"{name} has no table of nccl-tests or rccl-tests (a line '#  size  count  type ... time  algbw  busbw' "
            "and rows below it); give their output, or a CSV file with the columns "
            "collective, n_gpus, message_bytes, time_us"
        )
    for run, factor, hint in zip(runs, factors, hints, strict=True):
        run.collective = run.collective or _told_by(run.ranks, factor, *hint)
        if not run.processes and not _can_be(run, factor):
            run.ranks = 0  # the settings of one process among several, whose devices the log does not list
    filled = [run for run in runs if run.points]
    if not filled:
        raise InputError(f"{name} has the header of a table but no row with a size above zero; the run did not finish")
    return filled


def _said(line: str, place: _Place) -> _Place:
    """What one line outside of a table says."""
    settings = _SETTINGS.match(line)
    if settings:
        place = place.started()
        place.stated_ranks = int(settings["threads"]) * int(settings["gpus"])
        return place
    rank = _RANK.match(line)
    if rank:
        if rank["rank"] in place.ranks and place.has_table:  # the devices of another run without its settings line
            place = place.started()
        place.ranks[rank["rank"]] = (rank["host"], rank["pid"], rank["gpu"])
        return place
    program = _PROGRAM.search(line)
    if program and "concluded" not in line:
        place = place.started() if place.has_table else place
        place.collective = _PROGRAMS.get(program["name"], program["name"])
    library = _LIBRARY.search(line)
    if library:
        place.library = f"{library['name']} {library['version']}"
    return place


def _run(place: _Place) -> LogRun:
    hosts = {host for host, _, _ in place.ranks.values()}
    names = [gpu for _, _, gpu in place.ranks.values() if gpu]
    return LogRun(
        collective=place.collective,
        ranks=len(place.ranks) or place.stated_ranks,
        nodes=len(hosts),
        processes=len({(host, pid) for host, pid, _ in place.ranks.values()}),
        gpu=max(names, key=names.count) if names else "",
        library=place.library,
    )


def _cells(line: str, columns: Sequence[str]) -> dict[str, str] | None:
    """The cells of a row up to the first busbw by the names of their columns; None for any other line."""
    words = line.split()
    if len(words) < 6 or not (words[0].lstrip("-").isdigit() and words[1].lstrip("-").isdigit()):
        return None
    # An operation without reduction may leave a column of the header empty: the numbers are counted from the right.
    missing = max(0, len(columns) - len(words))
    first = columns.index("time")
    cells = dict(zip(columns[:first], words, strict=False)) if not missing else {"size": words[0], "count": words[1]}
    cells |= dict(zip(columns[first : first + 3], words[first - missing :], strict=False))
    return cells if {"time", "algbw", "busbw"} <= set(cells) else None


def _point(number: int, cells: dict[str, str], name: str) -> tuple[int, float, float] | None:
    try:
        size, time_us = float(cells["size"]), float(cells["time"])
    except ValueError:
        raise InputError(f"{name} line {number}: time={cells['time']!r} is not a number") from None
    if size < 0 or not 0 < time_us < float("inf"):
        what = f"size={cells['size']}" if size < 0 else f"time={cells['time']}"
        raise InputError(f"{name} line {number}: {what} must be above zero")
    # The smallest sizes of a gather round down to nothing for each rank.
    return None if size == 0 else (number, size, time_us * 1e-6)


def _factor(cells: dict[str, str]) -> float:
    """busbw over algbw where both have digits enough."""
    try:
        algbw, busbw = float(cells["algbw"]), float(cells["busbw"])
    except ValueError:
        return 0.0
    return busbw / algbw if algbw > 0.5 else 0.0


def _told_by(ranks: int, factor: float, redop: str, root: str) -> str:
    """The collective from its reduction, its root and busbw over algbw; "" where several would print the same."""
    reduces = redop not in ("", "none")
    if root.isdigit():
        return "reduce" if reduces else "broadcast"
    if ranks > 1 and factor and reduces:
        return "all_reduce" if abs(factor - 2 * (ranks - 1) / ranks) < 0.05 else "reduce_scatter"
    if ranks > 2 and factor and redop and abs(factor - 1) < 0.02 < abs((ranks - 1) / ranks - 1):
        return "send_recv"
    return ""


def _can_be(run: LogRun, factor: float) -> bool:
    """Whether busbw over algbw is that of so many ranks."""
    if run.ranks < 2 or not factor or run.collective not in OPERATIONS:
        return run.ranks > 1
    return abs(factor - bus_factor(run.collective, run.ranks)) < 0.02


def _named(name: str) -> str:
    """The one collective that the name of a log mentions, if there is one.

    >>> _named("nccl_allgather-8n.log"), _named("allreduce_alltoall.log"), _named("run.log")
    ('all_gather', '', '')
    """
    letters = re.sub("[^a-z]", "", name.casefold())
    found = [operation for operation in OPERATIONS if operation.replace("_", "") in letters]
    return found[0] if len(found) == 1 else ""


def log_rows(text: str, name: str, collective: str | None = None, gpus: int | None = None) -> list[Row]:
    """The tables of a log as rows of a table of collectives.

    Parameters
    ----------
    text : str
    name : str
        What to call the log.
    collective : str, optional
        What was measured, where the log does not say.
    gpus : int, optional
        Ranks, where the log does not list its devices.

    Raises
    ------
    InputError
        There is no table, or the log says neither what was measured nor on how many devices.
    """
    rows = []
    for index, run in enumerate(parse_log(text, name), 1):
        operation = run.collective or collective or _named(name)
        ranks = run.ranks or gpus or 0
        if not operation:
            raise InputError(f"{name} does not say which collective table {index} is of; give --collective")
        if not ranks:
            raise InputError(f"{name} does not list the devices of table {index}; give --gpus")
        cells = {
            "sweep": f"table {index}",
            "usable": "True",
            "source": name,
            "gpu": run.gpu,
            "n_nodes": str(run.nodes or ""),
            "n_gpus": str(ranks),
            "collective": operation,
            "library": run.library,
            # Without a list of devices: as training runs do it.
            "ranks_per_process": str(max(run.ranks // run.processes, 1) if run.processes else 1),
        }
        for line, size, seconds in run.points:
            point = {"message_bytes": f"{size:.0f}", "time_us": repr(seconds * 1e6)}
            row = Row(line=line, cells=cells | point)
            if not (run.collective or collective):
                row.assume(f"the log does not say which collective it is of: {operation}, by its name")
            rows.append(row)
    return rows
