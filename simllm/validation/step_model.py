"""A decoder in plain PyTorch, built from the same spec as the graph, to time real training steps.

Products that the graph counts side by side (queries, keys and values; gate and up) are one module here, attention is
`scaled_dot_product_attention`, the loss is taken on float32 logits. Needs PyTorch; import it only where that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from simllm.errors import UnsupportedError
from simllm.models.spec import AttentionSpec, BlockSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["Decoder", "check_model"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
_ROPE_BASE = 10000.0


def check_model(spec: ModelSpec) -> None:
    """Refuse by name what this decoder does not have.

    Raises
    ------
    UnsupportedError
    """
    plain = spec.architecture == "causal-decoder" and spec.encoder is None
    blocks = spec.decoder.layers
    refused = {
        "is not a causal decoder": not plain,
        "has multi-token prediction": bool(spec.multi_token_prediction),
        "has an embedding of another width": spec.embedding_size is not None,
        "has token types, computed or relative positions": bool(
            spec.decoder.type_vocab_size or spec.decoder.sinusoidal or spec.decoder.relative_attention_num_buckets
        ),
        "has a transformed head": spec.head.transform is not None,
        "has mixtures of experts or layers without a feed-forward part": any(
            not isinstance(block.mlp, MLPSpec) for block in blocks
        ),
        "has norms that are not before each sub-layer, or parallel sub-layers": any(
            block.norm_placement != "pre" or block.parallel or block.residual_scale != 1.0 for block in blocks
        ),
        "has attention other than causal heads with learned positions or RoPE": any(
            not _plain_attention(block.mixer) for block in blocks
        ),
        "has an activation that is not timed": any(
            isinstance(block.mlp, MLPSpec) and block.mlp.activation not in _FUNCTIONS for block in blocks
        ),
    }
    for what, there in refused.items():
        if there:
            raise UnsupportedError(f"{spec.name} {what}; steps are timed of plain decoders such as gpt2 or llama")


def _plain_attention(mixer: Any) -> bool:
    return (
        isinstance(mixer, AttentionSpec)
        and mixer.mask == "causal"
        and mixer.position in ("none", "rope")
        and mixer.sliding_window is None
        and mixer.latent is None
        and mixer.qk_norm is None
        and not mixer.sinks
    )


class _Norm(nn.Module):
    def __init__(self, spec: NormSpec, width: int) -> None:
        super().__init__()
        self.width = (width,)
        self.weight = nn.Parameter(torch.ones(width)) if spec.affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if spec.affine and spec.bias else None
        self.centred = spec.kind == "layernorm"

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.width, self.weight, self.bias)
        return F.rms_norm(x, self.width, self.weight, 1e-6)


class _Attention(nn.Module):
    def __init__(self, spec: AttentionSpec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.sizes = [n * spec.head_dim for n in (spec.num_attention_heads, *2 * [spec.num_key_value_heads])]
        self.qkv = nn.Linear(hidden, sum(self.sizes), bias=spec.qkv_bias)
        self.o = nn.Linear(self.sizes[0], hidden, bias=spec.out_bias)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).split(self.sizes, -1)
        q, k, v = (part.view(batch, tokens, -1, self.spec.head_dim).transpose(1, 2) for part in parts)
        if self.spec.position == "rope":
            q, k = _rotate(q, tables), _rotate(k, tables)
        grouped = self.spec.num_key_value_heads != self.spec.num_attention_heads
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.o(context.transpose(1, 2).reshape(batch, tokens, -1))
        return out


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * tables[0] + turned * tables[1]


class _MLP(nn.Module):
    def __init__(self, spec: MLPSpec, hidden: int) -> None:
        super().__init__()
        self.function, self.gated = _FUNCTIONS[spec.activation], spec.gated
        self.up = nn.Linear(hidden, spec.intermediate_size * (2 if spec.gated else 1), bias=spec.bias)
        self.down = nn.Linear(spec.intermediate_size, hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.gated:
            gate, up = inner.chunk(2, -1)
            inner = self.function(gate) * up
        else:
            inner = self.function(inner)
        out: Tensor = self.down(inner)
        return out


class _Block(nn.Module):
    def __init__(self, spec: BlockSpec, hidden: int) -> None:
        super().__init__()
        assert isinstance(spec.mixer, AttentionSpec)
        assert isinstance(spec.mlp, MLPSpec)
        self.first, self.second = _Norm(spec.norm, hidden), _Norm(spec.norm, hidden)
        self.attention, self.mlp = _Attention(spec.mixer, hidden), _MLP(spec.mlp, hidden)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.first(x), tables)
        return cast("Tensor", x + self.mlp(self.second(x)))


class Decoder(nn.Module):
    """A causal decoder that returns its loss.

    Parameters
    ----------
    spec : ModelSpec
        One that `check_model` lets pass.
    recompute : bool
        Whether layers are recomputed in the backward pass.
    """

    def __init__(self, spec: ModelSpec, recompute: bool = False) -> None:
        super().__init__()
        check_model(spec)
        hidden = spec.hidden_size
        self.spec, self.recompute = spec, recompute
        self.token = nn.Embedding(spec.padded_vocab_size, hidden)
        self.position = nn.Embedding(spec.decoder.positions, hidden) if spec.decoder.positions else None
        self.blocks = nn.ModuleList(_Block(block, hidden) for block in spec.decoder.layers)
        self.norm = _Norm(spec.decoder.final_norm, hidden) if spec.decoder.final_norm else nn.Identity()
        self.head = nn.Linear(hidden, spec.padded_vocab_size, bias=spec.head.bias)
        if spec.head.tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the tokens."""
        x = self.token(ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        if self.position is not None:
            x = x + self.position(places)
        tables = self._tables(places, x.dtype)
        # A layer runs again as a whole, which is what the policy `full` says; PyTorch would leave its last product out.
        with set_checkpoint_early_stop(False):
            for block in self.blocks:
                x = checkpoint(block, x, tables, use_reentrant=False) if self.recompute else block(x, tables)
        logits = self.head(self.norm(x)).view(-1, self.head.out_features)
        return F.cross_entropy(logits.float(), labels.view(-1))

    def _tables(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mixer = self.spec.decoder.layers[0].mixer
        assert isinstance(mixer, AttentionSpec)
        rates = _ROPE_BASE ** (-torch.arange(0, mixer.head_dim, 2, device=places.device) / mixer.head_dim)
        angles = torch.cat(2 * [torch.outer(places.float(), rates)], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
