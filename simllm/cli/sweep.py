"""``simllm sweep``: many questions to one table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from simllm.cli.options import Json, count
from simllm.cli.output import emit
from simllm.errors import InputError

__all__ = ["sweep"]

_INTERRUPTED = 130
#: Seconds between lines of progress where standard error is no terminal.
_LOG_EVERY_S = 10.0


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE.yaml", help="Axes: models, clusters, gpus, seq_len, ...")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The table: .parquet or .csv.")],
    jobs: Annotated[
        str | None, typer.Option("--jobs", metavar="N", help="Processes. Default: as many as there are cores.")
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option("--dask", metavar="ADDRESS", help="Let the workers of this Dask scheduler answer instead."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again although the output exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish a sweep that was stopped or killed.")] = False,
    as_json: Json = False,
) -> None:
    """Answer every combination of axes and write one table.

    Each cell is the best plan for its question, or with plans in the file an estimate of each. Rows are kept as they
    come: a sweep that was stopped or killed goes on with --resume, and nothing is lost or doubled. Exit status 1 when
    no cell has an answer, 130 after Ctrl-C.

    \b
    Example file:
      models: [llama-3-8b, llama-3-70b]
      clusters: [dgx-h100, dgx-a100]
      gpus: [64, 512]
      seq_len: [4k, 8k]
      global_batch_size: 1024

    \b
    Example:
      simllm sweep axes.yaml -o plans.parquet --jobs 8
    """
    from simllm import sweeps
    from simllm.report.sweeps import sweep_dict, sweep_report

    if dask is not None and jobs is not None:
        raise InputError("--jobs is for processes on this machine and --dask for a cluster; give one of them")
    show, clear = _progress()
    try:
        table = sweeps.sweep(
            file,
            output,
            jobs=None if jobs is None else count(jobs, "--jobs", maximum=4096),
            dask=dask,
            overwrite=overwrite,
            resume=resume,
            progress=show,
        )
    except sweeps.InterruptedSweepError as stopped:
        clear()
        sys.stderr.write(f"simllm: {stopped}; finish with: simllm sweep {file} -o {output} --resume\n")
        raise typer.Exit(_INTERRUPTED) from None
    except sweeps.WorkerLostError as lost:
        clear()
        raise InputError(f"{lost}; finish with: simllm sweep {file} -o {output} --resume --jobs 1") from None
    clear()
    emit(lambda: sweep_dict(table, output), lambda: sweep_report(table, output), as_json)
    if not (table["status"] == "ok").any():
        raise typer.Exit(1)


def _progress() -> tuple[Callable[[int, int, int], None], Callable[[], None]]:
    """Progress on standard error: one line that changes on a terminal, else a line now and then."""
    from simllm.sweeps.pace import Pace

    pace, terminal = Pace(), sys.stderr.isatty()
    last = [time.monotonic()]

    def show(done: int, total: int, before: int) -> None:
        now = time.monotonic()
        if terminal:
            sys.stderr.write(f"\r\033[K{pace.line(done, total, before)}")
        elif now - last[0] >= _LOG_EVERY_S:
            last[0] = now
            sys.stderr.write(f"{pace.line(done, total, before)}\n")
        sys.stderr.flush()

    def clear() -> None:
        if terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    return show, clear
