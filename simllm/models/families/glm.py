"""The GLM line: GLM-130B, ChatGLM-6B, ChatGLM2/3 and GLM-4 (remote code and transformers' own classes)."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    context,
    flag,
    layers,
    probability,
    size,
    text,
    vocabulary,
)
from simllm.models.families.parts import (
    DECODER,
    LAYER_NORM,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    plain_mlp,
)
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES"]

_OLD: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_layers", "num_hidden_layers"),
    "num_attention_heads": size("num_attention_heads"),
    "intermediate_size": size("inner_hidden_size"),
    "max_position_embeddings": context("max_sequence_length", default=2048),
    "hidden_act": text("hidden_act", default="gelu"),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _prefix_glm(v: Values, gated: bool) -> ModelSpec:
    """DeepNorm blocks (arXiv:2210.02414, section 2.1): the residual leaves from the normalised input, scaled up.

    That is post-norm with the first norm moved into the layer, plus one norm after the last layer.
    """
    block = BlockSpec(
        mixer=attention(v, mask="prefix", qkv_bias=True, out_bias=True),
        mlp=gated_mlp(v, bias=True) if gated else plain_mlp(v, bias=True),
        norm=LAYER_NORM,
        norm_placement="post",
        residual_scale=(2 * v.integer("num_hidden_layers")) ** 0.5,
    )
    blocks = (block,) * v.integer("num_hidden_layers")
    return decoder(v, blocks, final_norm=LAYER_NORM, architecture="prefix-decoder")


def _chatglm(v: Values) -> ModelSpec:
    return _prefix_glm(v, gated=False)


def _glm130b(v: Values) -> ModelSpec:
    return _prefix_glm(v, gated=True)


_CHATGLM2: Table = {
    "vocab_size": vocabulary("padded_vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_layers", "num_hidden_layers"),
    "num_attention_heads": size("num_attention_heads"),
    "head_dim": size("kv_channels", default=128),
    "multi_query_attention": flag("multi_query_attention", default=False),
    "multi_query_group_num": size("multi_query_group_num", default=1),
    "intermediate_size": size("ffn_hidden_size"),
    "max_position_embeddings": context("seq_length", default=2048),
    "hidden_act": text("hidden_act", default="silu"),
    "add_bias_linear": flag("add_bias_linear", default=False),
    "add_qkv_bias": flag("add_qkv_bias", default=False),
    "rmsnorm": flag("rmsnorm", default=True),
    "post_layer_norm": flag("post_layer_norm", default=True),
    "hidden_dropout": probability("hidden_dropout", default=0.0),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}


def _chatglm2(v: Values) -> ModelSpec:
    bias = v.flag("add_bias_linear")
    norm = RMS_NORM if v.flag("rmsnorm") else LAYER_NORM
    kv_heads = v.integer("multi_query_group_num") if v.flag("multi_query_attention") else None
    mixer = attention(v, num_key_value_heads=kv_heads, qkv_bias=bias or v.flag("add_qkv_bias"), out_bias=bias)
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v, bias=bias), norm=norm)
    # post_layer_norm is the norm after the last layer.
    final = norm if v.flag("post_layer_norm") else None
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=final)


_GLM: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=2, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "attention_bias": flag("attention_bias", default=True),
}


def _glm(v: Values) -> ModelSpec:
    block = BlockSpec(mixer=attention(v, qkv_bias=v.flag("attention_bias")), mlp=gated_mlp(v), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


def _glm4(v: Values) -> ModelSpec:
    mixer = attention(v, qkv_bias=v.flag("attention_bias"))
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM, norm_placement="sandwich")
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


FAMILIES = (
    Family(
        title="ChatGLM",
        model_types=("chatglm",),
        marker="inner_hidden_size",
        table=_OLD,
        build=_chatglm,
        tokenizer="SentencePiece Unigram (icetk text, 130k)",
        fixed={"pre_seq_len": ()},
    ),
    Family(
        title="ChatGLM2/3",
        model_types=("chatglm",),
        marker="ffn_hidden_size",
        table=_CHATGLM2,
        build=_chatglm2,
        tokenizer="SentencePiece BPE (65k), tiktoken byte-level BPE (GLM-4)",
        fixed={"pre_seq_len": (), "apply_residual_connection_post_layernorm": (False,)},
    ),
    Family(
        title="GLM-130B",
        model_types=("glm-130b",),
        table=_OLD,
        build=_glm130b,
        tokenizer="SentencePiece Unigram (icetk, 150k)",
        fixed={"layernorm_order": ("post",)},
    ),
    Family(title="GLM-4", model_types=("glm",), table=_GLM, build=_glm, tokenizer="tiktoken byte-level BPE (151.5k)"),
    Family(
        title="GLM-4-0414", model_types=("glm4",), table=_GLM, build=_glm4, tokenizer="tiktoken byte-level BPE (151.5k)"
    ),
)
