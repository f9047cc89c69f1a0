"""A model as Megatron-LM's arguments.

Names and meanings are those of ``megatron/training/arguments.py`` and ``TransformerConfig`` of Megatron-Core 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simllm.export.job import refuse
from simllm.models import Model
from simllm.models.spec import (
    AttentionSpec,
    BlockSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
)

__all__ = ["MODEL_ARGUMENTS", "TANH_GELU", "model_arguments"]

_NAME = "Megatron-LM"
#: Spellings of GeLU by its tanh approximation, which is Megatron-LM's --openai-gelu.
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")

#: Arguments that describe a model.
MODEL_ARGUMENTS = (
    "num-layers",
    "hidden-size",
    "ffn-hidden-size",
    "num-attention-heads",
    "group-query-attention",
    "num-query-groups",
    "kv-channels",
    "max-position-embeddings",
    "position-embedding-type",
    "use-rotary-position-embeddings",
    "normalization",
    "swiglu",
    "squared-relu",
    "openai-gelu",
    "disable-bias-linear",
    "add-qkv-bias",
    "qk-layernorm",
    "softmax-type",
    "window-size",
    "window-attn-skip-freq",
    "untie-embeddings-and-output-weights",
    "vocab-size",
    "padded-vocab-size",
    "attention-dropout",
    "hidden-dropout",
    "multi-latent-attention",
    "q-lora-rank",
    "kv-lora-rank",
    "qk-head-dim",
    "qk-pos-emb-head-dim",
    "v-head-dim",
    "num-experts",
    "moe-layer-freq",
    "moe-ffn-hidden-size",
    "moe-router-topk",
    "moe-shared-expert-intermediate-size",
    "mtp-num-layers",
)


def _pattern(flags: list[bool]) -> str:
    """A list of zeros and ones as the Python expression that Megatron-LM evaluates.

    >>> _pattern([False] * 3 + [True] * 58), _pattern([True, False] * 2)
    ('([0]*3+[1]*58)', '([1]*1+[0]*1+[1]*1+[0]*1)')
    """
    runs: list[list[int]] = []
    for flag in flags:
        if runs and runs[-1][0] == int(flag):
            runs[-1][1] += 1
        else:
            runs.append([int(flag), 1])
    return "(" + "+".join(f"[{value}]*{count}" for value, count in runs) + ")"


def model_arguments(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """A model as arguments, without their dashes; True stands for a switch.

    Raises
    ------
    UnsupportedError
        Naming what of the model Megatron-LM's GPT has no argument for.
    """
    spec = model.spec
    layers = spec.decoder.layers
    if spec.architecture != "causal-decoder":
        refuse(_NAME, f"the architecture {spec.architecture}", "pretrain_gpt.py trains causal decoders")
    if spec.embedding_size not in (None, spec.hidden_size):
        refuse(_NAME, "an embedding narrower than the model", "its token table is as wide as the model")
    if spec.decoder.embedding_norm or spec.decoder.sinusoidal or spec.decoder.relative_attention_num_buckets:
        refuse(_NAME, "the embedding of this model", "it has neither a norm there nor sinusoidal positions")
    if spec.head.bias or spec.head.transform:
        refuse(_NAME, "the head of this model", "its output layer is one matrix without bias")
    for block in dict.fromkeys(layers):
        _check_block(block)
    first = layers[0]
    dense = next((b.mlp for b in layers if isinstance(b.mlp, MLPSpec)), None)
    moe = next((b.mlp for b in layers if isinstance(b.mlp, MoESpec)), None)
    shape = dense or (moe.expert if moe else None)
    attention = first.mixer
    assert shape is not None
    assert isinstance(attention, AttentionSpec)
    _check_uniform(layers, shape)
    # Megatron-LM has one width for dense layers, and falls back on it for experts.
    args: dict[str, Any] = {
        "num-layers": len(layers),
        "hidden-size": spec.hidden_size,
        "ffn-hidden-size": shape.intermediate_size,
        "num-attention-heads": attention.num_attention_heads,
        **_attention_arguments(attention),
        **_window_arguments(layers),
        **_position_arguments(spec, attention, config),
        "normalization": "RMSNorm" if first.norm.kind == "rmsnorm" else "LayerNorm",
        **_epsilon(config),
        **_mlp_arguments(shape, attention),
        **({} if moe is None else _moe_arguments(layers, moe)),
    }
    if not spec.head.tied:
        args["untie-embeddings-and-output-weights"] = True
    if spec.multi_token_prediction:
        if any(block != layers[-1] for block in spec.multi_token_prediction):
            refuse(_NAME, "these multi-token-prediction layers", "its modules repeat the last layer of the model")
        args["mtp-num-layers"] = len(spec.multi_token_prediction)
    args["vocab-size"] = spec.vocab_size
    # Its defaults are 0.1: what a model leaves out has to be said.
    args["attention-dropout"] = spec.attention_dropout
    args["hidden-dropout"] = spec.hidden_dropout
    return args


def _check_block(block: BlockSpec) -> None:
    if not isinstance(block.mixer, AttentionSpec):
        refuse(_NAME, "state-space layers", "pretrain_gpt.py trains transformers")
    if block.norm_placement != "pre" or block.parallel or block.residual_scale != 1.0 or block.cross_attention:
        refuse(_NAME, "the order of this model's sub-layers", "each has one norm before it, one after the other")
    if not block.norm.affine or (block.norm.kind == "layernorm") != block.norm.bias:
        refuse(_NAME, "this norm", "its RMSNorm has a weight, its LayerNorm a weight and a bias")
    attention = block.mixer
    if attention.mask != "causal":
        refuse(_NAME, f"the mask {attention.mask}", "its decoder is causal")
    if attention.qk_norm and (not attention.qk_norm_per_head or attention.qk_norm != block.norm):
        refuse(_NAME, "this QK-norm", "its own is over a head and of the model's kind")
    if attention.qk_norm and attention.latent:
        refuse(_NAME, "a QK-norm beside the norms of latent attention", "one switch stands for both")
    if attention.relative_attention_num_buckets:
        refuse(_NAME, "relative positions", "not written for decoders")
    if block.mlp is None:
        refuse(_NAME, "layers without an MLP", "each of its layers has one")


def _check_uniform(layers: tuple[BlockSpec, ...], shape: MLPSpec) -> None:
    """One attention for all layers but for windows, one shape of dense MLP, one of experts."""
    windowless = {replace(b.mixer, sliding_window=None) for b in layers if isinstance(b.mixer, AttentionSpec)}
    dense = {b.mlp for b in layers if isinstance(b.mlp, MLPSpec)}
    moe = {b.mlp for b in layers if isinstance(b.mlp, MoESpec)}
    if len(windowless) > 1 or len(dense) > 1 or len(moe) > 1 or len({b.norm for b in layers}) > 1:
        refuse(_NAME, "layers that differ in shape", "they may differ in window and in having experts")
    for mixture in moe:
        expert = replace(mixture.expert, intermediate_size=shape.intermediate_size)
        shared = mixture.shared and replace(mixture.shared, intermediate_size=shape.intermediate_size)
        if expert != shape or shared not in (None, shape):
            refuse(_NAME, "experts of another kind than the dense layers", "only their width may differ")
        if mixture.shared_gate:
            refuse(_NAME, "a gate before the shared expert", "it adds the shared expert as it is")
        if mixture.router_bias:
            refuse(_NAME, "a router with a bias", "its router is one matrix")


def _attention_arguments(attention: AttentionSpec) -> dict[str, Any]:
    args: dict[str, Any] = {}
    latent = attention.latent
    if latent is not None:
        # The norms of the latents, which every such model here has, go by the same switch as QK-norms.
        args |= {"multi-latent-attention": True, "qk-layernorm": True}
        if latent.q_lora_rank is not None:
            args["q-lora-rank"] = latent.q_lora_rank
        args |= {
            "kv-lora-rank": latent.kv_lora_rank,
            "qk-head-dim": latent.qk_nope_head_dim,
            "qk-pos-emb-head-dim": latent.qk_rope_head_dim,
            "v-head-dim": latent.v_head_dim,
        }
    else:
        args["kv-channels"] = attention.head_dim
        if attention.num_key_value_heads != attention.num_attention_heads:
            args |= {"group-query-attention": True, "num-query-groups": attention.num_key_value_heads}
    if attention.qk_norm:
        args["qk-layernorm"] = True
    if attention.sinks:
        args["softmax-type"] = "learnable"
    return args


def _window_arguments(layers: tuple[BlockSpec, ...]) -> dict[str, Any]:
    windows = [b.mixer.sliding_window for b in layers if isinstance(b.mixer, AttentionSpec)]
    sizes = set(windows) - {None}
    if not sizes:
        return {}
    if len(sizes) > 1:
        refuse(_NAME, "windows of several sizes", "it has one --window-size")
    # A window of n tokens sees itself and n - 1 before it.
    args: dict[str, Any] = {"window-size": f"({sizes.pop() - 1},0)"}  # type: ignore[operator]
    if None in windows:
        args["window-attn-skip-freq"] = _pattern([window is not None for window in windows])
    return args


def _position_arguments(spec: ModelSpec, attention: AttentionSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    if spec.decoder.positions:
        if attention.position != "none":
            refuse(_NAME, "learned positions beside others", "it has one kind of positions")
        return {"position-embedding-type": "learned_absolute", "max-position-embeddings": spec.decoder.positions}
    if attention.position == "rope":
        base = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
        return {"position-embedding-type": "rope"} | ({"rotary-base": round(base)} if base else {})
    if attention.position == "none":
        return {"position-embedding-type": "none"}
    return refuse(_NAME, f"positions of the kind {attention.position}", "it has learned ones, RoPE or none")


def _epsilon(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"):
        if key in config:
            return {"norm-epsilon": config[key]}
    return {}


def _mlp_arguments(shape: MLPSpec, attention: AttentionSpec) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if shape.gated:
        if shape.activation != "silu":
            refuse(_NAME, f"a gated MLP with {shape.activation}", "its gated MLP has SiLU (--swiglu)")
        args["swiglu"] = True
    elif shape.activation == "relu2":
        args["squared-relu"] = True
    elif shape.activation in TANH_GELU:
        args["openai-gelu"] = True
    elif shape.activation != "gelu":
        refuse(_NAME, f"the activation {shape.activation}", "it has GeLU, squared ReLU and SwiGLU")
    biases = (attention.qkv_bias, attention.out_bias, shape.bias)
    if biases == (True, True, True):
        return args
    if attention.out_bias or shape.bias:
        refuse(_NAME, "biases in some products only", "it has them everywhere, nowhere, or on q, k, v")
    args["disable-bias-linear"] = True
    if attention.qkv_bias:
        args["add-qkv-bias"] = True
    return args


def _moe_arguments(layers: tuple[BlockSpec, ...], moe: MoESpec) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num-experts": moe.num_experts,
        "moe-router-topk": moe.num_experts_per_tok,
        "moe-ffn-hidden-size": moe.expert.intermediate_size,
        "moe-token-dispatcher-type": "alltoall",
        "moe-grouped-gemm": True,
    }
    places = [isinstance(block.mlp, MoESpec) for block in layers]
    if not all(places):
        args["moe-layer-freq"] = _pattern(places)
    if moe.shared:
        args["moe-shared-expert-intermediate-size"] = moe.shared.intermediate_size
    return args
