"""The components of a model in words."""

from __future__ import annotations

from collections import Counter

from simllm.models.spec import AttentionSpec, BlockSpec, MambaSpec, MLPSpec, ModelSpec, MoESpec

__all__ = ["components", "layer_words"]

_POSITIONS = {
    "rope": "RoPE",
    "alibi": "ALiBi",
    "relative": "relative bias",
    "transformer-xl": "Transformer-XL relative",
}
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_GATED = {"silu": "SwiGLU", "swish": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU"}


def components(spec: ModelSpec) -> dict[str, str]:
    """The components of a model: tokenizer, vocabulary, position, norm, activation, attention, bias, ...

    Parameters
    ----------
    spec : ModelSpec
        Of an encoder-decoder, the decoder is described.

    Examples
    --------
    >>> from simllm.models.catalog import load_model
    >>> words = components(load_model("gpt-oss-20b"))
    >>> words["attention"]
    'GQA with sinks and window 128 (12 of 24 layers) + GQA with sinks (12 of 24 layers)'
    >>> components(load_model("chatglm-6b"))["norm"]
    'LayerNorm, post, DeepNorm (residual x 7.48)'
    """
    blocks = spec.decoder.layers
    mlps = [block.mlp for block in blocks if block.mlp is not None]
    dense = [mlp.expert if isinstance(mlp, MoESpec) else mlp for mlp in mlps]
    words = {
        "tokenizer": spec.tokenizer,
        "vocabulary": _vocabulary(spec),
        "position": _position(spec),
        "norm": _norm(spec, blocks[-1]),
        "activation": _several([_activation(mlp) for mlp in dense]) if dense else "silu (mixer)",
        "attention": _several([_mixer(block) for block in blocks]),
        "bias": _bias(spec, dense[-1] if dense else None),
        "parallel_block": "yes" if blocks[-1].parallel else "no",
        "experts": _experts(mlps),
        "head": "tied to the token table" if spec.head.tied else "own matrix",
    }
    modules = len(spec.multi_token_prediction)
    if modules:
        words["multi_token_prediction"] = f"{modules} module{'s' * (modules > 1)}"
    return words


def layer_words(block: BlockSpec) -> str:
    """What is in one layer.

    >>> from simllm.models.catalog import load_model
    >>> layer_words(load_model("deepseek-v3").decoder.layers[-1])
    'MLA, 8 of 256 experts, shared expert'
    """
    mlp = block.mlp
    parts = [_mixer(block)]
    if isinstance(mlp, MoESpec):
        parts.append(f"{mlp.num_experts_per_tok} of {mlp.num_experts} experts")
        if mlp.shared is not None:
            parts.append("shared expert")
    elif mlp is not None:
        parts.append(f"{_activation(mlp)} MLP")
    return ", ".join(parts)


def _several(kinds: list[str]) -> str:
    """One kind as it is; several with how many layers have them, in order of appearance."""
    counts = Counter(kinds)
    if len(counts) == 1:
        return kinds[0]
    return " + ".join(f"{kind} ({times} of {len(kinds)} layers)" for kind, times in counts.items())


def _vocabulary(spec: ModelSpec) -> str:
    padded = f", padded to {spec.padded_vocab_size}" if spec.padded_vocab_size != spec.vocab_size else ""
    return f"{spec.vocab_size}{padded}"


def _position(spec: ModelSpec) -> str:
    stack = spec.decoder
    if stack.relative_attention_num_buckets:
        return "relative bias (buckets)"
    if stack.positions:
        return "learned absolute"
    if stack.sinusoidal:
        return "sinusoidal absolute"
    mixers = [block.mixer for block in stack.layers if isinstance(block.mixer, AttentionSpec)]
    return _several([_POSITIONS.get(mixer.position, "none") for mixer in mixers]) if mixers else "none"


def _norm(spec: ModelSpec, block: BlockSpec) -> str:
    kind = _NORMS[block.norm.kind]
    if not block.norm.affine:
        kind += " without weights"
    elif block.norm.kind == "layernorm" and not block.norm.bias:
        kind += " without bias"
    parts = [kind, block.norm_placement]
    if block.parallel:
        parts.append("one for both branches" if block.shared_norm else "one for each branch")
    if block.residual_scale != 1.0:
        parts.append(f"DeepNorm (residual x {block.residual_scale:.3g})")
    if isinstance(block.mixer, AttentionSpec) and block.mixer.qk_norm is not None:
        parts.append("QK-norm")
    if isinstance(block.mixer, MambaSpec) and block.mixer.inner_norm is not None:
        parts.append("norms inside the mixer")
    if spec.decoder.embedding_norm is not None:
        parts.append("embedding norm")
    return ", ".join(parts)


def _activation(mlp: MLPSpec) -> str:
    if not mlp.gated:
        return mlp.activation
    return next((name for key, name in _GATED.items() if mlp.activation.startswith(key)), f"gated {mlp.activation}")


def _mixer(block: BlockSpec) -> str:
    mixer = block.mixer
    if isinstance(mixer, MambaSpec):
        return "Mamba"
    extras = ["sinks"] if mixer.sinks else []
    if mixer.sliding_window is not None:
        extras.append(f"{'chunks of' if mixer.mask == 'chunked' else 'window'} {mixer.sliding_window}")
    if block.cross_attention is not None:
        extras.append("cross-attention")
    return mixer.kind + (f" with {' and '.join(extras)}" if extras else "")


def _bias(spec: ModelSpec, mlp: MLPSpec | None) -> str:
    mixers = [block.mixer for block in spec.decoder.layers if isinstance(block.mixer, AttentionSpec)]
    attention = mixers[0] if mixers else None
    routed = any(isinstance(block.mlp, MoESpec) and block.mlp.router_bias for block in spec.decoder.layers)
    where = {
        "q, k, v": attention is not None and attention.qkv_bias,
        "attention output": attention is not None and attention.out_bias,
        "MLP": mlp is not None and mlp.bias,
        "router": routed,
        "head": spec.head.bias,
    }
    return ", ".join(word for word, there in where.items() if there) or "none"


def _experts(mlps: list[MLPSpec | MoESpec]) -> str:
    sparse = [mlp for mlp in mlps if isinstance(mlp, MoESpec)]
    if not sparse:
        return "none"
    moe = sparse[-1]
    text = f"{moe.num_experts_per_tok} of {moe.num_experts} in {len(sparse)} of {len(mlps)} layers"
    return text + (", shared expert" if moe.shared else "")
