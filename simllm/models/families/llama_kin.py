"""The LLaMA block of other houses: InternLM, Seed-OSS, ERNIE 4.5, EXAONE 4, Ministral."""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, flag, probability, size, texts
from simllm.models.families.parts import (
    DECODER,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    stack_of,
    windows,
)
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES"]

_INTERNLM: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "bias": flag("bias", default=True),
}


def _internlm(v: Values) -> ModelSpec:
    bias = v.flag("bias")
    mixer = attention(v, qkv_bias=bias, out_bias=bias)
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_INTERNLM3: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=2, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=32768),
    "attention_bias": flag("qkv_bias", "attention_bias", default=False),
    "mlp_bias": flag("bias", "mlp_bias", default=False),
}


def _internlm3(v: Values) -> ModelSpec:
    # As in the remote code, `bias` is that of the attention's output as well.
    bias = v.flag("mlp_bias")
    mixer = attention(v, qkv_bias=v.flag("attention_bias"), out_bias=bias)
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v, bias=bias), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_SEED_OSS: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=128),
    "max_position_embeddings": context("max_position_embeddings", default=524288),
    "attention_bias": flag("attention_bias", default=True),
    "attention_out_bias": flag("attention_out_bias", default=False),
    "mlp_bias": flag("mlp_bias", default=False),
    "attention_dropout": probability("attention_dropout", default=0.1),
    "hidden_dropout": probability("residual_dropout", default=0.1),
}


def _seed_oss(v: Values) -> ModelSpec:
    mixer = attention(v, qkv_bias=v.flag("attention_bias"), out_bias=v.flag("attention_out_bias"))
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v, bias=v.flag("mlp_bias")), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_ERNIE: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=2, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "use_bias": flag("use_bias", default=False),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _ernie(v: Values) -> ModelSpec:
    bias = v.flag("use_bias")
    block = BlockSpec(mixer=attention(v, qkv_bias=bias, out_bias=bias), mlp=gated_mlp(v, bias=bias), norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


_EXAONE4: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=32, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "sliding_window": size("sliding_window", default=4096, optional=True),
    "layer_types": texts("layer_types"),
}


def _exaone4(v: Values) -> ModelSpec:
    """Norms on the outputs of the sub-layers, QK-norm; with windows, global layers do not rotate."""
    local = v.maybe("sliding_window") is not None

    def block(window: int | None) -> BlockSpec:
        position = "none" if local and window is None else "rope"
        mixer = attention(v, position=position, sliding_window=window, qk_norm=RMS_NORM)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM, norm_placement="output")

    # Three local layers, then a global one.
    return decoder(v, stack_of(windows(v, lambda index: (index + 1) % 4 != 0), block), final_norm=RMS_NORM)


_MINISTRAL: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window": size("sliding_window", default=4096, optional=True),
    "layer_types": texts("layer_types"),
}

_MINISTRAL3: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=128, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=262144),
    "sliding_window": size("sliding_window", default=None),
}


def _ministral(v: Values) -> ModelSpec:
    def block(window: int | None) -> BlockSpec:
        return BlockSpec(mixer=attention(v, sliding_window=window), mlp=gated_mlp(v), norm=RMS_NORM)

    return decoder(v, stack_of(windows(v), block), final_norm=RMS_NORM)


_TEKKEN = "tiktoken byte-level BPE (131k)"

FAMILIES = (
    Family(
        title="InternLM",
        model_types=("internlm", "internlm2"),
        table=_INTERNLM,
        build=_internlm,
        tokenizer="SentencePiece BPE",
    ),
    Family(
        title="InternLM3",
        model_types=("internlm3",),
        table=_INTERNLM3,
        build=_internlm3,
        tokenizer="SentencePiece BPE (128k)",
    ),
    Family(
        title="Seed-OSS", model_types=("seed_oss",), table=_SEED_OSS, build=_seed_oss, tokenizer="byte-level BPE (155k)"
    ),
    Family(
        title="ERNIE-4.5",
        model_types=("ernie4_5",),
        table=_ERNIE,
        build=_ernie,
        tokenizer="SentencePiece BPE (103k)",
    ),
    Family(
        title="EXAONE-4",
        model_types=("exaone4",),
        table=_EXAONE4,
        build=_exaone4,
        tokenizer="byte-level BPE (102k)",
        fixed={"sliding_window_pattern": (4, 0, "LLLG")},
    ),
    Family(title="Ministral", model_types=("ministral",), table=_MINISTRAL, build=_ministral, tokenizer=_TEKKEN),
    Family(title="Ministral-3", model_types=("ministral3",), table=_MINISTRAL3, build=_ministral, tokenizer=_TEKKEN),
)
