"""The best plan of an alignment task: those of its policy, tried in order until everything fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.finetuning import Method
from simllm.planner.search import plan
from simllm.training import Training
from simllm.training.alignment import TASKS, Alignment, align

__all__ = ["AlignmentSearch", "plan_alignment"]

#: Plans of the policy that are tried; the passes of a task differ little in what they like.
_TRIED = 200
#: Of those that fit, how many are priced before the fastest is taken.
_PRICED = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentSearch:
    """What a search found.

    Attributes
    ----------
    best : Alignment or None
        The fastest of the plans that fit; None: nothing fits.
    nearest : Alignment or None
        When nothing fits: what needs least memory of what was tried.
    tried : int
    """

    best: Alignment | None
    nearest: Alignment | None
    tried: int

    @property
    def answer(self) -> Alignment | None:
        """The best plan, or the one nearest to fitting."""
        return self.best or self.nearest

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        document = self.answer.to_dict() if self.answer else {"fits": False}
        return document | {"tried": self.tried}


def plan_alignment(
    task: str,
    model: Model,
    cluster: Cluster,
    training: Training,
    *,
    global_batch_size: int = 64,
    method: Method | None = None,
    judge: Model | None = None,
    prompt_len: int = 0,
    placement: Literal["together", "apart"] = "together",
    epochs: int = 1,
    precision: str = "bf16",
) -> AlignmentSearch:
    """The fastest plan under which all models of a task fit; the arguments are those of `align`.

    Plans come from the search for the policy alone. PPO generates, which is modelled without pipeline and context
    parallelism.
    """
    if task not in TASKS:
        raise InputError(f"unknown alignment task {task!r}; known: {', '.join(TASKS)}")
    policy = model.finetuned(method) if method else model
    search = plan(policy, cluster, training, global_batch_size=global_batch_size, precision=precision, top=_TRIED)
    candidates = [answer.plan for answer in search.plans] or ([search.nearest.plan] if search.nearest else [])
    found: list[Alignment] = []
    nearest: Alignment | None = None
    tried = 0
    for candidate in candidates:
        if task == "ppo" and (candidate.pp > 1 or candidate.cp > 1):
            continue
        answer = align(
            task,
            model,
            cluster,
            candidate,
            training,
            method=method,
            judge=judge,
            prompt_len=prompt_len,
            placement=placement,
            epochs=epochs,
        )
        tried += 1
        if answer.fits:
            found.append(answer)
            if len(found) == _PRICED:
                break
        elif nearest is None or answer.peak_memory_bytes < nearest.peak_memory_bytes:
            nearest = answer
    best = min(found, key=lambda answer: answer.step_time_s) if found else None
    return AlignmentSearch(best=best, nearest=None if best else nearest, tried=tried)
