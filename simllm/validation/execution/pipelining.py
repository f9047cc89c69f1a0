"""A pipeline rank's stages and its schedule, by PyTorch's public classes; what they do is noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from simllm.parallel.schedules import Action
from simllm.validation.execution.case import Case

__all__ = ["make_schedule", "make_stages"]

#: PyTorch's class of each schedule.
SCHEDULE_CLASSES: dict[str, str] = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped-bfs": "ScheduleLoopedBFS",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}


def make_stages(
    case: Case, modules: Sequence[nn.Module], pp_rank: int, group: Any, device: str, actions: list[Action]
) -> list[PipelineStage]:
    """The stages of a pipeline rank, one for each model chunk; ``actions`` gets what they do."""
    number = case.plan.pp * case.plan.vpp
    stages = []
    for chunk, (index, module) in enumerate(zip(case.stages(pp_rank), modules, strict=True)):
        arguments = _arguments(case, index, number)
        stage = PipelineStage(module, index, number, torch.device(device), group=group, **arguments)
        _note_actions(stage, chunk, actions)
        stages.append(stage)
    return stages


def make_schedule(case: Case, stages: Sequence[PipelineStage]) -> Any:
    """PyTorch's schedule of a plan."""
    kind = getattr(schedules, SCHEDULE_CLASSES[case.plan.schedule])
    several = issubclass(kind, schedules.PipelineScheduleMulti)
    m = case.plan.num_micro_batches
    # Scaled is the loss: gradients of a table that two stages of a rank share would be scaled twice.
    return kind(
        list(stages) if several else stages[0],
        n_microbatches=m,
        loss_fn=lambda loss, _: loss / m,
        scale_grads=False,
    )


def _arguments(case: Case, index: int, number: int) -> dict[str, Any]:
    """Example tensors, so that stages do not have to ask each other for shapes."""
    plan = case.plan
    tokens = case.seq_len // (plan.tp if plan.sequence_parallel else 1)
    dtype = torch.float32 if plan.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        stream = torch.empty(plan.micro_batch_size, tokens, case.spec.hidden_size, dtype=dtype).requires_grad_()
        ids = torch.empty(plan.micro_batch_size, case.seq_len, dtype=torch.int64)
        return {
            "input_args": (ids if index == 0 else stream,),
            "output_args": (torch.empty(()) if index == number - 1 else stream,),
        }


def _note_actions(stage: Any, chunk: int, actions: list[Action]) -> None:
    forward, backward, weights = stage.forward_one_chunk, stage.backward_one_chunk, stage.backward_weight_one_chunk

    def note_forward(micro_batch: int, *args: Any, **kwargs: Any) -> Any:
        actions.append(Action("F", chunk, micro_batch))
        return forward(micro_batch, *args, **kwargs)

    def note_backward(micro_batch: int, *args: Any, **kwargs: Any) -> Any:
        actions.append(Action("B" if kwargs.get("full_backward", True) else "I", chunk, micro_batch))
        return backward(micro_batch, *args, **kwargs)

    def note_weights(micro_batch: int, *args: Any, **kwargs: Any) -> Any:
        actions.append(Action("W", chunk, micro_batch))
        return weights(micro_batch, *args, **kwargs)

    stage.forward_one_chunk, stage.backward_one_chunk = note_forward, note_backward
    stage.backward_weight_one_chunk = note_weights
