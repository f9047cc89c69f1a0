"""The ways to execute a case: on processes of this machine, under torchrun, or one process for a whole cluster."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from simllm.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from simllm.models.spec import ModelSpec
    from simllm.parallel.plan import Plan
    from simllm.validation.execution.case import Case
    from simllm.validation.execution.compare import Comparison

__all__ = ["execute_case", "execute_fake", "execute_under_torchrun", "make_case"]


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError('executing a plan needs PyTorch; install it with: pip install "simllm[validate]"')


def make_case(
    spec: ModelSpec,
    plan: Plan,
    seq_len: int,
    *,
    offload: bool = False,
    unfused: bool = False,
    timed_steps: int = 0,
) -> Case:
    """A case that was checked: the plan fits the model, and PyTorch can execute it.

    Raises
    ------
    InputError
        torch is missing, the plan does not fit the model, or something in it is not executed (`UnsupportedError`).
    """
    _need_torch()
    from simllm.validation.execution.case import Case
    from simllm.validation.execution.reference import check_spec

    case = Case(spec=spec, plan=plan, seq_len=seq_len, offload=offload, unfused=unfused, timed_steps=timed_steps)
    check_spec(case.spec)
    case.check()
    return case


def execute_case(case: Case, backend: str = "gloo", timeout_s: float = 300.0) -> Comparison:
    """Execute a case on processes of this machine and compare.

    Parameters
    ----------
    case : Case
    backend : {"gloo", "nccl"}
    timeout_s : float
        After which a rank that does not answer counts as hung.

    Raises
    ------
    ExecutionError
        A rank failed, died or hung; none is left behind.
    """
    from simllm.validation.execution.compare import compare
    from simllm.validation.execution.pool import Pool

    check_backend(backend, case.plan.num_gpus)
    with Pool(case.plan.num_gpus, backend, timeout_s) as pool:
        return compare(case, pool.run(case), backend)


def device_of(backend: str) -> str:
    """The type of device that a backend moves tensors of."""
    return "cuda" if backend == "nccl" else "cpu"


def check_backend(backend: str, ranks: int) -> None:
    """Refuse NCCL where there are not as many GPUs as ranks."""
    if backend != "nccl":
        return
    import torch

    there = torch.cuda.device_count()
    if there < ranks:
        raise UnsupportedError(f"--backend=nccl needs a GPU for each of the {ranks} ranks, but there are {there}")


def execute_under_torchrun(case: Case, backend: str = "gloo", timeout_s: float = 300.0) -> Comparison | None:
    """Execute a case as one of torchrun's processes; the comparison on rank 0, None on the others."""
    import torch.distributed as dist

    from simllm.validation.execution.compare import compare
    from simllm.validation.execution.execute import execute

    world = int(os.environ["WORLD_SIZE"])
    if world != case.plan.num_gpus:
        raise InputError(f"torchrun started {world} ranks, but the plan has {case.plan.num_gpus}")
    device = device_of(backend)
    if device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        record = execute(case, device)
        records: list[object] | None = [None] * world if dist.get_rank() == 0 else None
        dist.gather_object(record, records)
    finally:
        dist.destroy_process_group()
    return None if records is None else compare(case, records, backend)  # type: ignore[arg-type]


def execute_fake(case: Case) -> Comparison:
    """Execute a case in full size as one rank of the outer pipeline stages, on fake tensors, and compare.

    Every collective is issued and none is sent; tensors have shapes and no memory. The first and the last stage are
    executed: the others have layers only, fewer micro-batches in flight than the first, and no loss.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from simllm.validation.execution.compare import compare
    from simllm.validation.execution.fake import execute_stage

    stages = sorted({0, case.plan.pp - 1})
    # A process for each: PyTorch remembers the groups of a cluster for as long as a process lives.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, len(stages)), mp_context=context, max_tasks_per_child=1) as pool:
        return compare(case, pool.map(execute_stage, [case] * len(stages), stages), "fake")
