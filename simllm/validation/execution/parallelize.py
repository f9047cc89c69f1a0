"""A reference model split by a plan with PyTorch's public interfaces, and nothing else.

Tensor parallelism is `parallelize_module` with PyTorch's styles, sharded data parallelism `fully_shard`, replicated
data parallelism `DistributedDataParallel`. Two reductions have no interface of their own and are one `all_reduce`
each: replicated gradients beside distributed tensors, which `DistributedDataParallel` does not take, and the
gradients of a tied table whose copies stand on two pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from simllm.validation.execution.case import Case
from simllm.validation.execution.layers import Attention, Experts, LatentAttention, MixtureOfExperts
from simllm.validation.execution.reference import Block, Stem, Transformer

__all__ = [
    "Meshes",
    "add_recompute",
    "build_meshes",
    "expert_parameters",
    "finish_gradients",
    "set_attention",
    "shard_data_parallel",
    "splits_experts",
    "tensor_parallel",
]


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The device meshes of a plan: (pp, dp, tp), HSDP's two dimensions for dp, and (pp, expert_dp, ep) beside it."""

    whole: DeviceMesh
    hsdp: DeviceMesh | None
    experts: DeviceMesh | None


def build_meshes(case: Case, device: str) -> Meshes:
    """All meshes; every rank must call this."""
    plan, shard = case.plan, case.hsdp_shard
    whole = init_device_mesh(device, (plan.pp, plan.dp, plan.tp), mesh_dim_names=("pp", "dp", "tp"))
    hsdp = experts = None
    if plan.zero == "hsdp":
        sizes = (plan.pp, plan.dp // shard, shard, plan.tp)
        hsdp = init_device_mesh(device, sizes, mesh_dim_names=("pp", "replicate", "shard", "tp"))
    if "experts" in _components(case):
        replicas = plan.dp * plan.tp // plan.ep
        experts = init_device_mesh(device, (plan.pp, replicas, plan.ep), mesh_dim_names=("pp", "expert_dp", "ep"))
    return Meshes(whole=whole, hsdp=hsdp, experts=experts)


def _components(case: Case) -> set[str]:
    from simllm.models.build import build_graph

    return {weight.component for part, _ in build_graph(case.spec).parts for weight in part.weights}


# -- tensor and expert parallelism ------------------------------------------------------------------------------


class _Replicated(ParallelStyle):
    """A product that every rank computes whole because there are fewer key-value heads than ranks.

    Each rank uses its own head of the result, so that the gradients of result, weight and input are sums over ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: Any, inputs: Any, mesh: DeviceMesh) -> Any:
            x = inputs[0]
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            return (x, *inputs[1:])

        def leave(_: Any, result: Any, __: DeviceMesh) -> Any:
            return result.to_local(grad_placements=[Partial()])

        return distribute_module(module, device_mesh, None, enter, leave)


class _ByHead(ParallelStyle):
    """A norm of each head by itself: heads are split, its weight is whole on every rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: Any, inputs: Any, mesh: DeviceMesh) -> Any:
            return (DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False), *inputs[1:])

        def leave(_: Any, result: Any, __: DeviceMesh) -> Any:
            return result.to_local()

        return distribute_module(module, device_mesh, None, enter, leave)


def tensor_parallel(model: Transformer, case: Case, meshes: Meshes) -> None:
    """Split the products and tables of a model over tp, its experts over ep, in place."""
    plan = case.plan
    place = model.place
    place.ep = plan.ep
    if plan.ep > 1:
        assert meshes.experts is not None
        place.ep_group = meshes.experts["ep"].get_group()
        for module in model.modules():
            if isinstance(module, Experts):
                _own_experts(module, meshes.experts["ep"].get_local_rank(), plan.ep)
    if plan.tp == 1:
        return
    mesh = meshes.whole["tp"]
    place.tp, place.tp_rank, place.tp_mesh = plan.tp, mesh.get_local_rank(), mesh
    place.sequence_parallel = plan.sequence_parallel
    stream = Shard(1) if plan.sequence_parallel else Replicate()
    splitter = _Splitter(mesh, stream, plan.sequence_parallel)
    stems = [part for part in model.modules() if isinstance(part, Stem)]
    for stem in stems:
        splitter.stem(stem)
    for block in [part for part in model.modules() if isinstance(part, Block)]:
        splitter.block(block, plan.tp, place.tp_rank)
    norms = [model.encoder.norm] if model.encoder is not None else []
    if model.head is not None:
        head = model.head
        norms.append(head.norm)
        columns = ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(head.lm_head, mesh, columns)
        if case.spec.head.tied and model.stem is not None:
            head.lm_head.weight = model.stem.token.weight
    for norm in norms:
        splitter.norm(norm)


def _own_experts(experts: Experts, rank: int, ep: int) -> None:
    for name, weight in list(experts.named_parameters(recurse=False)):
        size = weight.shape[0] // ep
        setattr(experts, name, nn.Parameter(weight.detach()[rank * size : (rank + 1) * size].clone()))


class _Splitter:
    def __init__(self, mesh: DeviceMesh, stream: Any, sequence_parallel: bool) -> None:
        self.mesh, self.stream, self.sequence_parallel = mesh, stream, sequence_parallel

    def _apply(self, module: nn.Module, plan: dict[str, ParallelStyle]) -> None:
        parallelize_module(module, self.mesh, plan)

    def norm(self, norm: nn.Module) -> None:
        if self.sequence_parallel:
            parallelize_module(norm, self.mesh, SequenceParallel())

    def stem(self, stem: Stem) -> None:
        if not isinstance(stem.token.weight, DTensor):
            rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=self.stream)
            parallelize_module(stem.token, self.mesh, rows)
        for part in (stem.position, stem.norm):
            if part is not None:
                self.norm(part)
        if stem.relative is not None:
            parallelize_module(stem.relative, self.mesh, ColwiseParallel(output_layouts=Shard(-1)))

    def block(self, block: Block, tp: int, rank: int) -> None:
        for norm in (*block.norms.values(), *block.post_norms.values()):
            self.norm(norm)
        shared = block.spec.parallel and block.spec.shared_norm
        partial = block.spec.parallel
        if shared:
            parallelize_module(block.norms["mixer"], self.mesh, self._gathered())
        self.mixer(block.mixer, tp, rank, shared, partial)
        if block.cross is not None:
            self.mixer(block.cross, tp, rank, False, False)
        if isinstance(block.mlp, MixtureOfExperts):
            self.experts(block.mlp)
        else:
            self.mlp(block.mlp, shared, partial)

    def _rows(self, partial: bool) -> RowwiseParallel:
        if partial:
            return RowwiseParallel(output_layouts=Partial(), use_local_output=False)
        return RowwiseParallel(output_layouts=self.stream)

    def _gathered(self) -> ParallelStyle:
        """A result that several products read is gathered once, and its gradient reduced once."""
        return PrepareModuleOutput(
            output_layouts=self.stream, desired_output_layouts=Replicate(), use_local_output=False
        )

    def _prepare(self, module: nn.Module, sources: int, shared: bool) -> None:
        """The same for the input of a module."""
        if not shared:
            layouts, wanted = (self.stream,) * sources, (Replicate(),) * sources
            style = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=wanted)
            parallelize_module(module, self.mesh, style)

    def mixer(self, mixer: nn.Module, tp: int, rank: int, shared: bool, partial: bool) -> None:
        if isinstance(mixer, LatentAttention):
            self.latent(mixer, partial)
            return
        assert isinstance(mixer, Attention)
        spec = mixer.spec
        plan: dict[str, ParallelStyle] = {"q": ColwiseParallel(), "o": self._rows(partial)}
        if spec.num_key_value_heads >= tp:
            plan |= {"k": ColwiseParallel(), "v": ColwiseParallel()}
        else:
            plan |= {"k": _Replicated(), "v": _Replicated()}
            mixer.kv_head = rank * spec.num_key_value_heads // tp
        if spec.qk_norm is not None:
            plan |= {"q_norm": _ByHead(), "k_norm": _ByHead()}
        self._apply(mixer, plan)
        self._prepare(mixer, 2 if spec.mask == "cross" else 1, shared)

    def latent(self, mixer: LatentAttention, partial: bool) -> None:
        """Latents are made of this rank's tokens; gathered are they, not the wide stream."""
        self._apply(
            mixer,
            {
                "q_b": ColwiseParallel(input_layouts=self.stream),
                "k_b": ColwiseParallel(),
                "v_b": ColwiseParallel(),
                "o": self._rows(partial),
            },
        )
        if self.sequence_parallel:
            small = ["kv_a", "k_rope", "kv_a_norm"]
            small += ["q_a", "q_a_norm"] if mixer.latent.q_lora_rank is not None else []
            self._apply(mixer, {name: SequenceParallel() for name in small})
        # Keys and values are made of the same latent: gathered once.
        self._apply(mixer, {"kv_a_norm": self._gathered()})

    def mlp(self, mlp: nn.Module, shared: bool, partial: bool) -> None:
        plan: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": self._rows(partial)}
        if getattr(mlp, "gate", None) is not None:
            plan["gate"] = ColwiseParallel()
        self._apply(mlp, plan)
        self._prepare(mlp, 1, shared)

    def experts(self, moe: MixtureOfExperts) -> None:
        """Experts take this rank's tokens; router and shared gate are whole on every rank."""
        self._apply(moe, {"router": SequenceParallel()})
        if moe.shared is not None:
            self.mlp(moe.shared, False, False)
        if moe.shared_gate is not None:
            self._apply(moe, {"shared_gate": SequenceParallel()})


# -- recomputation ----------------------------------------------------------------------------------------------


def add_recompute(model: Transformer, case: Case) -> None:
    """Set which layers, or which attention cores, run again."""
    policy = case.plan.recompute
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        block.again = policy.kind == "full" and int(name.rpartition(".")[2]) % policy.every == 0
        for attention in (block.mixer, block.cross):
            if attention is not None:
                core: Any = attention.core
                core.again = policy.kind == "selective"
    set_attention(model, case)


def set_attention(model: Transformer, case: Case) -> None:
    """Fused attention, or explicit products."""
    for block in model.modules():
        if isinstance(block, Block):
            for attention in (block.mixer, block.cross):
                if attention is not None:
                    core: Any = attention.core
                    core.unfused = case.unfused


# -- data parallelism -------------------------------------------------------------------------------------------


def splits_experts(case: Case) -> bool:
    """Whether the ranks that share an expert are others than those that share the rest of the model."""
    return case.plan.ep > 1 or case.plan.tp > 1


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that expert parallelism splits."""
    return [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]


def shard_data_parallel(model: Transformer, case: Case, meshes: Meshes) -> None:
    """FSDP2 around every layer and around the rest, in place; nothing where parameters are not sharded."""
    plan = case.plan
    if not case.fully_sharded and not (plan.zero in ("2", "3", "hsdp") and expert_parameters(model)):
        return
    mixed = plan.precision == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    options: dict[str, Any] = {"reshard_after_forward": plan.zero != "2"}
    if policy is not None:
        options["mp_policy"] = policy
    if case.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    dense = meshes.hsdp["replicate", "shard"] if meshes.hsdp is not None else meshes.whole["dp"]
    ignored: set[nn.Parameter] = set()
    if splits_experts(case) and expert_parameters(model):
        assert meshes.experts is not None
        replicas = meshes.experts["expert_dp"]
        for module in model.modules():
            if not isinstance(module, Experts):
                continue
            if replicas.size() > 1:
                fully_shard(module, mesh=replicas, **options)
                sharded: Any = module
                sharded.set_gradient_divide_factor(float(plan.dp))
                # Gloo sums, but does not scale while it sums.
                sharded.set_force_sum_reduction_for_comms(True)
            else:
                ignored.update(module.parameters())
    if not case.fully_sharded:
        return
    options["ignored_params"] = ignored
    for block in [part for part in model.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=dense, **options)
    fully_shard(model, mesh=dense, **options)


def finish_gradients(model: nn.Module, case: Case, meshes: Meshes) -> None:
    """What is left to reduce after the backward pass: partial sums over tp, replicas over dp, experts, tied tables."""
    plan = case.plan
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    experts = expert_parameters(model) if splits_experts(case) else []
    own = {id(p) for p in experts}
    by_hand = plan.dp > 1 and not case.fully_sharded and plan.tp > 1
    if by_hand:
        dense = [p for p in model.parameters() if id(p) not in own]
        _all_reduce(dense, meshes.whole["dp"].get_group(), plan.dp)
    if experts and not isinstance(experts[0], DTensor):
        assert meshes.experts is not None
        group = meshes.experts["expert_dp"]
        _all_reduce(experts, group.get_group() if group.size() > 1 else None, plan.dp)


def _all_reduce(parameters: Iterable[nn.Parameter], group: Any, divide: int) -> None:
    """Sum gradients over a group as one buffer, and divide them."""
    gradients = [_local_gradient(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    if group is not None:
        dist.all_reduce(flat, group=group)
    flat /= divide
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
