"""A whole model whose tokens are split over ranks: the reference layers around attention in a kind of `context`.

Everything but attention works on a rank's own tokens, so that the layers stay as they are: their attention core is
replaced, and their tables of rotary embedding hold the rank's positions. Gradients are averaged over the ranks at the
end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simllm.hardware.stack import load_stack
from simllm.models.activations import saved_bytes
from simllm.models.build import build_graph
from simllm.models.graph import Graph, Implementation
from simllm.models.spec import ModelSpec
from simllm.parallel.communication import block_collectives
from simllm.parallel.plan import Plan
from simllm.validation.execution.case import STACK
from simllm.validation.execution.context import ContextRecord, Run, context_attention, token_places, traffic
from simllm.validation.execution.layers import Attention, LatentAttention
from simllm.validation.execution.recorder import CommunicationLog, FlopLog, SavedLog
from simllm.validation.execution.reference import Block, Transformer

__all__ = ["ContextModelCase", "predict_context_model"]


@dataclass(frozen=True, kw_only=True)
class ContextModelCase:
    """A decoder with rotary positions and the plan that splits its tokens.

    Attributes
    ----------
    spec : ModelSpec
    plan : Plan
        Context parallelism alone, and the micro-batch.
    output : {"again", "kept"}
        See `simllm.validation.execution.context.ContextCase`.
    """

    spec: ModelSpec
    plan: Plan
    seq_len: int
    output: Literal["again", "kept"] = "again"

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", replace(self.spec, hidden_dropout=0.0, attention_dropout=0.0))

    @property
    def implementation(self) -> Implementation:
        """What plain PyTorch keeps and fuses, in float32, around the attention of `context`."""
        kernels = load_stack(STACK).kernels
        return Implementation(
            activation=kernels.activation,
            norm=kernels.norm,
            rope=kernels.rope,
            dropout_add=kernels.dropout_add,
            router_weights=kernels.router_weights,
            context_output=self.output,
            activation_bytes=4,
            logits_saved_bytes=4.0,
        )

    def execute(self) -> ContextRecord:
        """Run it on this rank; the default process group must exist."""
        return _execute(self)


def predict_context_model(case: ContextModelCase) -> ContextRecord:
    """What the analytic model says of one rank: ``saved`` of its layers, the stem and the head apart."""
    graph, layout, impl = build_graph(case.spec), case.plan.layout(case.seq_len), case.implementation
    sent: dict[tuple[str, str], int] = {}
    for layer in graph.layers:
        for item in block_collectives(layer, layout, impl):
            key = (item.op.replace("send_recv", "send"), item.phase)
            sent[key] = sent.get(key, 0) + round(item.size_bytes * item.count)
    saved = sum(saved_bytes(layer, layout, impl) for layer in graph.layers)
    flops = {phase: sum(_flops(case, part, phase) for part in _parts(graph)) for phase in ("forward", "backward")}
    return ContextRecord(sent=sent, flops=flops, saved=round(saved))


def _parts(graph: Any) -> tuple[Graph, ...]:
    return (graph.stem, *graph.layers, graph.head)


def _flops(case: ContextModelCase, graph: Graph, phase: str) -> int:
    from simllm.models.operators import Attention as AttentionCore

    layout, impl = case.plan.layout(case.seq_len), case.implementation
    total = 0
    for operator in graph.operators:
        forward = sum(item.flops for item in operator.forward(layout, impl))
        if phase == "forward":
            total += forward
            continue
        total += sum(item.flops for item in operator.backward_input(layout, impl))
        total += sum(item.flops for item in operator.backward_weight(layout, impl))
        if isinstance(operator, AttentionCore):
            total += forward // 2  # the scores are computed again
    return total


class _Core(nn.Module):
    """Attention over the ranks in the place of a layer's own core."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None
        return self.run(q, k, v).transpose(1, 2).flatten(2)


def _rotary_tables(width: int, at: Tensor) -> dict[tuple[Any, ...], Tensor]:
    """Cosines and sines of this rank's positions, under the names that the layers look for."""
    angles = at[:, None] / 10000 ** (torch.arange(width // 2).repeat(2) * 2 / width)
    kind = (len(at), width, torch.float32, torch.device("cpu"))
    return {("cos", *kind): angles.cos(), ("sin", *kind): angles.sin()}


def _head_dim(module: nn.Module) -> int:
    assert isinstance(module, Attention)
    return module.spec.head_dim


def _split_tokens(model: Transformer, case: ContextModelCase, at: Tensor) -> None:
    """Make a model work on this rank's tokens, in place."""
    run = context_attention(case.plan, case.seq_len, case.output)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            latent = module.latent if isinstance(module, LatentAttention) else None
            width = latent.qk_rope_head_dim if latent is not None else _head_dim(module)
            module.tables.made.update(_rotary_tables(width, at))
            module.core = _Core(run)  # type: ignore[assignment]


def _execute(case: ContextModelCase) -> ContextRecord:
    torch.manual_seed(0)
    reference, model = Transformer(case.spec), Transformer(case.spec)
    model.load_state_dict(reference.state_dict())
    shape = (case.plan.micro_batch_size, case.seq_len)
    ids, labels = (torch.randint(case.spec.vocab_size, shape) for _ in range(2))
    reference(ids, labels).sum().backward()
    at = token_places(case.seq_len, case.plan.cp)[dist.get_rank()]
    _split_tokens(model, case, at)
    own = ids[:, at].contiguous(), labels[:, at].contiguous()
    tables = {id(t): t for m in model.modules() for t in getattr(getattr(m, "tables", None), "made", {}).values()}
    saved = SavedLog()
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.observe = saved.observer(name, lambda: [*tables.values(), *own])
    logs = {phase: (CommunicationLog(), FlopLog()) for phase in ("forward", "backward")}
    with logs["forward"][0], logs["forward"][1]:
        loss = model(*own).sum()
    with logs["backward"][0], logs["backward"][1]:
        loss.backward()
    worst = 0.0
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, target = parameter.grad, wanted[name].grad
        assert gradient is not None, name
        assert target is not None, name
        dist.all_reduce(gradient)
        worst = max(worst, float((gradient / case.plan.cp - target).abs().max() / target.abs().max()))
    return ContextRecord(
        sent={key: size for phase, (calls, _) in logs.items() for key, size in traffic(calls, phase).items()},
        flops={phase: log.flops for phase, (_, log) in logs.items()},
        saved=sum(saved.bytes.values()),
        error=worst,
    )
