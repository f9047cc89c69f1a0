"""One execution: a model, a plan, and the few things that a plan does not say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from simllm.errors import InputError, UnsupportedError
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.models.graph import Implementation, Layout
from simllm.models.spec import AttentionSpec, ModelSpec, MoESpec
from simllm.parallel.plan import Plan, check_plan, split_layers
from simllm.parallel.schedules import stage_of
from simllm.parallel.states import StateBytes, state_bytes

__all__ = ["STACK", "Case", "Groups", "group_ranks"]

#: The software stack that describes what plain PyTorch does.
STACK: Final = "torch-eager"

_PRECISIONS = ("fp32", "bf16")
_SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped-bfs", "interleaved-zb", "zb-v", "dualpipe-v")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is executed.

    Attributes
    ----------
    spec : ModelSpec
        Dropout is left out: a parallel run must give the result of a single process.
    plan : Plan
        ``zero``: 0 DistributedDataParallel, 1 with ZeroRedundancyOptimizer, 2 and 3 FSDP2 that keeps or frees gathered
        layers between forward and backward, hsdp FSDP2 on a mesh of two dimensions.
    seq_len : int
        Of an encoder-decoder, of both sequences.
    offload : bool
        FSDP2's CPU offload.
    unfused : bool
        Attention as explicit products; always so where the fused kernel does not take the shape.
    timed_steps : int
        Steps timed without a recorder.
    """

    spec: ModelSpec
    plan: Plan
    seq_len: int
    offload: bool = False
    unfused: bool = False
    timed_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", replace(self.spec, hidden_dropout=0.0, attention_dropout=0.0))
        if self._needs_explicit_attention:
            object.__setattr__(self, "unfused", True)

    @property
    def _needs_explicit_attention(self) -> bool:
        """Latent heads of two widths, and a trained bias, fall out of the fused kernel of the CPU."""
        mixer = self.spec.decoder.layers[0].mixer
        if not isinstance(mixer, AttentionSpec):
            return False
        latent = mixer.latent
        uneven = latent is not None and latent.qk_nope_head_dim + latent.qk_rope_head_dim != latent.v_head_dim
        return uneven or mixer.position == "relative" or self.plan.recompute.kind == "selective"

    def check(self) -> None:
        """Refuse what the plan, the model or PyTorch on this backend cannot do.

        Raises
        ------
        InputError, UnsupportedError
        """
        plan, spec = self.plan, self.spec
        check_plan(Model(spec), plan, self.seq_len)
        moe = any(isinstance(block.mlp, MoESpec) for block in spec.decoder.layers)
        stacks = (spec.decoder, *([spec.encoder] if spec.encoder else []))
        if plan.precision not in _PRECISIONS:
            raise InputError(f"precision={plan.precision} is not executed; use {' or '.join(_PRECISIONS)}")
        if plan.precision == "bf16" and not (plan.shards_parameters or plan.zero == "2"):
            raise UnsupportedError("bf16 is executed through FSDP2's mixed precision; use zero=2, 3 or hsdp, or fp32")
        if plan.precision == "bf16" and plan.dp == 1:
            raise UnsupportedError("bf16 is executed through FSDP2's mixed precision, which needs dp above 1")
        if any(stack.positions and stack.positions < self.seq_len for stack in stacks):
            raise InputError(f"seq_len={self.seq_len} is longer than the {spec.decoder.positions} learned positions")
        splits = plan.pp > 1 and plan.pipeline.splits_backward
        refused = {
            f"{plan.num_micro_batches} micro-batches in {plan.pp} stages: PyTorch's 1F1B needs at least one for each": (
                plan.schedule == "1f1b" and plan.num_micro_batches < plan.pp
            ),
            f"schedule={plan.schedule}; executed are {', '.join(_SCHEDULES)}": (
                plan.pp > 1 and plan.schedule not in _SCHEDULES
            ),
            f"{plan.schedule} with DistributedDataParallel or FSDP2: their hooks wait for whole backward passes": (
                splits and plan.dp > 1 and (plan.tp == 1 or plan.zero != "0")
            ),
            f"{plan.schedule} with recomputation: PyTorch runs it again for both halves of a backward pass": (
                splits and plan.recompute.kind != "none"
            ),
            f"{plan.schedule} of a tied head with dp above 1": splits and plan.dp > 1 and self.spec.head.tied,
            "cp above 1: PyTorch has no context parallelism on this backend": plan.cp > 1,
            "etp above 1: experts are not split over tensor-parallel ranks": plan.etp > 1,
            "a pipeline of an encoder-decoder: PyTorch's stages pass on one tensor": plan.pp > 1 and bool(spec.encoder),
            "zero=1 with tp above 1: ZeroRedundancyOptimizer does not take distributed tensors": (
                plan.zero == "1" and plan.tp > 1 and plan.dp > 1
            ),
            "zero=1 with ep above 1: ZeroRedundancyOptimizer knows one group of ranks": (
                plan.zero == "1" and plan.ep > 1
            ),
            "hsdp with ep above 1": plan.zero == "hsdp" and plan.ep > 1,
            "offload without full sharding": self.offload and not plan.shards_parameters,
            "recompute=list": plan.recompute.kind == "list",
            "a QK-norm over all heads with tp above 1": plan.tp > 1
            and any(
                isinstance(block.mixer, AttentionSpec)
                and block.mixer.qk_norm is not None
                and not block.mixer.qk_norm_per_head
                for block in spec.decoder.layers
            ),
        }
        for what, there in refused.items():
            if there:
                raise UnsupportedError(f"not executed: {what}")
        if moe:
            self._check_routing()

    def _check_routing(self) -> None:
        tokens = self.seq_len // (self.plan.tp if self.plan.sequence_parallel else 1)
        for block in self.spec.decoder.layers:
            if isinstance(block.mlp, MoESpec) and tokens * block.mlp.num_experts_per_tok % block.mlp.num_experts:
                raise InputError(
                    f"{tokens} tokens of a sequence on a rank x {block.mlp.num_experts_per_tok} choices do not spread "
                    f"evenly over {block.mlp.num_experts} experts; change seq_len"
                )

    @property
    def implementation(self) -> Implementation:
        """What plain PyTorch keeps and fuses, in the terms of the graph."""
        kernels = load_stack(STACK).kernels
        return Implementation(
            attention="unfused" if self.unfused else "flash",
            softmax="float32",
            activation=kernels.activation,
            norm=kernels.norm,
            rope=kernels.rope,
            dropout_add=kernels.dropout_add,
            sequence_gather=kernels.sequence_gather,
            router_weights=kernels.router_weights,
            activation_bytes=4 if self.plan.precision == "fp32" else 2,
            logits_saved_bytes=4.0,
        )

    @property
    def states(self) -> StateBytes:
        """Bytes per parameter."""
        return state_bytes(load_stack(STACK), self.plan.precision)

    def spans(self, pp_rank: int) -> list[tuple[int, int]]:
        """First layer and the one after the last of each model chunk of a pipeline rank."""
        plan = self.plan
        split = split_layers(self.spec.num_hidden_layers, plan.pp * plan.vpp, plan.uneven_layers)
        bounds = [sum(split[:i]) for i in range(len(split) + 1)]
        stages = self.stages(pp_rank)
        return [(bounds[i], bounds[i + 1]) for i in stages]

    def stages(self, pp_rank: int) -> list[int]:
        """The stage of the model that each chunk of a pipeline rank is."""
        plan = self.plan
        return [stage_of(plan.pipeline.placement, plan.pp, pp_rank, chunk) for chunk in range(plan.vpp)]

    @property
    def layout(self) -> Layout:
        """One micro-batch on one rank."""
        return self.plan.layout(self.seq_len)

    @property
    def hsdp_shard(self) -> int:
        """Ranks that share a copy of the parameters in HSDP."""
        return self.plan.hsdp_shard or max(1, self.plan.dp // 2)

    @property
    def fully_sharded(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return self.plan.dp > 1 and self.plan.zero in ("2", "3", "hsdp")


Role = Literal["tp", "dp", "pp", "ep", "expert_dp", "hsdp_shard", "hsdp_replicate", "tied"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The global ranks of each group that one rank is in."""

    tp: tuple[int, ...]
    dp: tuple[int, ...]
    pp: tuple[int, ...]
    ep: tuple[int, ...]
    expert_dp: tuple[int, ...]
    hsdp_shard: tuple[int, ...]
    hsdp_replicate: tuple[int, ...]

    def role(self, ranks: tuple[int, ...]) -> str:
        """Names of a set of ranks, those of groups that fall together joined; experts' are empty without experts.

        >>> case = Groups(tp=(0, 1), dp=(0,), pp=(0,), ep=(0, 1), expert_dp=(0,), hsdp_shard=(0,), hsdp_replicate=(0,))
        >>> case.role((0, 1))
        'tp=ep'
        """
        names = [name for name in self.__dataclass_fields__ if getattr(self, name) == ranks]
        return "=".join(names) or str(ranks)


def group_ranks(case: Case, rank: int) -> Groups:
    """The groups of one rank: tensor parallelism innermost, then data, then pipeline; see `parallel.placement`."""
    plan = case.plan
    stage = plan.tp * plan.dp
    first = rank // stage * stage
    inside = rank - first
    tensor, data = inside % plan.tp, inside // plan.tp
    shard = case.hsdp_shard
    experts = any(isinstance(block.mlp, MoESpec) for block in case.spec.decoder.layers)
    expert, replica = inside % plan.ep, inside // plan.ep
    return Groups(
        tp=tuple(first + data * plan.tp + i for i in range(plan.tp)),
        dp=tuple(first + i * plan.tp + tensor for i in range(plan.dp)),
        pp=tuple(inside + i * stage for i in range(plan.pp)),
        ep=tuple(first + replica * plan.ep + i for i in range(plan.ep)) if experts else (),
        expert_dp=tuple(first + i * plan.ep + expert for i in range(stage // plan.ep)) if experts else (),
        hsdp_shard=tuple(first + (data // shard * shard + i) * plan.tp + tensor for i in range(shard)),
        hsdp_replicate=tuple(first + (i * shard + data % shard) * plan.tp + tensor for i in range(plan.dp // shard)),
    )
