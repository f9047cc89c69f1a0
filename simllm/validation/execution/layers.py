"""The layers of a transformer in plain PyTorch, written from the spec and from nothing else.

They know no plan: `simllm.validation.execution.parallelize` splits them with PyTorch's public interfaces. Where a
layer must know where its rank stands (which heads have which ALiBi slope, which tokens it holds), it is told through a
`Place`. Kernels are single PyTorch operators, what `hardware_profiles/stacks/torch-eager.yaml` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils.checkpoint import checkpoint

from simllm.errors import UnsupportedError
from simllm.models.spec import AttentionSpec, LatentSpec, MLPSpec, MoESpec, NormSpec

__all__ = [
    "FUNCTIONS",
    "MLP",
    "Attention",
    "Experts",
    "LatentAttention",
    "MixtureOfExperts",
    "Norm",
    "Place",
    "Tables",
    "local",
]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, whether or not it is a distributed one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class Place:
    """Where a rank stands in its tensor-parallel and expert-parallel groups; parallelisation fills it in.

    Attributes
    ----------
    tp_mesh, ep_group
        Mesh and process group, or None where the degree is one.
    sequence_parallel : bool
        The residual stream holds this rank's tokens only.
    """

    tp_rank: int = 0
    tp: int = 1
    tp_mesh: Any = None
    sequence_parallel: bool = False
    ep: int = 1
    ep_group: Any = None


@dataclass
class Tables:
    """Tables that layers look up and nobody trains: one copy for all layers, made at the first use."""

    made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def get(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """The table of a key."""
        if key not in self.made:
            with torch.no_grad():
                self.made[key] = make()
        return self.made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tables:
        return Tables()


class Norm(nn.Module):
    """LayerNorm as one kernel, RMSNorm as a chain of float32 operators (transformers' LlamaRMSNorm)."""

    def __init__(self, spec: NormSpec, width: int) -> None:
        super().__init__()
        self.kind = spec.kind
        self.weight = nn.Parameter(torch.ones(width)) if spec.affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if spec.affine and spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)
        wide = x.to(torch.float32)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return normed if self.weight is None else self.weight * normed


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


#: Activation functions as transformers writes them.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
}


def _function(name: str) -> Callable[[Tensor], Tensor]:
    if name not in FUNCTIONS:
        raise UnsupportedError(f"activation {name} is not executed; executed are {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name]


class MLP(nn.Module):
    """A feed-forward layer of two matrices, or three when gated."""

    def __init__(self, spec: MLPSpec, hidden: int) -> None:
        super().__init__()
        self.function = _function(spec.activation)
        self.up = nn.Linear(hidden, spec.intermediate_size, bias=spec.bias)
        self.gate = nn.Linear(hidden, spec.intermediate_size, bias=spec.bias) if spec.gated else None
        self.down = nn.Linear(spec.intermediate_size, hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        inner = self.function(up) if self.gate is None else self.function(self.gate(x)) * up
        result: Tensor = self.down(inner)
        return result


class _Core(nn.Module):
    """``softmax(q k^T + bias) v``: PyTorch's fused attention, or explicit products where ``unfused``."""

    def __init__(self, spec: AttentionSpec, head_dim: int, place: Place, tables: Tables) -> None:
        super().__init__()
        self.spec, self.head_dim, self.place, self.tables = spec, head_dim, place, tables
        self.unfused = False
        self.again = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        core = self._unfused if self.unfused else self._flash
        context: Tensor = checkpoint(core, q, k, v, bias, use_reentrant=False) if self.again else core(q, k, v, bias)
        return context.transpose(1, 2).flatten(2)

    def _mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores; None: nothing is hidden."""
        spec, place = self.spec, self.place
        s, t, heads = q.shape[2], k.shape[2], q.shape[1]
        alibi = spec.position == "alibi"
        if spec.mask in ("bidirectional", "cross") and not alibi and spec.sliding_window is None:
            return None
        key = (spec.mask, spec.sliding_window, alibi and heads, s, t, q.dtype, q.device)
        return self.tables.get(key, lambda: _additive_mask(spec, s, t, heads, place.tp_rank).to(q.device, q.dtype))

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        spec = self.spec
        causal = spec.mask == "causal" and spec.sliding_window is None and spec.position != "alibi"
        mask = None if causal else self._mask(q, k)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        for extra in (bias, self._mask(q, k)):
            if extra is not None:
                scores = scores + extra
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _additive_mask(spec: AttentionSpec, s: int, t: int, heads: int, tp_rank: int) -> Tensor:
    distance = torch.arange(s)[:, None] - torch.arange(t)[None, :]
    causal = spec.mask in ("causal", "chunked")
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    window = spec.sliding_window
    if window is not None and spec.mask == "chunked":
        hidden |= torch.arange(s)[:, None] // window != torch.arange(t)[None, :] // window
    elif window is not None:
        hidden |= distance >= window if causal else distance.abs() > window // 2
    mask = torch.zeros(1, 1, s, t).masked_fill(hidden, float("-inf"))
    if spec.position == "alibi":
        total = spec.num_attention_heads
        first = tp_rank * heads
        slopes = 2.0 ** (-8.0 * torch.arange(first + 1, first + heads + 1) / total)
        mask = mask - slopes[None, :, None, None] * distance.abs()
    return mask


def _rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotary position embedding of (batch, heads, tokens, head_dim), by halves (transformers' Llama)."""
    tokens, width = x.shape[-2:]

    def angles() -> Tensor:
        return torch.arange(tokens)[:, None] / 10000 ** (torch.arange(width // 2).repeat(2) * 2 / width)

    kind = (tokens, width, x.dtype, x.device)
    cos = tables.get(("cos", *kind), lambda: angles().cos().to(x.device, x.dtype))
    sin = tables.get(("sin", *kind), lambda: angles().sin().to(x.device, x.dtype))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Attention with any number of key-value heads; keys and values come from ``source`` in cross-attention."""

    def __init__(self, spec: AttentionSpec, hidden: int, place: Place, tables: Tables) -> None:
        super().__init__()
        if spec.sinks or spec.position == "transformer-xl" or spec.relative_attention_num_buckets:
            raise UnsupportedError("attention sinks, Transformer-XL positions and per-layer biases are not executed")
        self.spec, self.tables, d = spec, tables, spec.head_dim
        self.q = nn.Linear(hidden, spec.num_attention_heads * d, bias=spec.qkv_bias)
        self.k = nn.Linear(hidden, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.v = nn.Linear(hidden, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.o = nn.Linear(spec.num_attention_heads * d, hidden, bias=spec.out_bias)
        if spec.qk_norm is not None:
            per_head = spec.qk_norm_per_head
            self.q_norm = Norm(spec.qk_norm, d if per_head else spec.num_attention_heads * d)
            self.k_norm = Norm(spec.qk_norm, d if per_head else spec.num_key_value_heads * d)
        self.core = _Core(spec, d, place, tables)
        #: Of the replicated key-value heads, the one that this rank's queries attend to; all of them when negative.
        self.kv_head = -1

    def _heads(self, x: Tensor, norm: nn.Module | None = None, one: bool = False) -> Tensor:
        if norm is not None and not self.spec.qk_norm_per_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        if norm is not None and self.spec.qk_norm_per_head:
            x = norm(x)
        x = x.transpose(1, 2)
        return x[:, self.kv_head : self.kv_head + 1] if one and self.kv_head >= 0 else x

    def forward(self, x: Tensor, source: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        normed = self.spec.qk_norm is not None
        q = self._heads(self.q(x), self.q_norm if normed else None)
        k = self._heads(self.k(source), self.k_norm if normed else None, one=True)
        v = self._heads(self.v(source), one=True)
        if self.spec.position == "rope":
            q, k = _rotate(q, self.tables), _rotate(k, self.tables)
        result: Tensor = self.o(self.core(q, k, v, bias))
        return result


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1), not absorbed."""

    def __init__(self, spec: AttentionSpec, latent: LatentSpec, hidden: int, place: Place, tables: Tables) -> None:
        super().__init__()
        self.latent, self.place, self.tables = latent, place, tables
        n, rms = spec.num_attention_heads, NormSpec(kind="rmsnorm")
        self.head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        if latent.q_lora_rank is not None:
            self.q_a = nn.Linear(hidden, latent.q_lora_rank, bias=spec.qkv_bias)
            self.q_a_norm = Norm(rms, latent.q_lora_rank)
        self.q_b = nn.Linear(latent.q_lora_rank or hidden, n * self.head_dim, bias=False)
        self.kv_a = nn.Linear(hidden, latent.kv_lora_rank, bias=spec.qkv_bias)
        self.k_rope = nn.Linear(hidden, latent.qk_rope_head_dim, bias=spec.qkv_bias)
        self.kv_a_norm = Norm(rms, latent.kv_lora_rank)
        self.k_b = nn.Linear(latent.kv_lora_rank, n * latent.qk_nope_head_dim, bias=False)
        self.v_b = nn.Linear(latent.kv_lora_rank, n * latent.v_head_dim, bias=False)
        self.o = nn.Linear(n * latent.v_head_dim, hidden, bias=spec.out_bias)
        self.core = _Core(spec, self.head_dim, place, tables)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding of (batch, tokens, heads, width)."""
        return _rotate(x.transpose(1, 2), self.tables).transpose(1, 2)

    def _shared_key(self, x: Tensor) -> Tensor:
        """The rotated part of the key, which all heads share: whole on every rank, its gradient a sum over them."""
        key: Tensor = self.k_rope(x)
        if self.place.tp_mesh is None:
            return key
        if not isinstance(key, DTensor):
            key = DTensor.from_local(key, self.place.tp_mesh, [Replicate()], run_check=False)
        return key.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def forward(self, x: Tensor, source: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        latent, rope = self.latent, self.latent.qk_rope_head_dim
        q = self.q_b(x if latent.q_lora_rank is None else self.q_a_norm(self.q_a(x))).unflatten(-1, (-1, self.head_dim))
        content, position = q.split([latent.qk_nope_head_dim, rope], dim=-1)
        q = torch.cat((content, self._rotated(position)), dim=-1)
        compressed = self.kv_a_norm(self.kv_a(x))
        k = self.k_b(compressed).unflatten(-1, (-1, latent.qk_nope_head_dim))
        v = self.v_b(compressed).unflatten(-1, (-1, latent.v_head_dim))
        shared = self._rotated(self._shared_key(x).unsqueeze(2))
        k = torch.cat((k, shared.expand(-1, -1, k.shape[2], -1)), dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        result: Tensor = self.o(self.core(q, k, v, bias))
        return result


class Experts(nn.Module):
    """The experts of one rank as stacked matrices: rows come sorted by expert, equally many for each."""

    def __init__(self, spec: MoESpec, hidden: int) -> None:
        super().__init__()
        expert, ffn = spec.expert, spec.expert.intermediate_size
        self.function = _function(expert.activation)

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(spec.num_experts, rows, columns).normal_(std=rows**-0.5))

        def bias(columns: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(spec.num_experts, columns)) if expert.bias else None

        self.up, self.up_bias = weights(hidden, ffn), bias(ffn)
        self.gate = weights(hidden, ffn) if expert.gated else None
        self.gate_bias = bias(ffn) if expert.gated else None
        self.down, self.down_bias = weights(ffn, hidden), bias(hidden)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = torch.bmm(x, local(weight))
        return result if bias is None else result + local(bias).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        up = self._product(x, self.up, self.up_bias)
        if self.gate is None:
            inner = self.function(up)
        else:
            inner = self.function(self._product(x, self.gate, self.gate_bias)) * up
        return self._product(inner, self.down, self.down_bias)


class _AllToAll(torch.autograd.Function):
    """All-to-all of equal parts along the first axis, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchange(gradient, ctx.group), None


def _exchange(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    result = torch.empty_like(x)
    torch.distributed.all_to_all_single(result, x, group=group)
    return result


class MixtureOfExperts(nn.Module):
    """Top-k routing with forced balance: which experts a token takes follows from its place in the sequence.

    Router, softmax and the renormalised weights are computed as usual; only the choice is fixed, so that every expert
    has equally many rows, the case that the analytic model prices (Megatron's moe-router-force-load-balancing).
    """

    def __init__(self, spec: MoESpec, hidden: int, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.router = nn.Linear(hidden, spec.num_experts, bias=spec.router_bias)
        self.experts = Experts(spec, hidden)
        self.shared = MLP(spec.shared, hidden) if spec.shared else None
        self.shared_gate = nn.Linear(hidden, 1, bias=False) if spec.shared and spec.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        result = self._routed(x)
        if self.shared is None:
            return result
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(local(self.shared_gate(x))) * local(shared)
        return result + local(shared)

    def _routed(self, x: Tensor) -> Tensor:
        k, experts, ep = self.spec.num_experts_per_tok, self.spec.num_experts, self.place.ep
        probabilities = F.softmax(local(self.router(x)).flatten(0, 1), dim=-1, dtype=torch.float32)
        x = local(x)
        flat, tokens = x.flatten(0, 1), x.shape[1]
        if tokens * k % experts:
            raise UnsupportedError(f"{tokens} tokens x {k} choices do not spread evenly over {experts} experts")
        places = torch.arange(x.shape[0] * tokens, device=x.device) % tokens
        chosen = (places[:, None] * k + torch.arange(k, device=x.device)) % experts
        weights = probabilities.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        order = torch.argsort(chosen.flatten(), stable=True)
        rows = flat.index_select(0, order // k)
        inverse = torch.argsort(order)
        per_expert = rows.shape[0] // experts
        if ep > 1:
            # (ranks, their experts, rows) here; (ranks, my experts, rows) there, sorted by expert for the products.
            rows = _AllToAll.apply(rows, self.place.ep_group)
            rows = rows.view(ep, experts // ep, per_expert, -1).transpose(0, 1).flatten(1, 2)
        out = self.experts(rows.view(experts // ep, ep * per_expert, -1))
        if ep > 1:
            out = out.view(experts // ep, ep, per_expert, -1).transpose(0, 1).flatten(0, 2)
            out = _AllToAll.apply(out, self.place.ep_group)
        out = out.reshape(rows.shape[0] * rows.shape[1] if rows.dim() == 3 else rows.shape[0], -1)
        result = out.index_select(0, inverse).unflatten(0, (-1, k)) * weights[..., None]
        return result.sum(1).to(x.dtype).view_as(x)
