"""Alignment: supervised fine-tuning, reward model, PPO, DPO and ORPO as the passes they are made of.

Every pass is an estimate of a model of its own on the same plan: the trained policy, the same model frozen as
reference, a model with a value head. A step is the sum of its passes, memory what all models keep and the largest that
one pass adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from simllm.errors import InputError, unknown_name
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.finetuning import Method
from simllm.models.finetuning.alignment import Frozen, ValueHead
from simllm.parallel.plan import Plan
from simllm.training.estimate import Estimate, estimate
from simllm.training.generation import Generation, generate
from simllm.training.run import Training

__all__ = ["TASKS", "Alignment", "Pass", "align"]

#: Task -> what one step is made of.
TASKS: Final[Mapping[str, str]] = {
    "sft": "one sequence through the policy, forward and backward",
    "reward": "a chosen and a rejected answer through the reward model (Ouyang 2022, arXiv:2203.02155, equation 1)",
    "dpo": "both answers through the policy, and forward through the reference (Rafailov 2023, arXiv:2305.18290)",
    "orpo": "both answers through the policy, no reference (Hong 2024, arXiv:2403.07691)",
    "ppo": "responses are generated, scored by reference, reward and value model, and trained on by policy and value "
    "model (Ouyang 2022, arXiv:2203.02155)",
}
#: Memory that a model keeps between its passes; the rest belongs to the pass at work.
_KEPT = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of a step.

    Attributes
    ----------
    name, role : str
        What is done, and which model does it.
    time_s : float
    transient_bytes : float
        Memory that only this pass needs on a GPU: activations, workspaces, gathered parameters, caches.
    """

    name: str
    role: str
    time_s: float
    transient_bytes: float


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A step of an alignment task.

    Attributes
    ----------
    task : str
    plan : Plan
        Of every model; its batch counts sequences of the policy, two for a pair of answers.
    placement : {"together", "apart"}
        All models on the same GPUs one after the other, or each on as many GPUs of its own.
    passes : tuple of Pass
    kept_bytes : dict of str to float
        Role -> bytes of parameters, gradients and optimizer states on a GPU.
    context_bytes, capacity_bytes, usable_bytes : float
        Outside the allocator, of the device, and of the device less head-room.
    tokens_per_step : int
        Tokens of the sequences that the policy is trained on.
    gpus : int
        All models together.
    """

    task: str
    plan: Plan
    placement: str
    passes: tuple[Pass, ...]
    kept_bytes: dict[str, float]
    context_bytes: float
    capacity_bytes: float
    usable_bytes: float
    tokens_per_step: int
    gpus: int
    generation: Generation | None = field(default=None)

    @property
    def step_time_s(self) -> float:
        """Seconds of a step: apart, passes of different models that wait for nothing of each other run side by side."""
        if self.placement == "together":
            return sum(one.time_s for one in self.passes)
        stages: dict[str, float] = {}
        for one in self.passes:
            stages[one.name] = max(stages.get(one.name, 0.0), one.time_s)
        return sum(stages.values())

    @property
    def peak_memory_by_role(self) -> dict[str, float]:
        """Bytes at the peak of a GPU of each role; together all roles share one GPU."""
        if self.placement == "together":
            transient = max(one.transient_bytes for one in self.passes)
            return {"all": sum(self.kept_bytes.values()) + transient + self.context_bytes}
        return {
            role: kept + max(one.transient_bytes for one in self.passes if one.role == role) + self.context_bytes
            for role, kept in self.kept_bytes.items()
        }

    @property
    def peak_memory_bytes(self) -> float:
        """Bytes at the peak of the GPU that needs most."""
        return max(self.peak_memory_by_role.values())

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the head-room free."""
        return self.peak_memory_bytes <= self.usable_bytes

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens of trained sequences over time and all GPUs."""
        return self.tokens_per_step / self.step_time_s / self.gpus

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        from simllm.training.estimate import plan_dict

        return {
            "task": self.task,
            "placement": self.placement,
            "gpus": self.gpus,
            "plan": plan_dict(self.plan),
            "step_time_s": self.step_time_s,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "fits": self.fits,
            "passes": [asdict(one) for one in self.passes],
            "memory": {
                "peak_bytes": self.peak_memory_bytes,
                "capacity_bytes": self.capacity_bytes,
                "by_role": self.peak_memory_by_role,
                "kept_by_role": dict(self.kept_bytes),
            },
            "generation": asdict(self.generation) if self.generation else None,
        }


def align(
    task: str,
    model: Model,
    cluster: Cluster,
    plan: Plan,
    training: Training,
    *,
    method: Method | None = None,
    judge: Model | None = None,
    prompt_len: int = 0,
    placement: Literal["together", "apart"] = "together",
    epochs: int = 1,
) -> Alignment:
    """One step of an alignment task.

    Parameters
    ----------
    task : str
        A name of `TASKS`.
    model : Model
        The policy, not yet fine-tuned.
    cluster : Cluster
    plan : Plan
        For every model; ``micro_batch_size`` and ``global_batch_size`` count prompts, of which a pair is two sequences.
    training : Training
        ``seq_len`` is that of a prompt with its answer.
    method : Method, optional
        How policy and value model are trained; None: all parameters. A frozen reference is the policy without its
        adapters, and then needs no memory of its own.
    judge : Model, optional
        What reward and value model are made of; None: the policy's model.
    prompt_len : int
        PPO: tokens of a prompt; the rest of the sequence is generated. 0: half.
    placement : {"together", "apart"}
        PPO: all four models on the same GPUs, or each on ``cluster`` of its own.
    epochs : int
        PPO: times that a batch of responses is trained on.

    Raises
    ------
    InputError

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training
    >>> where, one = Cluster.load("dgx-h100", 8), Plan(dp=8, zero="3", global_batch_size=8)
    >>> run = Training(seq_len=1024)
    >>> dpo = align("dpo", Model.load("llama-2-7b"), where, one, run)
    >>> [one.role for one in dpo.passes], dpo.fits
    (['reference', 'policy'], True)
    """
    if task not in TASKS:
        raise unknown_name("alignment task", task, TASKS)
    if placement not in ("together", "apart"):
        raise unknown_name("placement", placement, ("together", "apart"))
    if placement == "apart" and task != "ppo":
        raise InputError(f"placement=apart is for ppo; the models of {task} share their GPUs")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs={epochs} must be a whole number above zero")
    if model.spec.architecture not in ("causal-decoder", "prefix-decoder"):
        raise InputError(f"alignment is modelled for decoders, and {model.name} is an {model.spec.architecture}")
    prompt = prompt_len or training.seq_len // 2
    if not 0 < prompt < training.seq_len:
        raise InputError(f"prompt_len={prompt_len} must be from 1 to {training.seq_len - 1}, below seq_len")
    pair = task in ("reward", "dpo", "orpo")
    if pair:
        plan = replace(plan, micro_batch_size=2 * plan.micro_batch_size, global_batch_size=2 * plan.global_batch_size)

    def ask(role: Model) -> Estimate:
        return estimate(role, cluster, plan, training)

    policy = model.finetuned(method) if method else model
    reference = model.finetuned(Frozen())
    judged = judge or model
    roles: dict[str, Estimate]
    generation = None
    if task == "reward":
        roles = {"reward": ask(judged.finetuned(ValueHead(inner=method)))}
        order = [("train", "reward", 1)]
    elif task in ("sft", "orpo"):
        roles, order = {"policy": ask(policy)}, [("train", "policy", 1)]
    elif task == "dpo":
        roles = {"reference": ask(reference), "policy": ask(policy)}
        order = [("score", "reference", 1), ("train", "policy", 1)]
    else:
        roles = {
            "policy": ask(policy),
            "reference": ask(reference),
            "reward": ask(judged.finetuned(ValueHead(inner=Frozen()))),
            "value": ask(judged.finetuned(ValueHead(inner=method))),
        }
        order = [("score", "policy", 0), ("score", "reference", 1), ("score", "reward", 1), ("score", "value", 0)]
        order += [("train", "policy", epochs), ("train", "value", epochs)]
        generation = generate(
            policy,
            cluster,
            plan,
            training,
            batch=plan.global_batch_size // plan.dp,
            prompt_len=prompt,
            response_len=training.seq_len - prompt,
        )
    shared = method is not None and _leaves_base(policy)
    kept = {
        # Beside adapters the frozen base is there already.
        role: 0.0 if shared and placement == "together" and role == "reference" else _kept(answer)
        for role, answer in roles.items()
    }
    passes = []
    if generation is not None:
        transient = generation.cache_bytes + generation.weight_bytes
        passes.append(Pass(name="generate", role="policy", time_s=generation.total_s, transient_bytes=transient))
    for name, role, times in order:
        answer = roles[role]
        if times == 0:
            # A trained model that is only asked: its frozen twin's forward pass.
            twin = reference if role == "policy" else judged.finetuned(ValueHead(inner=Frozen()))
            answer, times = ask(twin), 1
        passes.append(Pass(name=name, role=role, time_s=times * answer.step_time_s, transient_bytes=_transient(answer)))
    one = next(iter(roles.values()))
    return Alignment(
        task=task,
        plan=plan,
        placement=placement,
        passes=tuple(passes),
        kept_bytes=kept,
        context_bytes=one.peak_stage.by_kind["context"],
        capacity_bytes=cluster.accelerator.memory_bytes,
        usable_bytes=one.usable_memory_bytes,
        tokens_per_step=plan.global_batch_size * training.seq_len,
        gpus=plan.num_gpus * (len(roles) if placement == "apart" else 1),
        generation=generation,
    )


def _leaves_base(model: Model) -> bool:
    """Whether the model under its method still holds its own weights unchanged."""
    base = {weight.component for part, _ in model.graph.parts for weight in part.weights if weight.trained}
    return base <= {"adapter", "prompt"}


def _kept(answer: Estimate) -> float:
    return sum(answer.peak_stage.by_kind[kind] for kind in _KEPT)


def _transient(answer: Estimate) -> float:
    kinds = answer.peak_stage.by_kind
    return sum(size for kind, size in kinds.items() if kind not in _KEPT and kind != "context")
