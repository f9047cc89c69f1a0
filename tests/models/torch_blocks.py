"""Transformer blocks in plain PyTorch, and a recorder of what autograd keeps of them.

The blocks are written from the same `BlockSpec` as the graph, with the operators that practitioners use; an
`Implementation` says which of them are fused. Nothing here knows the graph: what it keeps is PyTorch's own answer.

What the recorder counts: every storage that a saved tensor lives in, once and whole, because a view keeps all of the
memory that it looks at. What it leaves out: parameters; buffers (tables of cosines and sines, additive masks, the
norms' ones); and tensors that another block owns, which the caller names (the encoder's result, a relative bias).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simllm.models.graph import Implementation
from simllm.models.spec import AttentionSpec, BlockSpec, MLPSpec, MoESpec, NormSpec
from simllm.validation.execution.recorder import saved_bytes_of

__all__ = ["Block", "record_saved_bytes"]

Function = Callable[..., Tensor]

torch.set_num_threads(1)  # the shapes are tiny: more threads only wait for each other


def record_saved_bytes(forward: Callable[[], Any], module: nn.Module, lent: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps of ``forward()``, by the rules above."""
    return saved_bytes_of(forward, (*module.parameters(), *module.buffers(), *lent))


# -- operators -------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with the one-byte mask of the CUDA kernel; `F.dropout` on a CPU keeps a mask of the input's dtype."""
    return torch.native_dropout(x, p, True)[0] if p else x


class _Kernel(torch.autograd.Function):
    """A fused kernel: keeps its inputs only, and derives what it needs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            result = ctx.function(*inputs)
        return (None, *torch.autograd.grad(result, inputs, gradient))


class _RMSNormKernel(torch.autograd.Function):
    """RMSNorm as Apex, TransformerEngine and PyTorch's CUDA kernel do it: keeps the input and 1/rms of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        normed, scaled = x.float() * rstd, gradient.float() * weight
        to_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        to_weight = (gradient * normed).flatten(0, -2).sum(0)
        return to_x.to(x.dtype), to_weight.to(weight.dtype)


class _GatheredLinear(torch.autograd.Function):
    """A column-parallel product under sequence parallelism (arXiv:2205.05198, section 4.2.2).

    Keeps this rank's tokens only and gathers them again in the backward pass. One process stands for all: the other
    ranks' tokens are copies of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.bias = tp, bias is not None
        return F.linear(torch.cat([x] * tp, dim=1), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        full = torch.cat([x] * ctx.tp, dim=1).flatten(0, 1)
        flat = gradient.flatten(0, 1)
        to_x = sum((gradient @ weight).chunk(ctx.tp, dim=1))
        return to_x, flat.T @ full, flat.sum(0) if ctx.bias else None, None


class Norm(nn.Module):
    """LayerNorm is one kernel everywhere; RMSNorm is one kernel, or transformers' chain of float32 operators."""

    def __init__(self, spec: NormSpec, width: int, impl: Implementation, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eager = spec.kind, impl.norm == "eager"
        # A CPU keeps LayerNorm's statistics in the dtype of the weight, CUDA always in float32.
        one = torch.ones(width, dtype=torch.float32 if spec.kind == "layernorm" else dtype)
        if spec.affine:
            self.weight = nn.Parameter(one)
        else:
            self.register_buffer("weight", one)
        self.affine = spec.affine
        self.bias = nn.Parameter(torch.zeros_like(one)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)
        if not self.eager:
            return _RMSNormKernel.apply(x, self.weight)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


_FUNCTIONS: dict[str, Function] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def _activate(
    function: str, impl: Implementation, gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    f = _FUNCTIONS[function]
    inputs = [x for x in (gate, up, weight) if x is not None]

    def whole(gate: Tensor, *others: Tensor) -> Tensor:
        result = f(gate)
        for other in others:
            result = result * other
        return result.to(gate.dtype)

    one_operator = len(inputs) == 1 and function != "gelu_new"
    return _Kernel.apply(whole, *inputs) if impl.activation == "fused" and not one_operator else whole(*inputs)


# -- sub-layers ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention of one rank: ``heads`` and ``kv_heads`` are its own.

    ``fused_qkv``: one product makes queries, keys and values, which are views of its result. ``bool_mask``: the causal
    mask is a comparison made in the forward pass (nanoGPT), not an additive table.
    """

    def __init__(self, block: Block, spec: AttentionSpec, fused_qkv: bool, bool_mask: bool) -> None:
        super().__init__()
        self.block, self.spec, self.bool_mask = [block], spec, bool_mask  # a list: the block is no child
        tp, hidden, dtype = block.tp, block.hidden, block.dtype
        self.heads, self.kv_heads = spec.num_attention_heads // tp, spec.num_key_value_heads // tp
        d = spec.head_dim
        widths = [self.heads * d, self.kv_heads * d, self.kv_heads * d]
        if fused_qkv:
            self.qkv = nn.Linear(hidden, sum(widths), bias=spec.qkv_bias, dtype=dtype)
        else:
            self.q, self.k, self.v = (nn.Linear(hidden, n, bias=spec.qkv_bias, dtype=dtype) for n in widths)
        self.widths = widths if fused_qkv else None
        self.out = nn.Linear(self.heads * d, hidden, bias=spec.out_bias, dtype=dtype)
        if spec.qk_norm is not None:
            per_head = spec.qk_norm_per_head
            self.q_norm = Norm(spec.qk_norm, d if per_head else widths[0], block.impl, dtype)
            self.k_norm = Norm(spec.qk_norm, d if per_head else widths[1], block.impl, dtype)
        positions = torch.arange(block.seq_len)
        distance = positions[:, None] - positions[None, :]
        hidden_pairs = distance < 0 if spec.mask == "causal" else torch.zeros_like(distance, dtype=torch.bool)
        if spec.sliding_window:
            hidden_pairs |= distance >= spec.sliding_window
        mask = torch.zeros(1, 1, *distance.shape).masked_fill(hidden_pairs, float("-inf"))
        if spec.position == "alibi":
            slopes = 2.0 ** -(torch.arange(self.heads) + 1)
            mask = mask - slopes[None, :, None, None] * distance.abs()
        self.register_buffer("mask", mask.to(dtype))
        self.register_buffer("visible", torch.ones(1, 1, *distance.shape).tril())
        angles = positions[:, None] / 10000 ** (torch.arange(d // 2).repeat(2) * 2 / d)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        enter = self.block[0].enter
        if self.widths:
            q, k, v = enter(self.qkv, x).split(self.widths, dim=-1)
            return q, k, v
        return enter(self.q, x), enter(self.k, source), enter(self.v, source)

    def _split(self, x: Tensor, norm: str = "") -> Tensor:
        per_head = self.spec.qk_norm_per_head
        if norm and self.spec.qk_norm is not None and not per_head:
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        if norm and self.spec.qk_norm is not None and per_head:
            x = getattr(self, norm)(x)
        return x.transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, x: Tensor, source: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        block = self.block[0]
        q, k, v = self._project(x, x if source is None else source)
        q, k, v = self._split(q, "q_norm"), self._split(k, "k_norm"), self._split(v)
        if self.spec.position == "rope":
            q, k = self._rotate(q), self._rotate(k)
        core = self._flash if block.impl.attention == "flash" else self._explicit
        if block.recompute == "selective" and block.impl.attention == "unfused":
            context = checkpoint(core, q, k, v, bias, use_reentrant=False)
        else:
            context = core(q, k, v, bias)
        return block.leave(self.out(context.transpose(1, 2).flatten(2)))

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # Without dropout: the CPU's flash kernel has none. CUDA's keeps no mask but the state of the generator.
        spec = self.spec
        causal = spec.mask == "causal" and bias is None and not spec.sliding_window and spec.position != "alibi"
        if bias is None and not causal and spec.mask != "cross":
            bias = self.mask
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=True)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.spec.head_dim)
        if bias is not None:
            scores = scores + bias
        elif self.bool_mask:
            scores = scores.masked_fill(self.visible == 0, float("-inf"))
        elif self.spec.mask != "cross":
            scores = scores + self.mask
        block = self.block[0]
        wide = torch.float32 if block.impl.softmax == "float32" else scores.dtype
        weights = F.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
        return dropout(weights, block.attention_dropout) @ v


class MLP(nn.Module):
    """A dense feed-forward layer of one rank."""

    def __init__(self, block: Block, spec: MLPSpec) -> None:
        super().__init__()
        self.block, self.spec = [block], spec
        ffn, hidden, dtype = spec.intermediate_size // block.tp, block.hidden, block.dtype
        self.up = nn.Linear(hidden, ffn, bias=spec.bias, dtype=dtype)
        self.gate = nn.Linear(hidden, ffn, bias=spec.bias, dtype=dtype) if spec.gated else None
        self.down = nn.Linear(ffn, hidden, bias=spec.bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        block, function = self.block[0], self.spec.activation
        up = block.enter(self.up, x)
        if self.gate is None:
            inner = _activate(function, block.impl, up)
        else:
            inner = _activate(function, block.impl, block.enter(self.gate, x), up)
        return block.leave(self.down(inner))


class MixtureOfExperts(nn.Module):
    """Top-k routing: rows are sorted by expert, multiplied in groups, weighted, sorted back and summed.

    ``renormalise``: the chosen weights are divided by their sum (Mixtral).
    """

    def __init__(self, block: Block, spec: MoESpec, renormalise: bool) -> None:
        super().__init__()
        self.block, self.spec, self.renormalise = [block], spec, renormalise
        hidden, dtype, ffn = block.hidden, block.dtype, spec.expert.intermediate_size
        self.router = nn.Linear(hidden, spec.num_experts, bias=spec.router_bias, dtype=dtype)

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(spec.num_experts, rows, columns, dtype=dtype) / math.sqrt(rows))

        self.up, self.down = weights(hidden, ffn), weights(ffn, hidden)
        self.gate = weights(hidden, ffn) if spec.expert.gated else None
        self.shared = MLP(block, spec.shared) if spec.shared else None
        if spec.shared and spec.shared_gate:
            self.shared_gate = nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        k, flat, impl = self.spec.num_experts_per_tok, x.flatten(0, 1), self.block[0].impl
        probabilities = F.softmax(self.router(flat), dim=-1, dtype=torch.float32)
        weights, experts = torch.topk(probabilities, k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        order = torch.argsort(experts.flatten())
        token = order // k
        ends = torch.bincount(experts.flatten(), minlength=self.spec.num_experts).cumsum(0, dtype=torch.int32)
        early = weights.flatten()[order, None] if impl.router_weights == "activation" else None
        rows = flat.index_select(0, token)
        up, function = F.grouped_mm(rows, self.up, offs=ends), self.spec.expert.activation
        if self.gate is None:
            inner = _activate(function, impl, up, None, early)
        else:
            inner = _activate(function, impl, F.grouped_mm(rows, self.gate, offs=ends), up, early)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        result = F.grouped_mm(inner, self.down, offs=ends).index_select(0, inverse).unflatten(0, (-1, k))
        if early is None:
            result = result * weights[..., None]
        combined = result.sum(1).to(x.dtype).view_as(x)
        if self.shared is None:
            return combined
        shared = self.shared(x)
        if self.spec.shared_gate:
            shared = _activate("sigmoid", impl, self.shared_gate(x), shared)
        return combined + shared


# -- blocks ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One transformer block of one rank.

    Parameters
    ----------
    spec : BlockSpec
    hidden : int
    seq_len : int
        Tokens of a sequence that meet in attention.
    impl : Implementation
    hidden_dropout, attention_dropout : float
    recompute : str
        Around what `torch.utils.checkpoint` stands: ``none``; ``selective``, the explicit attention core; ``mixer``
        or ``mlp``, that sub-layer without its norm; ``full``, everything.
    tp : int
        The block holds this share of the heads and of the feed-forward layer.
    sequence_parallel : bool
        Outside the products the rank holds ``seq_len / tp`` tokens.
    fused_qkv, bool_mask, renormalise : bool
        See `Attention` and `MixtureOfExperts`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        hidden: int,
        seq_len: int,
        impl: Implementation,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        recompute: str = "none",
        tp: int = 1,
        sequence_parallel: bool = False,
        fused_qkv: bool = False,
        bool_mask: bool = False,
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.hidden, self.seq_len, self.impl = spec, hidden, seq_len, impl
        self.hidden_dropout, self.attention_dropout, self.recompute = hidden_dropout, attention_dropout, recompute
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.dtype = torch.float32 if impl.activation_bytes == 4 else torch.bfloat16
        assert isinstance(spec.mixer, AttentionSpec)
        self.mixer = Attention(self, spec.mixer, fused_qkv, bool_mask)
        self.cross = Attention(self, spec.cross_attention, False, False) if spec.cross_attention else None
        assert spec.mlp is not None
        moe = isinstance(spec.mlp, MoESpec)
        self.mlp = MixtureOfExperts(self, spec.mlp, renormalise) if moe else MLP(self, spec.mlp)
        names = ["mixer", "mlp", "cross"]
        self.norms = nn.ModuleDict({name: Norm(spec.norm, hidden, impl, self.dtype) for name in names})
        self.post_norms = nn.ModuleDict({name: Norm(spec.norm, hidden, impl, self.dtype) for name in names})

    def enter(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """A product whose outputs tensor parallelism splits."""
        if self.sequence_parallel:
            return _GatheredLinear.apply(x, linear.weight, linear.bias, self.tp)
        return linear(x)

    def leave(self, x: Tensor) -> Tensor:
        """What a reduce-scatter leaves on this rank; an all-reduce changes no shape."""
        return x.narrow(1, 0, x.shape[1] // self.tp) if self.sequence_parallel else x

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if self.recompute == "full":
            return checkpoint(self._forward, x, memory, bias, use_reentrant=False)
        return self._forward(x, memory, bias)

    def _forward(self, x: Tensor, memory: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.spec.parallel:
            h = self.norms["mixer"](x)
            g = h if self.spec.shared_norm else self.norms["mlp"](x)
            return self._add(x, self.mixer(h, bias=bias), self.mlp(g))
        x = self._sublayer("mixer", x, lambda h: self.mixer(h, bias=bias))
        if self.cross is not None:
            cross = self.cross
            x = self._sublayer("cross", x, lambda h: cross(h, memory))
        return self._sublayer("mlp", x, self.mlp)

    def _sublayer(self, name: str, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        placement = self.spec.norm_placement
        h = self.norms[name](x) if placement in ("pre", "sandwich") else x
        h = checkpoint(sublayer, h, use_reentrant=False) if self.recompute == name else sublayer(h)
        if placement in ("sandwich", "output"):
            h = self.post_norms[name](h)
        x = self._add(x, h)
        return self.norms[name](x) if placement == "post" else x

    def _add(self, x: Tensor, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = first + other
        return x + dropout(first, self.hidden_dropout)
