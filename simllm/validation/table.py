"""Reading a table of runs: a CSV file, and its cells as numbers with a message for what cannot be read."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simllm.errors import InputError

__all__ = ["Row", "read_table"]

#: A table of every run ever published is a few megabytes; whatever is larger is something else.
_LARGEST_TABLE_BYTES = 256 * 2**20
_TRUE = frozenset({"1", "1.0", "true", "yes", "on"})
_FALSE = frozenset({"0", "0.0", "false", "no", "off"})


@dataclass(kw_only=True, eq=False)
class Row:
    """One row of a table: its cells, and what had to be assumed to use it.

    An empty cell and a column that is not there both mean "not stated".

    Attributes
    ----------
    line : int
        Line of the file, for rows without a name.
    cells : mapping of str to str
    problem : str
        What is wrong with the line as a whole; "" if nothing.
    assumptions : list of str
        One sentence for everything that the row does not state, in the order it was needed.

    Examples
    --------
    >>> row = Row(line=2, cells={"tp": "8", "zero": "", "n_gpus": "many"})
    >>> row.integer("tp"), row.integer("zero"), row.integer("pp")
    (8, None, None)
    >>> row.integer("n_gpus")
    Traceback (most recent call last):
        ...
    simllm.errors.InputError: n_gpus='many' is not a whole number
    """

    line: int
    cells: Mapping[str, str]
    problem: str = ""
    assumptions: list[str] = field(default_factory=list)

    def assume(self, sentence: str) -> None:
        """Record an assumption once."""
        if sentence not in self.assumptions:
            self.assumptions.append(sentence)

    def text(self, name: str) -> str:
        """A cell without the blanks around it; "" where nothing is stated."""
        return self.cells.get(name, "").strip()

    def number(self, name: str) -> float | None:
        """A positive number, or None where nothing is stated."""
        given = self.text(name)
        if not given:
            return None
        try:
            value = float(given)
        except ValueError:
            raise InputError(f"{name}={given!r} is not a number") from None
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}={given} must be above zero and finite")
        return value

    def integer(self, name: str, most: int = 10**7) -> int | None:
        """A positive whole number of at most ``most``, or None where nothing is stated."""
        given = self.text(name)
        if not given:
            return None
        try:
            value = float(given)
        except ValueError:
            raise InputError(f"{name}={given!r} is not a whole number") from None
        if not (math.isfinite(value) and value.is_integer()):
            raise InputError(f"{name}={given!r} is not a whole number")
        if not 1 <= value <= most:
            raise InputError(f"{name}={given} must be from 1 to {most}")
        return int(value)

    def needed_integer(self, name: str, most: int = 10**7) -> int:
        """A positive whole number that nothing can stand in for."""
        value = self.integer(name, most)
        if value is None:
            raise InputError(f"{name} is not stated")
        return value

    def flag(self, name: str) -> bool | None:
        """Yes or no, or None where nothing is stated."""
        given = self.text(name).casefold()
        if not given:
            return None
        if given in _TRUE:
            return True
        if given in _FALSE:
            return False
        raise InputError(f"{name}={given!r} must be 1 or 0")


def read_table(path: str | Path, needed: Sequence[str]) -> list[Row]:
    """The rows of a CSV file with a header line.

    Parameters
    ----------
    path : str or Path
    needed : sequence of str
        Columns that the header must name.

    Raises
    ------
    InputError
        The file cannot be read, is not a table, or lacks a column or any row.
    """
    file = Path(path)
    lines = _parse(file)
    if not lines:
        raise InputError(f"{file} is empty; expected a CSV file with the columns {', '.join(needed)}, ...")
    header = [name.strip() for name in lines[0][1]]
    missing = [name for name in needed if name not in header]
    if missing:
        raise InputError(
            f"{file} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"needed are {', '.join(needed)}"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{file} has more than one column named {', '.join(twice)}")
    rows = [_row(line, header, cells) for line, cells in lines[1:] if any(cell.strip() for cell in cells)]
    if not rows:
        raise InputError(f"{file} has a header but no rows")
    return rows


def _parse(file: Path) -> list[tuple[int, list[str]]]:
    """The lines that hold anything, with their numbers."""
    if not file.exists():
        raise InputError(f"{file} does not exist; give a CSV file of runs")
    if not file.is_file():
        raise InputError(f"{file} is not a file; give a CSV file of runs")
    try:
        if file.stat().st_size > _LARGEST_TABLE_BYTES:
            raise InputError(f"{file} is larger than {_LARGEST_TABLE_BYTES >> 20} MiB; this is not a table of runs")
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            return [(reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is not a CSV file in UTF-8: {error}") from None


def _row(line: int, header: list[str], cells: list[str]) -> Row:
    surplus = any(cell.strip() for cell in cells[len(header) :])
    problem = f"line {line} has {len(cells)} cells for {len(header)} columns" if surplus else ""
    return Row(line=line, cells=dict(zip(header, cells, strict=False)), problem=problem)
