"""Mixtures of experts on a plain decoder: Mixtral, DBRX, Grok-1, Qwen-MoE, OLMoE, gpt-oss, Llama 4."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    context,
    count,
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
from simllm.models.families.qwen import SLIDING_ABOVE
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
        return BlockSpec(mixer=mixer, mlp=mixture(v, gated_mlp(v, bias=True), router_bias=True), norm=RMS_NORM)

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
    notes = (f"chunked attention is taken as a sliding window of {chunk} tokens, which sees up to twice as many",)
    return decoder(v, stack_of(keys, block), final_norm=RMS_NORM, notes=notes if chunk else ())


_TIKTOKEN_151K = "tiktoken byte-level BPE (151k)"
_TIKTOKEN_200K = "tiktoken byte-level BPE (200k)"

FAMILIES = (
    Family(
        title="Mixtral", model_types=("mixtral",), table=_MIXTRAL, build=_mixtral, tokenizer="SentencePiece BPE (32k)"
    ),
    Family(
        title="DBRX",
        model_types=("dbrx",),
        table=_DBRX,
        build=_dbrx,
        tokenizer="tiktoken byte-level BPE (100k)",
    ),
    Family(title="Grok-1", model_types=("grok-1",), table=_GROK, build=_grok, tokenizer="SentencePiece BPE (131k)"),
    Family(title="Qwen-MoE", model_types=("qwen2_moe",), table=_QWEN2_MOE, build=_qwen2_moe, tokenizer=_TIKTOKEN_151K),
    Family(title="Qwen3-MoE", model_types=("qwen3_moe",), table=_QWEN3_MOE, build=_qwen3_moe, tokenizer=_TIKTOKEN_151K),
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
