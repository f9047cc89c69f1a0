"""One process for a rank of any cluster: PyTorch's fake process group and fake tensors.

The same code as on a real process group: meshes, parallelisation, pipeline schedule, optimizer. Tensors have shapes and
storages without memory, collectives return at once. What is recorded is the same, losses and gradients apart.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simllm.validation.execution.case import Case
from simllm.validation.execution.runner import Record, Runner

__all__ = ["execute_stage"]


def execute_stage(case: Case, stage: int) -> Record:
    """Two steps of the first rank of a pipeline stage, the second one recorded.

    Parameters
    ----------
    case : Case
    stage : int
        Pipeline rank.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    plan = case.plan
    rank = stage * plan.tp * plan.dp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.num_gpus)
    try:
        # Meshes, FSDP and tensor parallelism ask for real numbers: they are set up before tensors turn fake.
        runner = Runner(case, "cpu")
        runner.build(None)
        with FakeTensorMode(allow_non_fake_inputs=True), _without_metadata_exchange():
            for part in runner.parts:
                _give_storage(part)
            runner.connect()
            # Distributed tensors work out their shapes once, on tensors of global shape that are not this rank's work.
            runner.step()
            record = runner.record()
        record.resident_bytes = _resident_bytes()
        return record
    finally:
        dist.destroy_process_group()


def _resident_bytes() -> int:
    """Most memory of this process so far; a parent's before it was started does not count, as it does in getrusage."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _give_storage(part: nn.Module) -> None:
    """Fake storage for parameters that were made on the meta device; tied ones stay tied."""
    part.to_empty(device="cpu")


@contextmanager
def _without_metadata_exchange() -> Iterator[None]:
    """Stages are told the shapes they exchange; asking each other for them would need real numbers."""
    from torch.distributed.pipelining import schedules, stage

    static = vars(stage)["InferenceMode"].STATIC

    base: Any = schedules._PipelineSchedule
    original = base._warmup_p2p

    def known(self: Any, *args: Any, **kwargs: Any) -> Any:
        for one in getattr(self, "_stages", None) or [self._stage]:
            one._inference_mode = static

    base._warmup_p2p = known
    try:
        yield
    finally:
        base._warmup_p2p = original
