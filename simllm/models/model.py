"""`Model`: a spec with its graph and its counts, the object people hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simllm.models.build import build_graph
from simllm.models.counts import (
    FlopCounts,
    ParameterCounts,
    count_flops,
    count_parameters,
    kv_cache_bytes_per_token,
)
from simllm.models.graph import Layout, ModelGraph
from simllm.models.spec import AttentionSpec, BlockSpec, MambaSpec, MLPSpec, ModelSpec, MoESpec

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """A model: its spec, its graph, and what can be counted without a cluster.

    Examples
    --------
    >>> model = Model.load("llama-3-70b")
    >>> model.parameters.total
    70553706496
    >>> model.kv_cache_bytes_per_token()
    327680.0
    """

    spec: ModelSpec

    @classmethod
    def load(cls, name_or_path: str | Path) -> Model:
        """A model of the catalog by name, or a Hugging Face ``config.json`` or a folder holding one.

        Raises
        ------
        InputError
            The name is unknown, or the config cannot be used.
        """
        from simllm.models.catalog import load_model

        return cls(load_model(name_or_path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "model") -> Model:
        """A model from the contents of a Hugging Face ``config.json``."""
        from simllm.models.config import spec_from_config

        return cls(spec_from_config(config, name))

    @property
    def name(self) -> str:
        """The name it was loaded under."""
        return self.spec.name

    @cached_property
    def graph(self) -> ModelGraph:
        """The one graph everything is folded from."""
        return build_graph(self.spec)

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Exact parameter counts."""
        return count_parameters(self.graph)

    def flops(self, seq_len: int, batch: int = 1) -> FlopCounts:
        """FLOPs of ``batch`` sequences of ``seq_len`` tokens; a prefix decoder's prefix is half of them."""
        return count_flops(self.graph, Layout(batch=batch, seq_len=seq_len, prefix_len=self.prefix_len(seq_len)))

    def prefix_len(self, seq_len: int) -> int:
        """Tokens of the bidirectional prefix in a sequence: half for prefix decoders, else none.

        Nothing in a config says how long prefixes are; half of the sequence is the mean of a uniformly drawn one.
        """
        return seq_len // 2 if self.spec.architecture == "prefix-decoder" else 0

    def kv_cache_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes of key-value cache per token of context (2 bytes an element: bf16)."""
        return kv_cache_bytes_per_token(self.graph, bytes_per_element)

    def cross_kv_cache_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes that cross-attention keeps per token of the encoder's sequence; 0 without an encoder."""
        return kv_cache_bytes_per_token(self.graph, bytes_per_element, cross=True)

    @cached_property
    def components(self) -> dict[str, str]:
        """The components in words: tokenizer, position, norm, activation, attention, bias, parallel block."""
        spec = self.spec
        block = spec.decoder.layers[-1]
        attention = next((b.mixer for b in spec.decoder.layers if isinstance(b.mixer, AttentionSpec)), None)
        mlps = [b.mlp for b in spec.decoder.layers if b.mlp is not None]
        dense = [mlp.expert if isinstance(mlp, MoESpec) else mlp for mlp in mlps]
        return {
            "tokenizer": spec.tokenizer,
            "position": _position(spec, attention),
            "norm": _norm(block),
            "activation": _activation(dense[-1]) if dense else "silu (mixer)",
            "attention": _attention(spec),
            "bias": _bias(attention, dense[-1] if dense else None),
            "parallel_block": "yes" if block.parallel else "no",
            "experts": _experts(mlps),
            "head": "tied to the token table" if spec.head.tied else "own matrix",
        }


def _position(spec: ModelSpec, attention: AttentionSpec | None) -> str:
    if spec.decoder.relative_attention_num_buckets:
        return "relative bias (buckets)"
    if spec.decoder.positions:
        return "learned absolute"
    kind = attention.position if attention else "none"
    names = {"rope": "RoPE", "alibi": "ALiBi", "relative": "relative bias", "transformer-xl": "Transformer-XL relative"}
    return names.get(kind, "none")


def _norm(block: BlockSpec) -> str:
    kind = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[block.norm.kind]
    if not block.norm.affine:
        kind += " without weights"
    elif block.norm.kind == "layernorm" and not block.norm.bias:
        kind += " without bias"
    qk = isinstance(block.mixer, AttentionSpec) and block.mixer.qk_norm is not None
    return f"{kind}, {block.norm_placement}" + (", QK-norm" if qk else "")


def _activation(mlp: MLPSpec) -> str:
    gated = {"silu": "SwiGLU", "swish": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU"}
    if not mlp.gated:
        return mlp.activation
    return next((name for key, name in gated.items() if mlp.activation.startswith(key)), f"gated {mlp.activation}")


def _attention(spec: ModelSpec) -> str:
    kinds: list[str] = []
    for block in spec.decoder.layers:
        mixer = block.mixer
        if isinstance(mixer, MambaSpec):
            text = "Mamba"
        else:
            text = mixer.kind + (f" with window {mixer.sliding_window}" if mixer.sliding_window else "")
        if text not in kinds:
            kinds.append(text)
    return " + ".join(kinds)


def _bias(attention: AttentionSpec | None, mlp: MLPSpec | None) -> str:
    where = []
    if attention and attention.qkv_bias:
        where.append("q, k, v")
    if attention and attention.out_bias:
        where.append("attention output")
    if mlp and mlp.bias:
        where.append("MLP")
    return ", ".join(where) or "none"


def _experts(mlps: list[MLPSpec | MoESpec]) -> str:
    sparse = [mlp for mlp in mlps if isinstance(mlp, MoESpec)]
    if not sparse:
        return "none"
    moe = sparse[-1]
    text = f"{moe.num_experts_per_tok} of {moe.num_experts} in {len(sparse)} of {len(mlps)} layers"
    return text + (", shared expert" if moe.shared else "")
