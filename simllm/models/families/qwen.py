"""The dense Qwen models: Qwen 1, Qwen1.5/2/2.5 (biases on q, k and v), Qwen3 (QK-norm, heads of their own width)."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
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
from simllm.models.families.parts import DECODER, RMS_NORM, Family, attention, decoder, gated_mlp, stack_of, windows
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES", "SLIDING_ABOVE", "TIKTOKEN_151K", "sliding_above"]

#: Qwen2 and Qwen3: windows, when switched on, from layer max_window_layers upwards.
SLIDING_ABOVE: Table = {
    "use_sliding_window": flag("use_sliding_window", default=False),
    "sliding_window": count("sliding_window", default=4096, optional=True),
    "max_window_layers": count("max_window_layers", default=28),
    "layer_types": texts("layer_types"),
}


def sliding_above(v: Values) -> tuple[int | None, ...]:
    """Windows of each layer under the fields of `SLIDING_ABOVE`."""
    if not v.flag("use_sliding_window"):
        return (None,) * v.integer("num_hidden_layers")
    first = v.integer("max_window_layers")
    return windows(v, lambda index: index >= first)


_QWEN2: Table = (
    DECODER
    | SLIDING_ABOVE
    | {
        "num_key_value_heads": size("num_key_value_heads", default=32, optional=True),
        "max_position_embeddings": context("max_position_embeddings", default=32768),
    }
)


def _qwen2(v: Values) -> ModelSpec:
    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=True)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM)

    return decoder(v, stack_of(sliding_above(v), block), final_norm=RMS_NORM)


_QWEN3: Table = _QWEN2 | {
    "head_dim": size("head_dim", default=128, optional=True),
    "attention_bias": flag("attention_bias", default=False),
}


def _qwen3(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(v, sliding_window=window, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM)

    return decoder(v, stack_of(sliding_above(v), block), final_norm=RMS_NORM)


_QWEN: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_hidden_layers"),
    "num_attention_heads": size("num_attention_heads"),
    "head_dim": size("kv_channels", default=128),
    "intermediate_size": size("intermediate_size"),
    "max_position_embeddings": context("seq_length", "max_position_embeddings"),
    "hidden_act": text("hidden_act", default="silu"),
    "no_bias": flag("no_bias", default=True),
    "hidden_dropout": probability("emb_dropout_prob", default=0.0),
    "attention_dropout": probability("attn_dropout_prob", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}


def _qwen(v: Values) -> ModelSpec:
    bias = not v.flag("no_bias")
    # The first Qwen writes the width of gate and up together.
    width, odd = divmod(v.integer("intermediate_size"), 2)
    if odd:
        raise v.error(f"intermediate_size={2 * width + 1} holds the gate and the up matrix and must be even")
    mlp = gated_mlp(v, bias=bias, intermediate_size=width)
    block = BlockSpec(mixer=attention(v, qkv_bias=True, out_bias=bias), mlp=mlp, norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


TIKTOKEN_151K = "tiktoken byte-level BPE (151k)"

FAMILIES = (
    Family(title="Qwen", model_types=("qwen",), table=_QWEN, build=_qwen, tokenizer=TIKTOKEN_151K),
    Family(title="Qwen1.5/2/2.5", model_types=("qwen2",), table=_QWEN2, build=_qwen2, tokenizer=TIKTOKEN_151K),
    Family(title="Qwen3", model_types=("qwen3",), table=_QWEN3, build=_qwen3, tokenizer=TIKTOKEN_151K),
)
