"""What keeps a sweep from losing or doubling a row: a journal beside the output, one line a row, appended to only.

A line counts once it is complete; what a killed process left of its last line is cut off when the sweep goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from simllm.errors import InputError
from simllm.sweeps.cells import Sweep

__all__ = ["Journal", "journal_path"]


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies.

    >>> journal_path(Path("a/sweep.csv")).name
    'sweep.csv.journal'
    """
    return output.with_name(f"{output.name}.journal")


class Journal:
    """The rows of an unfinished sweep on disk; one process at a time holds it.

    Attributes
    ----------
    rows : dict of int to dict
        Row of every cell that is done, by its place in the sweep.
    """

    def __init__(self, path: Path, sweep: Sweep, *, resume: bool) -> None:
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        try:
            self._file = open(path, "r+b" if resume and path.exists() else "w+b" if resume else "x+b")  # noqa: SIM115
        except FileExistsError:
            raise InputError(f"{path} is that of an unfinished sweep; --resume finishes it") from None
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"{path} is being written by another sweep; wait for it, or give another output") from None
        try:
            self._open(sweep)
        except BaseException:
            self._file.close()
            raise

    def _open(self, sweep: Sweep) -> None:
        complete = 0
        for number, line in enumerate(_complete_lines(self._file.read())):
            try:
                entry = json.loads(line)
                if number == 0:
                    same = entry["sweep"] == sweep.fingerprint
                else:
                    same = 0 <= entry["cell"] < len(sweep.cells)
                    self.rows[entry["cell"]] = entry["row"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                raise InputError(f"{self.path} is damaged in line {number + 1}; --overwrite starts again") from None
            if not same:
                raise InputError(
                    f"{self.path} is of another sweep or another version of simllm; --overwrite starts again"
                )
            complete += len(line)
        self._file.seek(complete)
        self._file.truncate()
        if complete == 0:
            self._write({"sweep": sweep.fingerprint, "cells": len(sweep.cells)})

    def add(self, cell: int, row: dict[str, Any]) -> None:
        """Keep the row of a cell; once this returns it outlives the process and the machine."""
        self._write({"cell": cell, "row": row})
        self.rows[cell] = row

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Forget the journal: the output holds its rows now."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _complete_lines(content: bytes) -> Iterator[bytes]:
    """Lines that end; the rest was being written when the process died."""
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield line
