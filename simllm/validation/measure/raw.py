"""Raw measurements in a file: one line a visit, written as they come, so that an interrupted run goes on."""

from __future__ import annotations

import csv
import fcntl
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simllm.errors import InputError

__all__ = ["COLUMNS", "RawFile", "reduce_visits"]

#: Columns of tables of kernel timings, and what only a measurement of one's own has.
COLUMNS = [
    "source",
    "gpu",
    "op",
    "operator",
    "direction",
    "m",
    "n",
    "k",
    "b",
    "s",
    "h",
    "h_kv",
    "d",
    "causal",
    "dtype",
    "bytes",
    "kernels",
    "time_us",
    "library",
    "notes",
    "key",
    "spread",
    "date",
]


class RawFile:
    """The raw measurements of one device, read when it is opened and appended to.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        Header; a file that is there must have the same.
    owner : mapping of str to str
        Cells that are equal in every line: what was measured and with what.
    """

    def __init__(self, path: Path, columns: Sequence[str], owner: Mapping[str, str]) -> None:
        self.path, self.columns, self.owner = path, tuple(columns), dict(owner)
        self.rows: list[dict[str, str]] = []
        self._file: IO[str] | None = None

    @contextmanager
    def opened(self) -> Iterator[RawFile]:
        """The file open for appending by this process alone.

        Raises
        ------
        InputError
            It belongs to another device or software, is no such file, or another process measures into it.
        """
        try:
            with self.path.open("a+", newline="", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(
                        f"{self.path} is being written by another run; wait for it or write elsewhere"
                    ) from None
                self._load(file)
                self._file = file
                yield self
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            self._file = None

    def _load(self, file: IO[str]) -> None:
        file.seek(0)
        text = file.read()
        # A run that was killed may have left half a line: it is measured again.
        whole = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(whole.splitlines()))
        if not lines:
            file.truncate(0)
            csv.writer(file, lineterminator="\n").writerow(self.columns)
            file.flush()
            return
        if tuple(lines[0]) != self.columns:
            raise InputError(f"{self.path} is no file of raw measurements; move it away or write elsewhere")
        self.rows = [
            dict(zip(self.columns, cells, strict=True)) for cells in lines[1:] if len(cells) == len(self.columns)
        ]
        for name, value in self.owner.items():
            other = next((row[name] for row in self.rows if row[name] != value), None)
            if other is not None:
                raise InputError(
                    f"{self.path} was measured with {name}={other}, and this is {value}; "
                    "move it away or write elsewhere"
                )
        file.truncate(len(whole.encode()))

    @property
    def visits(self) -> Counter[str]:
        """Lines by key."""
        return Counter(row["key"] for row in self.rows)

    def append(self, cells: Mapping[str, str]) -> None:
        """Write one line and make it last."""
        assert self._file is not None
        row = {name: (self.owner | dict(cells)).get(name, "") for name in self.columns}
        csv.writer(self._file, lineterminator="\n").writerow(row.values())
        self._file.flush()
        self.rows.append(row)


def reduce_visits(rows: Sequence[Mapping[str, str]], least: bool) -> list[dict[str, str]]:
    """One row for each key: the least time of its visits, or their median.

    Parameters
    ----------
    rows : sequence of mapping
    least : bool
        Where others disturb the times, which only ever adds to them.
    """
    by_key: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row)
    reduced = []
    for visits in by_key.values():
        times = [float(row["time_us"]) for row in visits]
        chosen = min(times) if least else statistics.median(times)
        spread = (max(times) - min(times)) / min(times)
        reduced.append(dict(visits[0]) | {"time_us": f"{chosen:.6g}", "spread": f"{spread:.3f}"})
    return reduced
