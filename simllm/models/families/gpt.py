"""Decoders with sequential blocks and LayerNorm: GPT-1/2/3, GPT-Neo, StarCoder 1, OPT, Galactica, XGLM, BLOOM, MPT."""

from __future__ import annotations

from simllm.models.families.fields import (
    Values,
    context,
    flag,
    layers,
    pattern,
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
    LAYER_NORM_PLAIN,
    Family,
    attention,
    decoder,
    plain_mlp,
    stack_of,
)
from simllm.models.spec import BlockSpec, ModelSpec, NormSpec

__all__ = ["FAMILIES"]

#: OPT and BART keep two unused rows in front of their position tables.
_OPT_OFFSET = 2

_GPT2 = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("n_embd", "hidden_size"),
    "num_hidden_layers": layers("n_layer", "num_hidden_layers"),
    "num_attention_heads": size("n_head", "num_attention_heads"),
    "intermediate_size": size("n_inner", default=None),
    "max_position_embeddings": size("n_positions", "max_position_embeddings", default=1024),
    "hidden_act": text("activation_function", default="gelu_new"),
    "hidden_dropout": probability("resid_pdrop", default=0.1),
    "attention_dropout": probability("attn_pdrop", default=0.1),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}

_GPT1 = _GPT2 | {
    "max_position_embeddings": size("n_positions", "max_position_embeddings", default=512),
    "hidden_act": text("afn", default="gelu"),
}


def _gpt1(v: Values) -> ModelSpec:
    block = BlockSpec(
        mixer=attention(v, position="none", qkv_bias=True, out_bias=True),
        mlp=plain_mlp(v, bias=True),
        norm=LAYER_NORM,
        norm_placement="post",
    )
    blocks = (block,) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=None, positions=v.integer("max_position_embeddings"))


def _gpt2(v: Values) -> ModelSpec:
    block = BlockSpec(
        mixer=attention(v, position="none", qkv_bias=True, out_bias=True), mlp=plain_mlp(v, bias=True), norm=LAYER_NORM
    )
    blocks = (block,) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=LAYER_NORM, positions=v.integer("max_position_embeddings"))


_BIGCODE = _GPT2 | {
    "hidden_act": text("activation_function", default="gelu_pytorch_tanh"),
    "multi_query": flag("multi_query", default=True),
}


def _bigcode(v: Values) -> ModelSpec:
    kv_heads = 1 if v.flag("multi_query") else None
    mixer = attention(v, num_key_value_heads=kv_heads, position="none", qkv_bias=True, out_bias=True)
    blocks = (BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=True), norm=LAYER_NORM),) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=LAYER_NORM, positions=v.integer("max_position_embeddings"))


_NEO = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_layers", "num_hidden_layers"),
    "num_attention_heads": size("num_heads", "num_attention_heads"),
    "intermediate_size": size("intermediate_size", default=None),
    "max_position_embeddings": size("max_position_embeddings", default=2048),
    "sliding_window": size("window_size", default=256),
    "attention_layers": texts("attention_layers"),
    "attention_types": pattern("attention_types"),
    "hidden_act": text("activation_function", default="gelu_new"),
    "hidden_dropout": probability("resid_dropout", default=0.0),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _neo(v: Values) -> ModelSpec:
    number = v.integer("num_hidden_layers")
    # attention_types defaults to [[["global", "local"], 12]]: alternating, global first.
    alternating = tuple("local" if index % 2 else "global" for index in range(number))
    kinds = v.tuple_of_text("attention_layers") or v.tuple_of_text("attention_types") or alternating
    if len(kinds) != number:
        raise v.error(f"attention_layers or attention_types describes {len(kinds)} layers, num_layers={number}")

    def block(kind: str) -> BlockSpec:
        if kind not in ("global", "local"):
            raise v.unsupported(f"attention type {kind!r} is not modelled; known: global, local")
        window = v.integer("sliding_window") if kind == "local" else None
        mixer = attention(v, position="none", sliding_window=window, out_bias=True)
        return BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=True), norm=LAYER_NORM)

    positions = v.integer("max_position_embeddings")
    return decoder(v, stack_of(kinds, block), final_norm=LAYER_NORM, positions=positions)


_OPT = DECODER | {
    "intermediate_size": size("ffn_dim"),
    "max_position_embeddings": size("max_position_embeddings", default=2048),
    "hidden_act": text("activation_function", default="relu"),
    "word_embed_proj_dim": size("word_embed_proj_dim", default=None),
    "do_layer_norm_before": flag("do_layer_norm_before", default=True),
    "remove_final_layer_norm": flag("_remove_final_layer_norm", default=False),
    "enable_bias": flag("enable_bias", default=True),
    "affine": flag("layer_norm_elementwise_affine", default=True),
    "hidden_dropout": probability("dropout", default=0.1),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _opt(v: Values) -> ModelSpec:
    norm = LAYER_NORM if v.flag("affine") else LAYER_NORM_PLAIN
    bias, before = v.flag("enable_bias"), v.flag("do_layer_norm_before")
    block = BlockSpec(
        mixer=attention(v, position="none", qkv_bias=bias, out_bias=bias),
        mlp=plain_mlp(v, bias=bias),
        norm=norm,
        norm_placement="pre" if before else "post",
    )
    width = v.maybe("word_embed_proj_dim")
    return decoder(
        v,
        (block,) * v.integer("num_hidden_layers"),
        final_norm=norm if before and not v.flag("remove_final_layer_norm") else None,
        positions=v.integer("max_position_embeddings") + _OPT_OFFSET,
        embedding_size=None if width == v.integer("hidden_size") else width,
    )


_XGLM = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("d_model", "hidden_size"),
    "num_hidden_layers": layers("num_layers", "num_hidden_layers"),
    "num_attention_heads": size("attention_heads", "num_attention_heads"),
    "intermediate_size": size("ffn_dim"),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "hidden_act": text("activation_function", default="gelu"),
    "hidden_dropout": probability("dropout", default=0.1),
    "attention_dropout": probability("attention_dropout", default=0.1),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _xglm(v: Values) -> ModelSpec:
    mixer = attention(v, position="none", qkv_bias=True, out_bias=True)
    blocks = (BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=True), norm=LAYER_NORM),) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=LAYER_NORM, sinusoidal=True)


_BLOOM = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size", "n_embed"),
    "num_hidden_layers": layers("n_layer", "num_hidden_layers"),
    "num_attention_heads": size("n_head", "num_attention_heads"),
    "intermediate_size": size("n_inner", default=None),
    "max_position_embeddings": context("seq_length"),
    "hidden_act": text("hidden_act", default="gelu"),
    "hidden_dropout": probability("hidden_dropout", default=0.0),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _bloom(v: Values) -> ModelSpec:
    mixer = attention(v, position="alibi", qkv_bias=True, out_bias=True)
    blocks = (BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=True), norm=LAYER_NORM),) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=LAYER_NORM, embedding_norm=LAYER_NORM)


_MPT = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("d_model", "hidden_size"),
    "num_hidden_layers": layers("n_layers", "num_hidden_layers"),
    "num_attention_heads": size("n_heads", "num_attention_heads"),
    "max_position_embeddings": context("max_seq_len", default=2048),
    "hidden_act": text("hidden_act", default="gelu"),
    "hidden_dropout": probability("resid_pdrop", default=0.0),
    "attention_dropout": probability("attn_config.attn_pdrop", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _alibi(v: Values, qk_norm: NormSpec | None, width: int | None) -> ModelSpec:
    block = BlockSpec(
        mixer=attention(v, position="alibi", qk_norm=qk_norm, qk_norm_per_head=False),
        mlp=plain_mlp(v, bias=False, intermediate_size=width),
        norm=LAYER_NORM_NO_BIAS,
    )
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM_NO_BIAS)


def _mpt(v: Values) -> ModelSpec:
    return _alibi(v, None, None)


#: The first MPT (1B) spells its fields flat and normalises queries and keys over all heads.
_MOSAIC_GPT = {name: field for name, field in _MPT.items() if name != "attention_dropout"} | {
    "mlp_ratio": size("mlp_ratio", default=4),
    "attn_qk_ln": flag("attn_qk_ln", default=False),
    "attention_dropout": probability("attn_pdrop", default=0.0),
}


def _mosaic_gpt(v: Values) -> ModelSpec:
    qk_norm = LAYER_NORM_NO_BIAS if v.flag("attn_qk_ln") else None
    return _alibi(v, qk_norm, v.integer("mlp_ratio") * v.integer("hidden_size"))


_NO_CROSS_ATTENTION = {"add_cross_attention": (False,)}

FAMILIES = (
    Family(
        title="GPT-1",
        model_types=("openai-gpt",),
        table=_GPT1,
        build=_gpt1,
        tokenizer="BPE (spaCy/ftfy, 40k merges)",
    ),
    Family(
        title="GPT-2",
        model_types=("gpt2",),
        table=_GPT2,
        build=_gpt2,
        tokenizer="byte-level BPE",
        # Santacoder's remote code shares keys and values under this model_type; gpt_bigcode is its name elsewhere.
        fixed=_NO_CROSS_ATTENTION | {"attention_head_type": ("multihead",)},
    ),
    Family(
        title="StarCoder",
        model_types=("gpt_bigcode",),
        table=_BIGCODE,
        build=_bigcode,
        tokenizer="byte-level BPE (49k)",
        fixed=_NO_CROSS_ATTENTION,
    ),
    Family(title="GPT-Neo", model_types=("gpt_neo",), table=_NEO, build=_neo, tokenizer="byte-level BPE (GPT-2)"),
    Family(title="OPT", model_types=("opt",), table=_OPT, build=_opt, tokenizer="byte-level BPE (GPT-2)"),
    Family(
        title="XGLM",
        model_types=("xglm",),
        table=_XGLM,
        build=_xglm,
        tokenizer="SentencePiece Unigram (256k)",
        fixed=_NO_CROSS_ATTENTION,
    ),
    Family(
        title="BLOOM",
        model_types=("bloom",),
        table=_BLOOM,
        build=_bloom,
        tokenizer="byte-level BPE (250k)",
        fixed={"apply_residual_connection_post_layernorm": (False,)},
    ),
    Family(
        title="MPT",
        model_types=("mpt",),
        table=_MPT,
        build=_mpt,
        tokenizer="byte-level BPE (NeoX)",
        fixed={
            # transformers' class has four times hidden_size whatever the config says.
            "expansion_ratio": (4,),
            "no_bias": (True,),
            "norm_type": ("low_precision_layernorm", "layernorm"),
            "embedding_fraction": (1.0,),
            "attn_config.alibi": (True,),
            "attn_config.attn_type": ("multihead_attention",),
            "attn_config.prefix_lm": (False,),
            "attn_config.qk_ln": (False,),
        },
    ),
    Family(
        title="MPT",
        model_types=("mosaic_gpt",),
        table=_MOSAIC_GPT,
        build=_mosaic_gpt,
        tokenizer="byte-level BPE (NeoX)",
        fixed={"no_bias": (True,), "alibi": (True,), "prefix_lm": (False,), "embedding_fraction": (1.0,)},
    ),
)
