"""`estimate`: the whole library in one call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.kernels.profile import load_form
from simllm.models import Model
from simllm.models.conventions import FLOP_CONVENTIONS, training_flops
from simllm.models.routing import ExpertLoad, expert_load
from simllm.models.spec import MoESpec
from simllm.parallel.memory import StageMemory
from simllm.parallel.plan import Plan, check_plan, check_virtual_tokens
from simllm.parallel.stages import stage_weights
from simllm.parallel.states import StateTerm, optimizer_named, state_terms
from simllm.training.offload import HostMemory, host_memory
from simllm.training.run import Training, check_experts
from simllm.training.setup import setup_dict
from simllm.training.step import Step, StepTime
from simllm.training.traffic import GroupTraffic, communication
from simllm.training.uncertainty import peak_memory_interval, step_time_interval

__all__ = ["Estimate", "estimate", "plan_dict"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """Time and memory of one plan. The parts add up to the totals.

    Attributes
    ----------
    model, cluster, plan, training
        The question.
    step_time_s : float
        Seconds of one optimizer step.
    time : StepTime
        The same by cause.
    stages : tuple of StageMemory
        Peak memory of every pipeline rank.
    notes : tuple of str
        What whoever asked assumed; part of the assumptions.
    """

    model: Model
    cluster: Cluster
    plan: Plan
    training: Training
    time: StepTime
    stages: tuple[StageMemory, ...]
    notes: tuple[str, ...] = ()

    @property
    def step_time_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.time.total_s

    @cached_property
    def peak_stage(self) -> StageMemory:
        """The pipeline rank that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def peak_memory_bytes(self) -> float:
        """Bytes at the peak of the rank that needs most."""
        return self.peak_stage.peak_bytes

    @property
    def usable_memory_bytes(self) -> float:
        """Device memory less the head-room."""
        return self.cluster.accelerator.memory_bytes * (1 - self.training.memory_headroom)

    @cached_property
    def host_memory(self) -> HostMemory | None:
        """What the fullest node keeps on its host; None where nothing is offloaded."""
        return host_memory(self._step, self.stages) if self.plan.offload.anything else None

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the head-room free on every rank, and the host holds what is offloaded."""
        return self.peak_memory_bytes <= self.usable_memory_bytes and (
            self.host_memory is None or self.host_memory.fits
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step (of the decoder)."""
        return self.plan.global_batch_size * self.training.seq_len

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Training throughput of one GPU."""
        return self.tokens_per_step / self.step_time_s / self.plan.num_gpus

    @cached_property
    def _step(self) -> Step:
        return Step(self.model, self.cluster, self.plan, self.training)

    @property
    def hsdp_shard(self) -> int:
        """Ranks of an HSDP group, those of the scale-up domain where the plan leaves it open; 0 without groups."""
        return self._step.hsdp_shard if self.plan.zero == "hsdp" else self.plan.hsdp_shard

    @cached_property
    def peak_flops(self) -> float:
        """Dense peak of the plan's precision on one GPU, FLOP/s."""
        return self.cluster.accelerator.peak_flops[load_form().precisions[self.plan.precision].peak]

    def model_flops(self, convention: str) -> float:
        """FLOPs of a step as a convention counts them (`simllm.models.conventions`)."""
        per_sequence = training_flops(self.model, self.training.seq_len, convention, self.plan.recompute)
        return per_sequence * self.plan.global_batch_size

    def utilisation(self, flops: float) -> float:
        """So many FLOPs a step over the time and the peak of all GPUs."""
        return flops / self.step_time_s / self.plan.num_gpus / self.peak_flops

    @property
    def model_tflops_per_gpu(self) -> float:
        """TFLOP/s per GPU in the training's convention."""
        return self.model_flops(self.training.flop_convention) / self.step_time_s / self.plan.num_gpus / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation in the training's convention (arXiv:2204.02311, appendix B)."""
        return self.utilisation(self.model_flops(self.training.flop_convention))

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: what really runs, full attention (arXiv:2205.05198, section 6.3)."""
        return self.utilisation(self.model_flops("full-attention") + self._step.recompute_flops())

    @property
    def step_time_interval_s(self) -> tuple[float, float]:
        """Eight of ten published runs of this kind lie inside, by the errors seen in validation."""
        return step_time_interval(self.step_time_s, self.cluster.accelerator)

    @property
    def peak_memory_interval_bytes(self) -> tuple[float, float]:
        """Eight of ten published peaks lie inside, by the errors seen in validation."""
        return peak_memory_interval(self.peak_memory_bytes)

    @cached_property
    def assumptions(self) -> tuple[str, ...]:
        """What stands in for something not known."""
        spec, notes = self.model.spec, [*self.notes, *self.model.spec.notes]
        notes += self._step.engine.assumptions
        if spec.architecture == "prefix-decoder":
            notes.append(f"half of each sequence ({self._step.prefix_len} tokens) is bidirectional prefix")
        if self.experts is not None:
            notes += _about_experts(self.experts, self.training, self.plan.ep)
        notes.append(f"software: {self.training.software.description}")
        return tuple(notes)

    @cached_property
    def experts(self) -> ExpertLoad | None:
        """What becomes of the rows that a rank's tokens ask of the experts of a layer; None without experts."""
        moe = next((b.mlp for b in self.model.spec.decoder.layers if isinstance(b.mlp, MoESpec)), None)
        if moe is None:
            return None
        plan, layout = self.plan, self._step.layout
        tokens = layout.batch * layout.seq_len // plan.cp // (plan.tp if plan.sequence_parallel else 1)
        return expert_load(layout.routing, tokens, moe.num_experts_per_tok, moe.num_experts, plan.ep, plan.etp)

    @cached_property
    def communication(self) -> tuple[GroupTraffic, ...]:
        """What each group exchanges in a step on the busiest rank."""
        return communication(self._step, self.time.busiest_stage)

    @cached_property
    def state_terms(self) -> tuple[StateTerm, ...]:
        """What is kept per parameter before sharding, and why."""
        step, stage = self._step, self._step.stages[self.peak_stage.rank]
        weights = sum(stage_weights(stage, step.layout, self.plan.pp))
        optimizer = optimizer_named(self.training.optimizer)
        moments = sum(step.moments(stage)) / weights if weights else 0.0
        return state_terms(self.training.software, step.states, optimizer, moments)

    def training_time_s(self, tokens: float) -> float:
        """Seconds to train on so many tokens without interruption."""
        return tokens / self.tokens_per_step * self.step_time_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        low, high = self.step_time_interval_s
        peak = self.peak_stage
        return {
            "model": self.model.name,
            "cluster": self.cluster.name,
            "gpus": self.plan.num_gpus,
            "plan": plan_dict(self.plan),
            "setup": setup_dict(self),
            "seq_len": self.training.seq_len,
            "stack": self.training.software.name,
            "step_time_s": self.step_time_s,
            "step_time_interval_s": [low, high],
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "model_tflops_per_gpu": self.model_tflops_per_gpu,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "flop_convention": self.training.flop_convention,
            "mfu_by_convention": {name: self.utilisation(self.model_flops(name)) for name in FLOP_CONVENTIONS},
            "fits": self.fits,
            "memory": {
                "peak_bytes": self.peak_memory_bytes,
                "peak_interval_bytes": list(self.peak_memory_interval_bytes),
                "capacity_bytes": self.cluster.accelerator.memory_bytes,
                "usable_bytes": self.usable_memory_bytes,
                "by_kind": dict(peak.by_kind),
                "views": peak.views,
                "host": None if self.host_memory is None else self.host_memory.to_dict(),
                "states": [asdict(term) for term in self.state_terms],
                "per_stage": [
                    {
                        "stage": stage.rank,
                        "peak_bytes": stage.peak_bytes,
                        "by_kind": dict(stage.by_kind),
                        "host": dict(stage.host),
                        "micro_batches_in_flight": stage.in_flight,
                        "peak_moment": stage.moment,
                    }
                    for stage in self.stages
                ],
            },
            "time": {"by_cause": dict(self.time.by_cause), "busiest_stage": self.time.busiest_stage},
            "experts": None if self.experts is None else self.experts.to_dict(),
            "communication": [asdict(traffic) for traffic in self.communication],
            "assumptions": list(self.assumptions),
        }


def _about_experts(load: ExpertLoad, training: Training, ep: int) -> list[str]:
    """What is assumed of the router, in words."""
    notes = []
    if load.imbalance > 1:
        why = ", as chance gives it" if training.expert_imbalance == "random" else ""
        notes.append(f"the busiest of {ep} expert-parallel ranks gets {load.imbalance:.4g} times the mean{why}")
    elif ep > 1:
        notes.append("tokens are spread evenly over the experts, as benchmarks force it")
    if load.capacity is not None:
        notes.append(
            f"an expert takes {load.capacity:,} rows of each rank's tokens, padded up to it: {load.dropped_share:.1%} "
            f"of the rows are dropped, {load.padding_share:.1%} of those computed are padding"
        )
    return notes


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "tp": plan.tp,
        "pp": plan.pp,
        "vpp": plan.vpp,
        "cp": plan.cp,
        "cp_comm_type": plan.cp_comm_type,
        "cp_a2a": plan.cp_a2a,
        "ep": plan.ep,
        "etp": plan.etp,
        "dp": plan.dp,
        "zero": plan.zero,
        "hsdp_shard": plan.hsdp_shard,
        "sequence_parallel": plan.sequence_parallel,
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "recompute": str(plan.recompute),
        "precision": plan.precision,
        "schedule": plan.schedule,
        "uneven_layers": plan.uneven_layers,
        "offload": str(plan.offload),
    }


def estimate(model: Model, cluster: Cluster, plan: Plan, training: Training, *, simulate: bool = False) -> Estimate:
    """Time and memory of one optimizer step.

    Parameters
    ----------
    model : Model
    cluster : Cluster
    plan : Plan
        Its degrees multiply to the cluster's GPUs.
    training : Training
    simulate : bool
        Run the pipeline event by event also where its schedule has a closed form: exact for uneven stages. Schedules
        without a closed form are always run.

    Returns
    -------
    Estimate

    Raises
    ------
    InputError
        The plan does not fit the model or the cluster.

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training
    >>> plan = Plan(tp=8, dp=1, global_batch_size=8, sequence_parallel=True)
    >>> answer = estimate(Model.load("llama-2-7b"), Cluster.load("dgx-h100", 8), plan, Training(seq_len=4096))
    >>> answer.fits, abs(sum(answer.time.by_cause.values()) - answer.step_time_s) < 1e-12
    (True, True)
    """
    if plan.num_gpus != cluster.num_gpus:
        raise InputError(
            f"tp={plan.tp} x pp={plan.pp} x cp={plan.cp} x dp={plan.dp} = {plan.num_gpus} GPUs, "
            f"but the cluster has {cluster.num_gpus}; the degrees must multiply to it"
        )
    check_plan(model, plan, training.seq_len + model.graph.virtual_tokens)
    check_virtual_tokens(model, training.seq_len)
    check_experts(model, training)
    step = Step(model, cluster, plan, training)
    return Estimate(
        model=model,
        cluster=cluster,
        plan=plan,
        training=training,
        time=step.time(simulate),
        stages=step.memory(simulate),
    )
