"""Attention whose tokens are split over ranks, executed in each kind of context parallelism and held against the count.

One attention core alone, written with PyTorch's public collectives and explicit matrix products, the way
TransformerEngine does it (``context_output=again``) or, for heads traded for tokens, the way autograd does it without
being told (``kept``, DeepSpeed Ulysses). Every rank holds one early and one late piece of the sequence. The result and
the gradients are those of a single process; bytes sent, FLOPs and bytes kept are those of `simllm.parallel` and of the
graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from simllm.models.activations import saved_bytes
from simllm.models.graph import Axis, Graph, Implementation, Layout
from simllm.models.graph import Tensor as Symbol
from simllm.models.operators import Attention
from simllm.models.work import AttentionWork
from simllm.parallel.communication import block_collectives
from simllm.parallel.plan import Plan
from simllm.validation.execution.recorder import CommunicationLog, FlopLog, saved_bytes_of

__all__ = ["ContextCase", "ContextRecord", "context_attention", "predict_context", "token_places", "traffic"]

Group = Any
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ContextCase:
    """A causal attention core and the plan that splits its tokens.

    Attributes
    ----------
    plan : Plan
        Context parallelism alone, and the micro-batch.
    output : {"again", "kept"}
        What of the output is kept where heads are traded, see `simllm.models.graph.Implementation`.
    """

    plan: Plan
    heads: int
    kv_heads: int
    head_dim: int
    seq_len: int
    output: Literal["again", "kept"] = "again"

    @property
    def implementation(self) -> Implementation:
        """Everything in float32."""
        return Implementation(activation_bytes=4, context_output=self.output)

    @property
    def layout(self) -> Layout:
        """Of one rank."""
        return self.plan.layout(self.seq_len)

    def execute(self) -> ContextRecord:
        """Run it on this rank; the default process group must exist."""
        return _execute(self)

    @property
    def graph(self) -> Graph:
        """The core by itself."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        heads, kv_heads = Axis("heads", width, self.heads), Axis("kv_heads", kv_width, self.kv_heads)
        q, k, v = (Symbol(n, (Axis("tokens"), axis)) for n, axis in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        core = Attention(
            name="attention_core",
            component="attention",
            inputs=(q, k, v),
            outputs=(Symbol("context", (Axis("tokens"), heads)),),
            mask="causal",
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
        )
        return Graph(name="core", operators=(core,), input=q, output=core.outputs[0])


@dataclass(frozen=True, kw_only=True)
class ContextRecord:
    """What one rank sent, computed and kept, or what the count says of it.

    Attributes
    ----------
    sent : dict of (str, str) to int
        (operation, forward or backward) -> bytes as nccl-tests prints them.
    flops : dict of str to int
        Of the matrix products, forward and backward; backward with the scores that are computed again.
    saved : int
        Bytes that autograd keeps.
    error : float
        Largest difference of the output or a gradient from a single process, over its largest entry; 0 in a count.
    """

    sent: dict[tuple[str, str], int]
    flops: dict[str, int]
    saved: int
    error: float = 0.0


# -- the count -----------------------------------------------------------------------------------------------------


def predict_context(case: ContextCase) -> ContextRecord:
    """What the analytic model says of one rank."""
    graph, layout, impl = case.graph, case.layout, case.implementation
    core = graph.operators[0]
    sent: Counter[tuple[str, str]] = Counter()
    for item in block_collectives(graph, layout, impl):
        sent[item.op.replace("send_recv", "send"), item.phase] += round(item.size_bytes * item.count)
    forward, backward = (
        sum(item.flops for item in work if isinstance(item, AttentionWork))
        for work in (core.forward(layout, impl), core.backward_input(layout, impl))
    )
    # Backward the scores are computed again: one of the two products of the forward pass.
    return ContextRecord(
        sent=dict(sent),
        flops={"forward": forward, "backward": backward + forward // 2},
        saved=round(saved_bytes(graph, layout, impl)),
    )


# -- one part of the attention -------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
    """(batch, heads, queries, keys); what a query may not see is minus infinity."""
    hidden = at_q[:, None] < at_k[None, :]
    return (q @ _per_query(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)


def _per_query(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of one part."""
    scores = _scores(q, k, at_q, at_k)
    lse = scores.logsumexp(-1, keepdim=True)
    # Like a fused kernel's, the output lies token by token: what follows needs no copy of it.
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return out.copy_((scores - lse).exp() @ _per_query(v, q)), lse


def _gradients(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, at_q: Tensor, at_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one part (arXiv:2205.14135, appendix B)."""
    p = (_scores(q, k, at_q, at_k) - lse).exp()
    d_scores = p * (d_out @ _per_query(v, q).transpose(-2, -1) - (d_out * out).sum(-1, keepdim=True))
    d_scores = d_scores / math.sqrt(q.shape[-1])
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    d_k, d_v = ((a.transpose(-2, -1) @ b).unflatten(1, groups).sum(2) for a, b in ((d_scores, q), (p, d_out)))
    return d_scores @ _per_query(k, q), d_k, d_v


def token_places(seq_len: int, ranks: int) -> list[Tensor]:
    """For every rank the positions of its tokens: one early and one late piece."""
    pieces = torch.arange(seq_len).chunk(2 * ranks)
    return [torch.cat((pieces[r], pieces[2 * ranks - 1 - r])) for r in range(ranks)]


# -- the kinds -----------------------------------------------------------------------------------------------------


class _Whole(torch.autograd.Function):
    """Attention of all tokens that are there, in any order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        out, lse = _attend(q, k, v, at, at)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.at = at
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (*_gradients(d_out, out, lse, q, k, v, ctx.at, ctx.at), None)


class _Gathered(torch.autograd.Function):
    """Keys and values of all ranks are gathered, again in the backward pass; their gradients reduced and scattered."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, places: list[Tensor], group: Group) -> Tensor:
        own = places[dist.get_rank(group)]
        out, lse = _attend(q, _gather(k, group), _gather(v, group), own, torch.cat(places))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.places, ctx.group = places, group
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        (q, k, v, out, lse), places, group = ctx.saved_tensors, ctx.places, ctx.group
        own, every = places[dist.get_rank(group)], torch.cat(places)
        d_q, d_k, d_v = _gradients(d_out, out, lse, q, _gather(k, group), _gather(v, group), own, every)
        return d_q, _scatter(d_k, group), _scatter(d_v, group), None, None


def _gather(x: Tensor, group: Group) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=2)


def _scatter(x: Tensor, group: Group) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=2)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


class _Ring(torch.autograd.Function):
    """Keys and values go round; backward the other way, from where they are, their gradients beside them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, places: list[Tensor], group: Group) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        kv = torch.stack((k, v))
        out, lse = torch.zeros_like(q), q.new_full((*q.shape[:-1], 1), -math.inf)
        for step in range(ranks):
            coming = _pass_on(kv, group, 1) if step < ranks - 1 else None
            queries, keys = _halves(q.shape[2], rank, (rank - step) % ranks)
            at_q, at_k = places[rank][queries], places[(rank - step) % ranks][keys]
            part, part_lse = _attend(q[:, :, queries], kv[0][:, :, keys], kv[1][:, :, keys], at_q, at_k)
            before, old = out[:, :, queries], lse[:, :, queries]
            total = torch.logaddexp(old, part_lse)
            out[:, :, queries] = before * (old - total).exp() + part * (part_lse - total).exp()
            lse[:, :, queries] = total
            if coming is not None:
                kv = coming()
        ctx.save_for_backward(q, kv, out, lse)
        ctx.places, ctx.group = places, group
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        (q, kv, out, lse), places, group = ctx.saved_tensors, ctx.places, ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        d_q, d_kv = torch.zeros_like(q), torch.zeros_like(kv)
        gradients: Callable[[], Tensor] | None = None
        for step in reversed(range(ranks)):
            source = (rank - step) % ranks
            coming = _pass_on(kv, group, -1) if step else None
            queries, keys = _halves(q.shape[2], rank, source)
            ahead, result, total, own = (t[:, :, queries] for t in (d_out, out, lse, q))
            at = places[rank][queries], places[source][keys]
            found = _gradients(ahead, result, total, own, kv[0][:, :, keys], kv[1][:, :, keys], *at)
            d_q[:, :, queries] += found[0]
            d_kv = torch.zeros_like(kv) if gradients is None else gradients()
            d_kv[0][:, :, keys] += found[1]
            d_kv[1][:, :, keys] += found[2]
            if step:
                gradients = _pass_on(d_kv, group, -1)
            if coming is not None:
                kv = coming()
        return d_q, d_kv[0], d_kv[1], None, None


def _halves(tokens: int, rank: int, source: int) -> tuple[slice, slice]:
    """The queries and keys of a step that see each other: what lies before the own pieces, or behind the other's."""
    everything, early, late = slice(0, tokens), slice(0, tokens // 2), slice(tokens // 2, tokens)
    if source == rank:
        return everything, everything
    return (everything, early) if source < rank else (late, everything)


def _pass_on(x: Tensor, group: Group, by: int) -> Callable[[], Tensor]:
    """Send to a neighbour while receiving from the other one; what comes, once it is needed."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    ahead, behind = (dist.get_global_rank(group, (rank + d) % ranks) for d in (by, -by))
    found, sent = torch.empty_like(x), x.contiguous()
    waiting = [dist.isend(sent, ahead, group=group), dist.irecv(found, behind, group=group)]

    def arrive() -> Tensor:
        for work in waiting:
            if work is not None:
                work.wait()
        return found

    return arrive


def _trade(x: Tensor, group: Group, to_heads: bool) -> Tensor:
    """Tokens of a rank with all heads for all tokens with some heads, or back."""
    ranks = dist.get_world_size(group)
    gives, gets = (1, 2) if to_heads else (2, 1)
    parts = torch.stack(x.chunk(ranks, dim=gives)).contiguous()
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts, group=group)
    return torch.cat(tuple(found), dim=gets)


class _Trade(torch.autograd.Function):
    """`_trade` with the reverse one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _trade(x, group, to_heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _trade(gradient, ctx.group, not ctx.to_heads), None, None


class _Ordered(torch.autograd.Function):
    """Tokens in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return x[:, :, order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient[:, :, ctx.order.argsort()], None


class _Traded(torch.autograd.Function):
    """Heads for tokens around attention, the output kept by tokens and exchanged again for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Tensor, group: Group) -> Tensor:
        q, k, v = (_trade(x, group, True) for x in (q, k, v))
        by_heads, lse = _attend(q, k, v, at, at)
        out = _trade(by_heads, group, False).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.at, ctx.group = at, group
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        (q, k, v, out, lse), at, group = ctx.saved_tensors, ctx.at, ctx.group
        out, d_out = (_trade(x, group, True) for x in (out, d_out))
        found = _gradients(d_out, out, lse, q, k, v, at, at)
        return (*(_trade(x, group, False) for x in found), None, None)


def _by_autograd(at: Tensor, group: Group, core: Run | None = None) -> Run:
    """Heads traded for tokens around any core, whatever autograd keeps of it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ranks = dist.get_world_size(group)
        # Heads that are fewer than the ranks are repeated.
        k, v = (x.repeat_interleave(max(1, ranks // x.shape[1]), dim=1) for x in (k, v))
        q, k, v = (_Trade.apply(x, group, True) for x in (q, k, v))
        out = _Whole.apply(q, k, v, at) if core is None else core(q, k, v)
        result: Tensor = _Trade.apply(out, group, False)
        return result

    return run


def context_attention(plan: Plan, seq_len: int, output: str) -> Run:
    """The causal attention of this rank, on (batch, heads, tokens, head size); every rank must call this.

    Parameters
    ----------
    plan : Plan
    seq_len : int
        Of the whole sequence.
    output : {"again", "kept"}
        See `ContextCase`.
    """
    world, places = dist.group.WORLD, token_places(seq_len, plan.cp)
    if plan.cp_comm_type == "p2p":
        return lambda q, k, v: _Ring.apply(q, k, v, places, world)
    if plan.cp_comm_type == "all_gather":
        return lambda q, k, v: _Gathered.apply(q, k, v, places, world)
    if plan.cp_comm_type == "a2a":
        every = torch.cat(places)
        if output == "again":
            return lambda q, k, v: _Traded.apply(q, k, v, every, world)
        return _by_autograd(every, world)
    near, far = _levels(plan.cp, plan.cp_a2a)
    # A rank of the ring holds the tokens of its neighbours in the order in which these hold them; steps of halves need
    # early and late pieces apart.
    apart = [torch.cat(places[n * plan.cp_a2a : (n + 1) * plan.cp_a2a]) for n in range(plan.cp // plan.cp_a2a)]
    order, places = apart[dist.get_rank(far)].argsort(), [at.sort().values for at in apart]

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _Ring.apply(*(_Ordered.apply(x, order) for x in (q, k, v)), places, far)
        result: Tensor = _Ordered.apply(out, order.argsort())
        return result

    return _by_autograd(torch.cat(places), near, ring)


def _levels(cp: int, inner: int) -> tuple[Group, Group]:
    """This rank's group of neighbours and its ring over such groups."""
    rank, mine = dist.get_rank(), {}
    sets = [("near", list(range(n, n + inner))) for n in range(0, cp, inner)]
    sets += [("far", list(range(n, cp, inner))) for n in range(inner)]
    for name, ranks in sets:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine[name] = group
    return mine["near"], mine["far"]


# -- execution -----------------------------------------------------------------------------------------------------


def _execute(case: ContextCase) -> ContextRecord:
    generator = torch.Generator().manual_seed(0)
    batch = case.plan.micro_batch_size
    shapes = [(batch, heads, case.seq_len, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    whole = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weight, d_out = (torch.randn(shapes[0], generator=generator) for _ in range(2))
    (_Whole.apply(*whole, torch.arange(case.seq_len)) * weight).backward(d_out)
    at = token_places(case.seq_len, case.plan.cp)[dist.get_rank()]
    own = [t.detach()[:, :, at].clone().requires_grad_() for t in whole]
    # What comes after attention keeps its result.
    own_weight = weight[:, :, at].contiguous().requires_grad_()
    run = context_attention(case.plan, case.seq_len, case.output)
    saved = saved_bytes_of(lambda: run(*own) * own_weight, [own_weight])
    logs = {phase: (CommunicationLog(), FlopLog()) for phase in ("forward", "backward")}
    with logs["forward"][0], logs["forward"][1]:
        out = run(*own) * own_weight
    with logs["backward"][0], logs["backward"][1]:
        out.backward(d_out[:, :, at].contiguous())
    sent: dict[tuple[str, str], int] = {}
    for phase, (calls, _) in logs.items():
        sent |= traffic(calls, phase)
    wanted = [t.grad[:, :, at] for t in whole if t.grad is not None]
    errors = [_error(t.grad, target) for t, target in zip(own, wanted, strict=True)]
    with torch.no_grad():
        errors.append(_error(out, (_Whole.apply(*whole, torch.arange(case.seq_len)) * weight)[:, :, at]))
    flops = {phase: log.flops for phase, (_, log) in logs.items()}
    return ContextRecord(sent=sent, flops=flops, saved=saved, error=max(errors))


def traffic(log: CommunicationLog, phase: str) -> dict[tuple[str, str], int]:
    """(operation, phase) -> bytes; what one rank sends another one receives, and is counted once."""
    sent: Counter[tuple[str, str]] = Counter()
    for call in log.calls:
        if call.op != "recv":
            sent[call.op, phase] += call.size_bytes
    return dict(sent)


def _error(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    return float((found - wanted).abs().max() / wanted.abs().max())
