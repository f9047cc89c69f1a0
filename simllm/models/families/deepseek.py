"""Fine-grained experts behind dense first layers: DeepSeek-V2/V3, Kimi-K2 (latent attention), GLM-4.5 (GQA)."""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, count, experts, flag, size
from simllm.models.families.parts import (
    DECODER,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    mixture,
    stack_of,
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
    "qk_nope_head_dim": size("qk_nope_head_dim", default=128),
    "qk_rope_head_dim": size("qk_rope_head_dim", default=64),
    "v_head_dim": size("v_head_dim", default=128),
}

_DEEPSEEK_V3: Table = _DEEPSEEK_V2 | {
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

    def block(sparse: bool) -> BlockSpec:
        mlp: MLPSpec | MoESpec = gated_mlp(v)
        if sparse:
            common = gated_mlp(v, intermediate_size=shared * width) if shared else None
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


FAMILIES = (
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
)
