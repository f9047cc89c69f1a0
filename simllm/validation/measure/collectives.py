"""Collectives between ranks on this machine: every rank a process, gloo between processors and NCCL between GPUs."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from simllm.errors import InputError
from simllm.network import OPERATIONS

__all__ = ["COLUMNS", "SIZES", "measure_collectives", "points"]

#: Columns of tables of collectives, and what only a measurement of one's own has.
COLUMNS = [
    "sweep",
    "source",
    "system",
    "gpu",
    "n_nodes",
    "n_gpus",
    "collective",
    "message_bytes",
    "time_us",
    "library",
    "key",
    "spread",
    "date",
]
#: Message sizes as nccl-tests prints them.
SIZES = tuple(4**n for n in range(5, 13))
#: Calls timed for one point, and the largest number of bytes that all of them send.
_CALLS, _MOST_BYTES = 20, 1 << 28


def measure_collectives(
    kind: str,
    ranks: int,
    threads: int,
    points: Sequence[tuple[str, int]],
    timeout_s: float,
    arrived: Callable[[str, int, float], None],
) -> None:
    """Time collectives between local ranks and hand each point on when it is known.

    Parameters
    ----------
    kind : str
        ``cpu`` (gloo) or ``cuda`` (NCCL, one GPU a rank).
    ranks, threads : int
        Processes, and threads of each on the processor.
    points : sequence of (str, int)
        Operation and size in bytes, as nccl-tests prints it.
    timeout_s : float
        After so long without a new point the ranks are ended.
    arrived : callable
        Called with operation, bytes and seconds.

    Raises
    ------
    InputError
        A rank failed or hung; none is left behind.
    """
    if not points:
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(
                target=_rank, args=(kind, rank, ranks, threads, store, tuple(points), timeout_s, queue), daemon=True
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            _collect(processes, queue, len(points), timeout_s, arrived)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _collect(
    processes: Sequence[Any], queue: Any, number: int, timeout_s: float, arrived: Callable[[str, int, float], None]
) -> None:
    last = time.monotonic()
    while number:
        if not queue.empty():
            message = queue.get()
            if isinstance(message, str):
                raise InputError(f"a rank failed: {message}")
            arrived(*message)
            number, last = number - 1, time.monotonic()
            continue
        dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        if dead:
            raise InputError(
                f"a rank ended with status {dead[0]} before it had measured; run again for what is missing"
            )
        if time.monotonic() - last > timeout_s:
            raise InputError(f"no rank has answered for {timeout_s:g} s; all were ended; run again for what is missing")
        time.sleep(0.01)


def _rank(
    kind: str,
    rank: int,
    ranks: int,
    threads: int,
    store: str,
    points: Sequence[tuple[str, int]],
    timeout_s: float,
    queue: Any,
) -> None:
    """One rank: joins the others, times every point, and the first one reports."""
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(threads)
        if kind == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        for operation, size in points:
            seconds = _time_point(torch, dist, kind, operation, size, rank, ranks)
            if rank == 0:
                queue.put((operation, size, seconds))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        queue.put(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise SystemExit(1) from None


def _time_point(torch: Any, dist: Any, kind: str, operation: str, size: int, rank: int, ranks: int) -> float:
    """Seconds of one call: the least of some, each as long as its slowest rank."""
    call = _call(torch, dist, kind, operation, size, rank, ranks)
    calls = max(3, min(_CALLS, _MOST_BYTES // size))
    times = []
    for number in range(calls + 2):
        dist.barrier()
        start = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            times.append(time.perf_counter() - start)
    slowest = torch.tensor(times, dtype=torch.float64, device=kind)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.min())


def _call(torch: Any, dist: Any, kind: str, operation: str, size: int, rank: int, ranks: int) -> Callable[[], object]:
    count = max(ranks, size // 4 // ranks * ranks)
    whole = torch.ones(count, device=kind)
    part = torch.ones(count // ranks, device=kind)
    if operation == "send_recv":

        def exchange() -> None:
            # Every rank sends to the next one: a ring, as the ranks of a pipeline do.
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, whole, (rank + 1) % ranks),
                    dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
                ]
            )
            for work in works:
                work.wait()

        received = torch.empty_like(whole)
        return exchange
    if operation == "all_to_all":
        received = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(received, whole)
    # Newer versions of PyTorch have other names for both.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: scatter(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }
    return calls[operation]


def points(sizes: Sequence[int] = SIZES) -> list[tuple[str, int]]:
    """Every operation at every size."""
    return [(operation, size) for operation in OPERATIONS for size in sizes]
