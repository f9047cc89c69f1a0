"""Fine-grained experts behind dense first layers: DeepSeek-MoE/V2/V3, Kimi-K2, GLM-4.5, dots.llm1."""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, count, experts, flag, size, texts
from simllm.models.families.parts import (
    DECODER,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    mixture,
    stack_of,
    windows,
)
from simllm.models.spec import AttentionSpec, BlockSpec, LatentSpec, MLPSpec, ModelSpec, MoESpec

__all__ = ["FAMILIES"]

_FINE_GRAINED: Table = DECODER | {
    "moe_intermediate_size": size("moe_intermediate_size"),
    "num_experts": experts("n_routed_experts", "num_local_experts", "num_experts"),
    "num_experts_per_tok": experts("num_experts_per_tok"),
    "n_shared_experts": count("n_shared_experts", default=None),
    "first_k_dense_replace": count("first_k_dense_replace", default=0),
    "moe_layer_freq": size("moe_layer_freq", default=1),
    "attention_bias": flag("attention_bias", default=False),
}

_DEEPSEEK_V2: Table = _FINE_GRAINED | {
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "kv_lora_rank": size("kv_lora_rank", default=512),
    "q_lora_rank": size("q_lora_rank", default=1536, optional=True),
    "n_shared_experts": count("n_shared_experts", default=2, optional=True),
    "mlp_bias": flag("mlp_bias", default=False),
    "qk_nope_head_dim": size("qk_nope_head_dim", default=128),
    "qk_rope_head_dim": size("qk_rope_head_dim", default=64),
    "v_head_dim": size("v_head_dim", default=128),
}

_LATENT: Table = {name: field for name, field in _DEEPSEEK_V2.items() if name != "mlp_bias"}

_DEEPSEEK_V3: Table = _LATENT | {
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "moe_intermediate_size": size("moe_intermediate_size", default=2048),
    "num_experts": experts("n_routed_experts", "num_local_experts", "num_experts", default=256),
    "num_experts_per_tok": experts("num_experts_per_tok", default=8),
    "n_shared_experts": count("n_shared_experts", default=1, optional=True),
    "first_k_dense_replace": count("first_k_dense_replace", default=3),
}


def _latent(v: Values) -> AttentionSpec:
    latent = LatentSpec(
        kv_lora_rank=v.integer("kv_lora_rank"),
        q_lora_rank=v.maybe("q_lora_rank"),
        qk_nope_head_dim=v.integer("qk_nope_head_dim"),
        qk_rope_head_dim=v.integer("qk_rope_head_dim"),
        v_head_dim=v.integer("v_head_dim"),
    )
    bias = v.flag("attention_bias")
    return attention(
        v,
        head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        latent=latent,
        qkv_bias=bias,
        out_bias=bias,
    )


def _fine_grained(v: Values, mixer: AttentionSpec) -> ModelSpec:
    first, every = v.integer("first_k_dense_replace"), v.integer("moe_layer_freq")
    width, shared = v.integer("moe_intermediate_size"), v.maybe("n_shared_experts") or 0
    bias = v.flag("mlp_bias")

    def block(sparse: bool) -> BlockSpec:
        mlp: MLPSpec | MoESpec = gated_mlp(v, bias=bias)
        if sparse:
            common = gated_mlp(v, bias=bias, intermediate_size=shared * width) if shared else None
            mlp = mixture(v, gated_mlp(v, intermediate_size=width), shared=common)
        return BlockSpec(mixer=mixer, mlp=mlp, norm=RMS_NORM)

    keys = (index >= first and index % every == 0 for index in range(v.integer("num_hidden_layers")))
    return decoder(v, stack_of(keys, block), final_norm=RMS_NORM)


def _deepseek(v: Values) -> ModelSpec:
    return _fine_grained(v, _latent(v))


_GLM4_MOE: Table = _FINE_GRAINED | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "moe_intermediate_size": size("moe_intermediate_size", default=1408),
    "num_experts": experts("n_routed_experts", "num_local_experts", "num_experts", default=128),
    "num_experts_per_tok": experts("num_experts_per_tok", default=8),
    "n_shared_experts": count("n_shared_experts", default=1, optional=True),
    "first_k_dense_replace": count("first_k_dense_replace", default=1),
    "use_qk_norm": flag("use_qk_norm", default=False),
}


def _glm4_moe(v: Values) -> ModelSpec:
    qk_norm = RMS_NORM if v.flag("use_qk_norm") else None
    return _fine_grained(v, attention(v, qkv_bias=v.flag("attention_bias"), qk_norm=qk_norm))


_DOTS1: Table = _GLM4_MOE | {
    "num_key_value_heads": size("num_key_value_heads", default=32, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "num_experts": experts("n_routed_experts", "num_local_experts", "num_experts"),
    "num_experts_per_tok": experts("num_experts_per_tok"),
    "n_shared_experts": count("n_shared_experts", default=None),
    "first_k_dense_replace": count("first_k_dense_replace", default=0),
    "sliding_window": count("sliding_window", default=4096, optional=True),
    "max_window_layers": count("max_window_layers", default=62),
    "layer_types": texts("layer_types"),
}


def _dots1(v: Values) -> ModelSpec:
    first = v.integer("max_window_layers")
    if any(window is not None for window in windows(v, lambda index: index >= first)):
        raise v.unsupported("sliding windows of dots.llm1 are not modelled; its published models have none")
    bias = v.flag("attention_bias")
    return _fine_grained(v, attention(v, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM))


#: The first DeepSeek mixture (arXiv:2401.06066), as its remote code names the fields.
_DEEPSEEK: Table = _FINE_GRAINED | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
}


def _deepseek_moe(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    return _fine_grained(v, attention(v, qkv_bias=bias, out_bias=bias))


FAMILIES = (
    Family(
        title="DeepSeek-MoE",
        model_types=("deepseek",),
        table=_DEEPSEEK,
        build=_deepseek_moe,
        tokenizer="byte-level BPE (102k)",
    ),
    Family(
        title="DeepSeek-V2",
        model_types=("deepseek_v2",),
        table=_DEEPSEEK_V2,
        build=_deepseek,
        tokenizer="byte-level BPE (102k)",
    ),
    Family(
        title="DeepSeek-V3",
        model_types=("deepseek_v3",),
        table=_DEEPSEEK_V3,
        build=_deepseek,
        tokenizer="byte-level BPE (129k)",
    ),
    Family(
        title="Kimi-K2",
        model_types=("kimi_k2",),
        table=_DEEPSEEK_V3,
        build=_deepseek,
        tokenizer="tiktoken byte-level BPE (164k)",
    ),
    Family(
        title="GLM-4.5",
        model_types=("glm4_moe",),
        table=_GLM4_MOE,
        build=_glm4_moe,
        tokenizer="byte-level BPE (151.5k)",
    ),
    Family(title="dots.llm1", model_types=("dots1",), table=_DOTS1, build=_dots1, tokenizer="byte-level BPE (152k)"),
)
