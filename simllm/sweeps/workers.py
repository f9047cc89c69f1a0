"""Cells answered by processes of this machine, or by an existing Dask cluster; rows come back as they are ready."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from simllm.errors import InputError
from simllm.sweeps.answer import answer

__all__ = ["WorkerLostError", "by_dask", "by_processes", "here", "usable_cores"]

Cell = tuple[int, Mapping[str, Any]]
Row = tuple[int, dict[str, Any]]


_DIED = "a worker process died, most likely killed for memory; use fewer processes"


class WorkerLostError(RuntimeError):
    """A worker process died: killed from outside, most likely for memory."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def here(cells: Iterable[Cell]) -> Iterator[Row]:
    """Cells one after the other in this process."""
    for number, cell in cells:
        yield number, answer(cell)


def by_processes(cells: Iterable[Cell], jobs: int) -> Iterator[Row]:
    """Cells by several processes, each with one cell at a time.

    Raises
    ------
    WorkerLostError
        A process died; rows that came back before are good.
    """
    waiting = iter(cells)
    with ExitStack() as stack, selectors.DefaultSelector() as ready:

        def give(worker: subprocess.Popen[bytes]) -> bool:
            """Hand a worker its next cell, if there is one."""
            cell = next(waiting, None)
            if cell is None:
                return False
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps(cell).encode() + b"\n")
                worker.stdin.flush()
            except BrokenPipeError:
                raise WorkerLostError(_DIED) from None
            return True

        for _ in range(jobs):
            worker = _start()
            stack.callback(_stop, worker)
            if not give(worker):
                break
            assert worker.stdout is not None
            ready.register(worker.stdout, selectors.EVENT_READ, worker)
        while ready.get_map():
            for key, _ in ready.select():
                worker = key.data
                line = worker.stdout.readline()
                if not line.endswith(b"\n"):
                    raise WorkerLostError(_DIED)
                if not give(worker):
                    ready.unregister(worker.stdout)
                number, row = json.loads(line)
                if row is None:
                    raise RuntimeError("a worker met a defect of simllm; its traceback is above")
                yield number, row


def _start() -> subprocess.Popen[bytes]:
    """A worker: a fresh interpreter that ends when this process does, and that Ctrl-C does not reach."""
    places = os.pathsep.join(place for place in sys.path if place)
    return subprocess.Popen(
        [sys.executable, "-m", "simllm.sweeps.serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": places},
        start_new_session=True,
    )


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.communicate()


def by_dask(cells: Iterable[Cell], address: str) -> Iterator[Row]:
    """Cells by the workers of a Dask cluster that runs already.

    Raises
    ------
    InputError
        The extra is not installed, or nobody answers at the address.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--dask needs dask.distributed; install simllm[sweep]") from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"--dask {address}: no scheduler answers there ({error})") from None
    with client, client.as_current():
        futures: dict[Any, int] = {client.submit(answer, cell, pure=False): number for number, cell in cells}
        waiting = set(futures)
        try:
            for future in as_completed(list(futures)):
                waiting.discard(future)
                yield futures[future], future.result()
        finally:
            if waiting:
                client.cancel(list(waiting))
