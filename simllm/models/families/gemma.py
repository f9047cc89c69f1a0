"""Gemma 1, 2 and 3: wide heads, gated GELU, tied 256k vocabularies, norms before and after each sub-layer from 2 on."""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, flag, size, text, texts, vocabulary
from simllm.models.families.parts import DECODER, RMS_NORM, Family, attention, decoder, gated_mlp, stack_of, windows
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES"]

_GEMMA: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=16, optional=True),
    "head_dim": size("head_dim", default=256),
    "max_position_embeddings": context("max_position_embeddings", default=8192),
    # Old configs say gelu in hidden_act and mean the tanh form, which hidden_activation then says.
    "hidden_act": text("hidden_activation", default="gelu_pytorch_tanh"),
    "attention_bias": flag("attention_bias", default=False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _gemma(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    block = BlockSpec(mixer=attention(v, qkv_bias=bias, out_bias=bias), mlp=gated_mlp(v), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_GEMMA2: Table = _GEMMA | {
    "num_key_value_heads": size("num_key_value_heads", default=4, optional=True),
    "sliding_window": size("sliding_window", default=4096, optional=True),
    "layer_types": texts("layer_types"),
}


def _gemma2(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM, norm_placement="sandwich")

    return decoder(v, stack_of(windows(v, lambda index: index % 2 == 0), block), final_norm=RMS_NORM)


#: Multimodal checkpoints write only what differs from the class, so these defaults are what they mean.
_GEMMA3: Table = _GEMMA2 | {
    "vocab_size": vocabulary("vocab_size", default=262208),
    "num_attention_heads": size("num_attention_heads", default=8),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window_pattern": size("sliding_window_pattern", "_sliding_window_pattern", default=6),
}


def _gemma3(v: Values) -> ModelSpec:
    bias, period = v.flag("attention_bias"), v.integer("sliding_window_pattern")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM, norm_placement="sandwich")

    return decoder(v, stack_of(windows(v, lambda index: (index + 1) % period != 0), block), final_norm=RMS_NORM)


_CAUSAL = {"use_bidirectional_attention": (False,)}
_TOKENIZER = "SentencePiece BPE (256k)"
_TOKENIZER3 = "SentencePiece BPE (262k)"

FAMILIES = (
    Family(title="Gemma", model_types=("gemma",), table=_GEMMA, build=_gemma, tokenizer=_TOKENIZER, fixed=_CAUSAL),
    Family(title="Gemma-2", model_types=("gemma2",), table=_GEMMA2, build=_gemma2, tokenizer=_TOKENIZER, fixed=_CAUSAL),
    Family(
        title="Gemma-3",
        model_types=("gemma3_text",),
        table=_GEMMA3,
        build=_gemma3,
        tokenizer=_TOKENIZER3,
        fixed=_CAUSAL,
    ),
    Family(
        title="Gemma-3",
        model_types=("gemma3",),
        table=_GEMMA3,
        build=_gemma3,
        tokenizer=_TOKENIZER3,
        fixed=_CAUSAL,
        nested="text_config",
    ),
)
