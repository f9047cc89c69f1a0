"""Processes that execute cases: started once, given case after case, and gone when anything goes wrong.

Each case has a rendezvous file in a directory of its own, so that nothing is shared with another run on the machine. A
rank that fails, dies or does not answer in time ends all of them; a process whose parent is gone ends itself.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from simllm.parallel.plan import Plan
from simllm.validation.execution.case import Case

__all__ = ["ExecutionError", "Pool"]

_GRACE_S = 5.0


class ExecutionError(ChildProcessError):
    """A rank failed, died or hung."""


class OwnCase(Protocol):
    """A case that knows how a rank executes it."""

    @property
    def plan(self) -> Plan:
        """Whose GPUs are the ranks."""

    def execute(self) -> Any:
        """The record of this rank; the default process group exists."""


@dataclass(frozen=True)
class _Job:
    case: Case | OwnCase
    rank: int
    world: int
    rendezvous: str
    backend: str
    timeout_s: float


def _serve(pipe: Connection, threads: int, parent: int) -> None:
    """Execute jobs until the pipe closes; where the parent was ended with no time to clean up, do it for it."""
    folders: set[str] = set()

    def clean_up() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        clean_up()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            clean_up()  # whoever is later, the parent or this, finds nothing
            return
        folders.add(os.path.dirname(job.rendezvous))
        try:
            pipe.send(("ok", _run(job)))
        except BaseException as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _run(job: _Job) -> Any:
    import torch
    import torch.distributed as dist

    from simllm.validation.execution.execute import execute
    from simllm.validation.execution.memory_log import ignore_present_threads

    ignore_present_threads()
    device = "cuda" if job.backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(job.rank)
    store = dist.FileStore(job.rendezvous, job.world)  # type: ignore[attr-defined]
    dist.init_process_group(
        job.backend, store=store, rank=job.rank, world_size=job.world, timeout=timedelta(seconds=job.timeout_s)
    )
    try:
        return execute(job.case, device) if isinstance(job.case, Case) else job.case.execute()
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        gc.collect()  # meshes are in cycles, and with the last one its groups and their threads go


class Pool:
    """Up to ``ranks`` processes on this machine.

    Parameters
    ----------
    ranks : int
    backend : {"gloo", "nccl"}
    timeout_s : float
        Of one case, the start of the processes included.
    threads : int
        CPU threads of each process.
    """

    def __init__(self, ranks: int, backend: str = "gloo", timeout_s: float = 300.0, threads: int = 1) -> None:
        self.backend, self.timeout_s = backend, timeout_s
        self._folder = ""
        self._cases = 0
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, threads, os.getpid()), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [process.pid for process in self._processes]

    def run(self, case: Case | OwnCase) -> list[Any]:
        """Execute a case on its ranks; the records, by rank.

        Raises
        ------
        ExecutionError
            A rank failed, died or did not answer in time; the pool is closed then.
        """
        world = case.plan.num_gpus
        if world > len(self._pipes):
            raise ExecutionError(f"the plan has {world} ranks, but only {len(self._pipes)} were started")
        self._folder = self._folder or tempfile.mkdtemp(prefix="simllm-ranks-")
        self._cases += 1
        rendezvous = os.path.join(self._folder, f"case-{self._cases}")
        for rank, pipe in enumerate(self._pipes[:world]):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead already: said below
                pipe.send(_Job(case, rank, world, rendezvous, self.backend, self.timeout_s))
        try:
            return self._collect(world)
        except BaseException:
            self.close()
            raise

    def _collect(self, world: int) -> list[Any]:
        records: dict[int, Any] = {}
        failures: dict[int, tuple[str, str]] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(records) < world:
            open_ranks = [rank for rank in range(world) if rank not in records and rank not in failures]
            sources: list[Any] = [self._pipes[rank] for rank in open_ranks]
            sources += [self._processes[rank].sentinel for rank in open_ranks]
            ready = wait(sources, max(0.0, deadline - time.monotonic()))
            if not ready:
                if failures:
                    break
                late = ", ".join(map(str, open_ranks))
                raise ExecutionError(
                    f"rank {late} did not answer within {self.timeout_s:g} s; all ranks were stopped. "
                    "Give more time with --timeout, or a smaller case"
                )
            for rank in open_ranks:
                if self._pipes[rank] in ready:
                    self._receive(rank, records, failures)
                elif self._processes[rank].sentinel in ready and not self._pipes[rank].poll():
                    code = self._processes[rank].exitcode
                    raise ExecutionError(f"rank {rank} died ({_died(code)}); all ranks were stopped")
            if failures:
                # What fails first is the cause; the others only miss it. Give the cause a moment to arrive.
                deadline = min(deadline, time.monotonic() + 1.0)
                if len(failures) + len(records) == world:
                    break
        if failures:
            raise ExecutionError(_cause(failures))
        return [records[rank] for rank in range(world)]

    def _receive(self, rank: int, records: dict[int, Any], failures: dict[int, tuple[str, str]]) -> None:
        try:
            answer = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(_GRACE_S)
            code = self._processes[rank].exitcode
            raise ExecutionError(f"rank {rank} died ({_died(code)}); all ranks were stopped") from None
        if answer[0] == "ok":
            records[rank] = answer[1]
        else:
            failures[rank] = answer[1:]

    def close(self) -> None:
        """End every process and remove the files."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _died(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def _cause(failures: dict[int, tuple[str, str]]) -> str:
    """The failure that is not just a lost connection to another rank."""
    lost = ("Connection closed", "Connection reset", "Timed out", "connection closed")
    ranked = sorted(failures.items(), key=lambda item: any(word in item[1][0] for word in lost))
    rank, (message, _) = ranked[0]
    where = [line.strip() for line in ranked[0][1][1].splitlines() if line.strip().startswith("File")]
    return f"rank {rank} failed: {message} ({where[-1] if where else 'nowhere'})"
