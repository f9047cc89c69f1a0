"""Decoders whose attention and MLP read the same residual: GPT-J, GPT-NeoX, Falcon, Phi, Command-R.

One norm feeds both in GPT-J, Falcon-7B, Phi and Command-R; GPT-NeoX and Falcon-40B have one norm each.
"""

from __future__ import annotations

from simllm.models.families.fields import (
    Values,
    context,
    count,
    flag,
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
    Family,
    attention,
    decoder,
    gated_mlp,
    plain_mlp,
    stack_of,
    windows,
)
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES"]

_GPTJ = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("n_embd", "hidden_size"),
    "num_hidden_layers": layers("n_layer", "num_hidden_layers"),
    "num_attention_heads": size("n_head", "num_attention_heads"),
    "intermediate_size": size("n_inner", default=None),
    "max_position_embeddings": context("n_positions", "max_position_embeddings", default=2048),
    "hidden_act": text("activation_function", default="gelu_new"),
    "hidden_dropout": probability("resid_pdrop", default=0.0),
    "attention_dropout": probability("attn_pdrop", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}


def _gptj(v: Values) -> ModelSpec:
    block = BlockSpec(mixer=attention(v), mlp=plain_mlp(v, bias=True), norm=LAYER_NORM, parallel=True, shared_norm=True)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM, head_bias=True)


_NEOX = DECODER | {
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "hidden_act": text("hidden_act", default="gelu"),
    "use_parallel_residual": flag("use_parallel_residual", default=True),
    "attention_bias": flag("attention_bias", default=True),
    "hidden_dropout": probability("hidden_dropout", default=0.0),
}


def _neox(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    block = BlockSpec(
        mixer=attention(v, qkv_bias=bias, out_bias=bias),
        mlp=plain_mlp(v, bias=True),
        norm=LAYER_NORM,
        parallel=v.flag("use_parallel_residual"),
    )
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM)


_FALCON = {
    "vocab_size": vocabulary("vocab_size", default=65024),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_hidden_layers", "n_layer"),
    "num_attention_heads": size("num_attention_heads", "n_head"),
    "kv_heads": size("num_kv_heads", "n_head_kv", default=None),
    "intermediate_size": size("ffn_hidden_size", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "hidden_act": text("activation", default="gelu"),
    "multi_query": flag("multi_query", default=True),
    "new_decoder_architecture": flag("new_decoder_architecture", default=False),
    "parallel_attn": flag("parallel_attn", default=True),
    "num_ln_in_parallel_attn": count("num_ln_in_parallel_attn", default=None),
    "alibi": flag("alibi", default=False),
    "bias": flag("bias", default=False),
    "hidden_dropout": probability("hidden_dropout", default=0.0),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _falcon(v: Values) -> ModelSpec:
    bias, new = v.flag("bias"), v.flag("new_decoder_architecture")
    # Only the new decoder reads num_kv_heads; the old one has one key-value head or one per query head.
    kv_heads = v.maybe("kv_heads") if new else 1 if v.flag("multi_query") else None
    norms = v.maybe("num_ln_in_parallel_attn") or (2 if new else 1)
    parallel = v.flag("parallel_attn")
    block = BlockSpec(
        mixer=attention(
            v,
            num_key_value_heads=kv_heads,
            position="alibi" if v.flag("alibi") else "rope",
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=plain_mlp(v, bias=bias),
        norm=LAYER_NORM,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
    )
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM)


#: The remote-code configs of 2023 (RefinedWeb: 40B and 180B, RefinedWebModel: 7B) say it with their model_type.
_REFINED_WEB = _FALCON | {"new_decoder_architecture": flag("new_decoder_architecture", default=True)}

_PHI = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "hidden_act": text("hidden_act", default="gelu_new"),
    "qk_layernorm": flag("qk_layernorm", default=False),
    "hidden_dropout": probability("resid_pdrop", default=0.0),
}


def _phi(v: Values) -> ModelSpec:
    qk_norm = LAYER_NORM if v.flag("qk_layernorm") else None
    block = BlockSpec(
        mixer=attention(v, qkv_bias=True, out_bias=True, qk_norm=qk_norm),
        mlp=plain_mlp(v, bias=True),
        norm=LAYER_NORM,
        parallel=True,
        shared_norm=True,
    )
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM, head_bias=True)


_COHERE = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=8192),
    "use_qk_norm": flag("use_qk_norm", default=False),
    "attention_bias": flag("attention_bias", default=False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _cohere(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    # One weight for each head and dimension (heads x head_dim), so not shared by the heads.
    qk_norm = LAYER_NORM_NO_BIAS if v.flag("use_qk_norm") else None
    block = BlockSpec(
        mixer=attention(v, qkv_bias=bias, out_bias=bias, qk_norm=qk_norm, qk_norm_per_head=False),
        mlp=gated_mlp(v),
        norm=LAYER_NORM_NO_BIAS,
        parallel=True,
        shared_norm=True,
    )
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM_NO_BIAS)


_COHERE2 = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=8192),
    "sliding_window": size("sliding_window", default=4096, optional=True),
    "sliding_window_pattern": size("sliding_window_pattern", "_sliding_window_pattern", default=4),
    "layer_types": texts("layer_types"),
    "attention_bias": flag("attention_bias", default=False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _cohere2(v: Values) -> ModelSpec:
    bias, period = v.flag("attention_bias"), v.integer("sliding_window_pattern")

    def block(window: int | None) -> BlockSpec:
        # Global layers have no positions at all.
        position = "none" if window is None else "rope"
        mixer = attention(v, position=position, sliding_window=window, qkv_bias=bias, out_bias=bias)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=LAYER_NORM_NO_BIAS, parallel=True, shared_norm=True)

    blocks = stack_of(windows(v, lambda index: (index + 1) % period != 0), block)
    return decoder(v, blocks, final_norm=LAYER_NORM_NO_BIAS)


FAMILIES = (
    Family(
        title="GPT-J",
        model_types=("gptj", "codegen"),
        table=_GPTJ,
        build=_gptj,
        tokenizer="byte-level BPE (50257 padded to 50400)",
    ),
    Family(title="GPT-NeoX", model_types=("gpt_neox",), table=_NEOX, build=_neox, tokenizer="byte-level BPE (NeoX)"),
    Family(
        title="Falcon",
        model_types=("falcon", "RefinedWebModel"),
        table=_FALCON,
        build=_falcon,
        tokenizer="byte-level BPE (65k)",
    ),
    Family(
        title="Falcon",
        model_types=("RefinedWeb",),
        table=_REFINED_WEB,
        build=_falcon,
        tokenizer="byte-level BPE (65k)",
    ),
    Family(title="Phi", model_types=("phi",), table=_PHI, build=_phi, tokenizer="byte-level BPE (CodeGen)"),
    Family(title="Command-R", model_types=("cohere",), table=_COHERE, build=_cohere, tokenizer="byte-level BPE (256k)"),
    Family(
        title="Command-R7B/A",
        model_types=("cohere2",),
        table=_COHERE2,
        build=_cohere2,
        tokenizer="byte-level BPE (256k)",
    ),
)
