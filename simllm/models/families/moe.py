"""Mixtures of experts on a plain decoder: Mixtral, Phi-MoE, DBRX, Grok-1, OLMoE, gpt-oss, Llama 4."""

from __future__ import annotations

from dataclasses import replace

from simllm.models.families.fields import (
    Table,
    Values,
    context,
    experts,
    flag,
    integers,
    layers,
    probability,
    size,
    text,
    texts,
    vocabulary,
)
from simllm.models.families.parts import (
    DECODER,
    LAYER_NORM,
    LAYER_NORM_NO_BIAS,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    layer_kinds,
    mixture,
    stack_of,
    windows,
)
from simllm.models.spec import BlockSpec, MLPSpec, ModelSpec, MoESpec, NormSpec

__all__ = ["FAMILIES"]

_MIXTRAL: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window": size("sliding_window", default=None),
    "num_experts": experts("num_local_experts", "num_experts", default=8),
    "num_experts_per_tok": experts("num_experts_per_tok", default=2),
}


def _mixtral(v: Values) -> ModelSpec:
    mixer = attention(v, sliding_window=v.maybe("sliding_window"))
    block = BlockSpec(mixer=mixer, mlp=mixture(v, gated_mlp(v)), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_PHIMOE: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window": size("sliding_window", default=None),
    "attention_bias": flag("attention_bias", default=False),
    "lm_head_bias": flag("lm_head_bias", default=False),
    "num_experts": experts("num_local_experts", "num_experts", default=16),
    "num_experts_per_tok": experts("num_experts_per_tok", default=2),
}


def _phimoe(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias)
        return BlockSpec(mixer=mixer, mlp=mixture(v, gated_mlp(v)), norm=LAYER_NORM)

    return decoder(v, stack_of(windows(v), block), final_norm=LAYER_NORM, head_bias=v.flag("lm_head_bias"))


_GRANITE_MOE: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "attention_bias": flag("attention_bias", default=False),
    "num_experts": experts("num_local_experts", "num_experts", default=8),
    "num_experts_per_tok": experts("num_experts_per_tok", default=2),
}


def _granite_moe(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    block = BlockSpec(mixer=attention(v, qkv_bias=bias, out_bias=bias), mlp=mixture(v, gated_mlp(v)), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_MINIMAX_M2: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=196608),
    "num_experts": experts("num_local_experts", "num_experts", default=256),
    "num_experts_per_tok": experts("num_experts_per_tok", default=8),
}


def _minimax_m2(v: Values) -> ModelSpec:
    mixer = attention(v, qk_norm=RMS_NORM, qk_norm_per_head=False)
    block = BlockSpec(mixer=mixer, mlp=mixture(v, gated_mlp(v)), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_DBRX: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("d_model", "hidden_size"),
    "num_hidden_layers": layers("n_layers", "num_hidden_layers"),
    "num_attention_heads": size("n_heads", "num_attention_heads"),
    "num_key_value_heads": size("attn_config.kv_n_heads", default=1),
    "intermediate_size": size("ffn_config.ffn_hidden_size", default=3584),
    "num_experts": experts("ffn_config.moe_num_experts", default=4),
    "num_experts_per_tok": experts("ffn_config.moe_top_k", default=1),
    "hidden_act": text("ffn_config.ffn_act_fn.name", default="silu"),
    "max_position_embeddings": context("max_seq_len", default=2048),
    "hidden_dropout": probability("resid_pdrop", default=0.0),
    "attention_dropout": probability("attn_config.attn_pdrop", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}


def _dbrx(v: Values) -> ModelSpec:
    block = BlockSpec(mixer=attention(v), mlp=mixture(v, gated_mlp(v)), norm=LAYER_NORM_NO_BIAS)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM_NO_BIAS)


_GROK: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads"),
    "hidden_act": text("hidden_act", default="gelu"),
    "num_experts": experts("num_experts"),
    "num_experts_per_tok": experts("num_experts_per_tok"),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _grok(v: Values) -> ModelSpec:
    block = BlockSpec(mixer=attention(v), mlp=mixture(v, gated_mlp(v)), norm=RMS_NORM, norm_placement="sandwich")
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_OLMOE: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "attention_bias": flag("attention_bias", default=False),
    "num_experts": experts("num_experts", "num_local_experts", default=64),
    "num_experts_per_tok": experts("num_experts_per_tok", default=8),
}


def _olmoe(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    mixer = attention(v, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM, qk_norm_per_head=False)
    block = BlockSpec(mixer=mixer, mlp=mixture(v, gated_mlp(v)), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_GPT_OSS: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=64, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window": size("sliding_window", default=128, optional=True),
    "layer_types": texts("layer_types"),
    "attention_bias": flag("attention_bias", default=True),
    "num_experts": experts("num_local_experts", "num_experts", default=128),
    "num_experts_per_tok": experts("num_experts_per_tok", "experts_per_token", default=4),
}


def _gpt_oss(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias, sinks=True)
        expert = replace(gated_mlp(v, bias=True), clamped=True)
        return BlockSpec(mixer=mixer, mlp=mixture(v, expert, router_bias=True), norm=RMS_NORM)

    return decoder(v, stack_of(windows(v, lambda index: index % 2 == 0), block), final_norm=RMS_NORM)


_LLAMA4: Table = DECODER | {
    "vocab_size": vocabulary("vocab_size", default=202048),
    "num_attention_heads": size("num_attention_heads", default=40),
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "intermediate_size": size("intermediate_size", default=8192),
    "intermediate_size_mlp": size("intermediate_size_mlp", default=16384),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "num_experts": experts("num_local_experts", "num_experts", default=16),
    "num_experts_per_tok": experts("num_experts_per_tok", default=1),
    "moe_layers": integers("moe_layers"),
    "interleave_moe_layer_step": size("interleave_moe_layer_step", default=1),
    "no_rope_layers": integers("no_rope_layers"),
    "no_rope_layer_interval": size("no_rope_layer_interval", default=4),
    "layer_types": texts("layer_types"),
    "attention_chunk_size": size("attention_chunk_size", default=8192, optional=True),
    "use_qk_norm": flag("use_qk_norm", default=True),
    "attention_bias": flag("attention_bias", default=False),
}

#: Scales queries and keys to unit length; no weights.
_L2_NORM = NormSpec(kind="rmsnorm", affine=False)


def _llama4(v: Values) -> ModelSpec:
    number, step = v.integer("num_hidden_layers"), v.integer("interleave_moe_layer_step")
    sparse = set(v.tuple_of_int("moe_layers") or range(step - 1, number, step))
    interval, bias = v.integer("no_rope_layer_interval"), v.flag("attention_bias")
    # Despite its name the list holds 1 for layers that do rotate; an empty list means the pattern.
    rotates = v.tuple_of_int("no_rope_layers") or tuple(int((index + 1) % interval != 0) for index in range(number))
    if len(rotates) != number:
        raise v.error(f"no_rope_layers has {len(rotates)} entries for {number} layers; give one for each layer")
    kinds = layer_kinds(v, ["chunked_attention" if rotate else "full_attention" for rotate in rotates])
    chunk = v.maybe("attention_chunk_size")

    def block(key: tuple[int, str, bool]) -> BlockSpec:
        rotate, kind, routed = key
        mixer = attention(
            v,
            position="rope" if rotate else "none",
            mask="chunked" if chunk and kind == "chunked_attention" else "causal",
            sliding_window=None if kind == "full_attention" else chunk,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=_L2_NORM if rotate and v.flag("use_qk_norm") else None,
        )
        mlp: MLPSpec | MoESpec = gated_mlp(v, intermediate_size=v.integer("intermediate_size_mlp"))
        if routed:
            mlp = mixture(v, gated_mlp(v), shared=gated_mlp(v))
        return BlockSpec(mixer=mixer, mlp=mlp, norm=RMS_NORM)

    keys = [(rotates[index], kinds[index], index in sparse) for index in range(number)]
    return decoder(v, stack_of(keys, block), final_norm=RMS_NORM)


_TIKTOKEN_200K = "tiktoken byte-level BPE (200k)"

FAMILIES = (
    Family(
        title="Mixtral", model_types=("mixtral",), table=_MIXTRAL, build=_mixtral, tokenizer="SentencePiece BPE (32k)"
    ),
    Family(
        title="Phi-MoE",
        model_types=("phimoe",),
        table=_PHIMOE,
        build=_phimoe,
        tokenizer="SentencePiece BPE (32k)",
    ),
    Family(
        title="Granite-MoE",
        model_types=("granitemoe",),
        table=_GRANITE_MOE,
        build=_granite_moe,
        tokenizer="byte-level BPE (StarCoder)",
    ),
    Family(
        title="MiniMax-M2",
        model_types=("minimax_m2",),
        table=_MINIMAX_M2,
        build=_minimax_m2,
        tokenizer=_TIKTOKEN_200K,
    ),
    Family(
        title="DBRX",
        model_types=("dbrx",),
        table=_DBRX,
        build=_dbrx,
        tokenizer="tiktoken byte-level BPE (100k)",
    ),
    Family(title="Grok-1", model_types=("grok-1",), table=_GROK, build=_grok, tokenizer="SentencePiece BPE (131k)"),
    Family(title="OLMoE", model_types=("olmoe",), table=_OLMOE, build=_olmoe, tokenizer="byte-level BPE (NeoX)"),
    Family(
        title="gpt-oss",
        model_types=("gpt_oss",),
        table=_GPT_OSS,
        build=_gpt_oss,
        tokenizer="tiktoken byte-level BPE (o200k_harmony)",
    ),
    Family(title="Llama-4", model_types=("llama4_text",), table=_LLAMA4, build=_llama4, tokenizer=_TIKTOKEN_200K),
    Family(
        title="Llama-4",
        model_types=("llama4",),
        table=_LLAMA4,
        build=_llama4,
        tokenizer=_TIKTOKEN_200K,
        nested="text_config",
    ),
)
