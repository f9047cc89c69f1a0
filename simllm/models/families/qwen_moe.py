"""The Qwen mixtures of experts: Qwen1.5/2 (a gated shared expert), Qwen3 (QK-norm, no shared expert)."""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, count, experts, flag, integers, size
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
from simllm.models.families.qwen import SLIDING_ABOVE, TIKTOKEN_151K
from simllm.models.spec import BlockSpec, MLPSpec, ModelSpec, MoESpec

__all__ = ["FAMILIES"]

_QWEN2_MOE: Table = (
    DECODER
    | SLIDING_ABOVE
    | {
        "num_key_value_heads": size("num_key_value_heads", default=16, optional=True),
        "max_position_embeddings": context("max_position_embeddings", default=32768),
        "qkv_bias": flag("qkv_bias", default=True),
        "moe_intermediate_size": size("moe_intermediate_size", default=1408),
        "shared_expert_intermediate_size": size("shared_expert_intermediate_size", default=5632),
        "num_experts": experts("num_experts", "num_local_experts", default=60),
        "num_experts_per_tok": experts("num_experts_per_tok", default=4),
        "decoder_sparse_step": size("decoder_sparse_step", default=1),
        "mlp_only_layers": integers("mlp_only_layers", default=()),
    }
)


def _sparse(v: Values) -> tuple[bool, ...]:
    """Which layers have experts: every ``decoder_sparse_step``-th, but none of ``mlp_only_layers``."""
    step, dense = v.integer("decoder_sparse_step"), set(v.tuple_of_int("mlp_only_layers") or ())
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(v.integer("num_hidden_layers")))


def _qwen2_moe(v: Values) -> ModelSpec:
    number, below = v.integer("num_hidden_layers"), v.integer("max_window_layers")
    # Unlike Qwen2, windows are on every second layer below max_window_layers.
    local = windows(v, lambda i: i % 2 == 0 and i < below) if v.flag("use_sliding_window") else (None,) * number

    def block(key: tuple[int | None, bool]) -> BlockSpec:
        window, sparse = key
        mlp: MLPSpec | MoESpec = gated_mlp(v)
        if sparse:
            expert = gated_mlp(v, intermediate_size=v.integer("moe_intermediate_size"))
            shared = gated_mlp(v, intermediate_size=v.integer("shared_expert_intermediate_size"))
            mlp = mixture(v, expert, shared=shared, shared_gate=True)
        mixer = attention(v, sliding_window=window, qkv_bias=v.flag("qkv_bias"))
        return BlockSpec(mixer=mixer, mlp=mlp, norm=RMS_NORM)

    return decoder(v, stack_of(zip(local, _sparse(v), strict=True), block), final_norm=RMS_NORM)


_QWEN3_MOE: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=4, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=32768),
    "attention_bias": flag("attention_bias", default=False),
    "use_sliding_window": flag("use_sliding_window", default=False),
    "sliding_window": count("sliding_window", default=4096, optional=True),
    "moe_intermediate_size": size("moe_intermediate_size", default=768),
    "num_experts": experts("num_experts", "num_local_experts", default=128),
    "num_experts_per_tok": experts("num_experts_per_tok", default=8),
    "decoder_sparse_step": size("decoder_sparse_step", default=1),
    "mlp_only_layers": integers("mlp_only_layers", default=()),
}


def _qwen3_moe(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    window = (v.maybe("sliding_window") or None) if v.flag("use_sliding_window") else None

    def block(sparse: bool) -> BlockSpec:
        mlp: MLPSpec | MoESpec = gated_mlp(v)
        if sparse:
            mlp = mixture(v, gated_mlp(v, intermediate_size=v.integer("moe_intermediate_size")))
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM)
        return BlockSpec(mixer=mixer, mlp=mlp, norm=RMS_NORM)

    return decoder(v, stack_of(_sparse(v), block), final_norm=RMS_NORM)


FAMILIES = (
    Family(title="Qwen-MoE", model_types=("qwen2_moe",), table=_QWEN2_MOE, build=_qwen2_moe, tokenizer=TIKTOKEN_151K),
    Family(title="Qwen3-MoE", model_types=("qwen3_moe",), table=_QWEN3_MOE, build=_qwen3_moe, tokenizer=TIKTOKEN_151K),
)
