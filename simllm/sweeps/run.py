"""`sweep`: every cell answered once, kept as it comes, and written as one table."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError
from simllm.sweeps.cells import Sweep, read_sweep
from simllm.sweeps.journal import Journal, journal_path
from simllm.sweeps.table import check_format, frame, table_bytes
from simllm.sweeps.workers import Cell, Row, by_dask, by_processes, here, usable_cores

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["InterruptedSweepError", "sweep"]

Progress = Callable[[int, int, int], None]


class InterruptedSweepError(KeyboardInterrupt):
    """Ctrl-C during a sweep; what was done is kept.

    Attributes
    ----------
    done, total : int
        Cells.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"stopped after {done} of {total} cells")
        self.done, self.total = done, total


def sweep(
    source: str | Path | Mapping[str, Any],
    output: str | Path | None = None,
    *,
    jobs: int | None = None,
    dask: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The best plan, or given plans, for every combination of models, clusters, GPUs, lengths and batches.

    Parameters
    ----------
    source : path or mapping
        Axes, as `simllm.sweeps.read_sweep` reads them.
    output : path, optional
        ``.parquet`` or ``.csv`` to write as well. Rows are kept beside it as they come, so that a killed sweep can be
        finished.
    jobs : int, optional
        Processes; as many as there are cores when omitted.
    dask : str, optional
        Address of a Dask scheduler whose workers answer instead.
    overwrite, resume : bool
        Start again although the output exists; or finish what a sweep that died left.
    progress : callable, optional
        Called with the cells done, all cells, and those an earlier run did.

    Returns
    -------
    pandas.DataFrame
        One row a cell in the order of the axes: the question, ``status`` (``ok``, ``nothing fits`` or ``refused``),
        ``reason``, the plan, and its time and memory in SI units.

    Raises
    ------
    InputError
        The axes are wrong, or the output exists.
    InterruptedSweepError
        Ctrl-C.

    Examples
    --------
    >>> table = sweep({"models": "llama-3-8b", "clusters": "dgx-h100", "gpus": 8, "seq_len": 4096,
    ...                "global_batch_size": 64, "plans": [{"tp": 2}, {"tp": 16}]}, jobs=1)
    >>> list(table["status"])
    ['ok', 'refused']
    """
    if overwrite and resume:
        raise InputError("overwrite starts again and resume goes on; give one of them")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise InputError(f"jobs={jobs} must be a whole number above zero")
    questions = read_sweep(source)
    if output is None:
        rows: dict[int, dict[str, Any]] = {}
        _fill(questions, rows, rows.__setitem__, jobs, dask, progress)
        return frame([rows[number] for number in range(len(questions.cells))])
    place = Path(output)
    journal = _claim(place, overwrite, resume)
    with Journal(journal, questions, resume=resume) as kept:
        _fill(questions, kept.rows, kept.add, jobs, dask, progress)
        table = frame([kept.rows[number] for number in range(len(questions.cells))])
        _replace(place, table_bytes(table, place))
        kept.remove()
    return table


def _claim(place: Path, overwrite: bool, resume: bool) -> Path:
    """The journal's place, once it is clear that nothing is lost."""
    check_format(place)
    if not place.parent.is_dir():
        raise InputError(f"{place} cannot be written: there is no folder {str(place.parent)!r}")
    journal = journal_path(place)
    if overwrite:
        journal.unlink(missing_ok=True)
    elif journal.exists() and not resume:
        raise InputError(f"{journal} is that of an unfinished sweep; --resume finishes it, --overwrite starts again")
    elif place.exists() and not journal.exists():
        done = " and nothing is left to resume" if resume else ""
        raise InputError(f"{place} exists{done}; --overwrite makes it again, or give another name")
    return journal


def _fill(
    questions: Sweep,
    rows: Mapping[int, dict[str, Any]],
    keep: Callable[[int, dict[str, Any]], None],
    jobs: int | None,
    dask: str | None,
    progress: Progress | None,
) -> None:
    """Answer the cells that have no row yet."""
    total, before = len(questions.cells), len(rows)
    cells: list[Cell] = [(number, cell) for number, cell in enumerate(questions.cells) if number not in rows]
    try:
        with contextlib.closing(_answers(cells, jobs, dask)) as answers:
            for number, row in answers:
                keep(number, row)
                if progress is not None:
                    progress(len(rows), total, before)
    except KeyboardInterrupt:
        raise InterruptedSweepError(len(rows), total) from None


def _answers(cells: list[Cell], jobs: int | None, dask: str | None) -> Generator[Row, None, None]:
    if dask is not None:
        yield from by_dask(cells, dask)
        return
    processes = min(jobs or usable_cores(), len(cells))
    yield from here(cells) if processes <= 1 else by_processes(cells, processes)


def _replace(place: Path, content: bytes) -> None:
    """Write the output whole or not at all."""
    handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, place)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
