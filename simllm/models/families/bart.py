"""The encoder-decoders of fairseq: BART (post-norm), mBART, M2M-100 and NLLB (pre-norm, a norm after each stack).

BART and mBART have learned positions and a norm on the embedding; M2M-100 and NLLB have sinusoidal positions and no
norm there.
"""

from __future__ import annotations

from typing import Literal

from simllm.models.families.fields import (
    Table,
    Values,
    flag,
    layers,
    probability,
    size,
    text,
    vocabulary,
)
from simllm.models.families.parts import LAYER_NORM, Family
from simllm.models.spec import AttentionSpec, BlockSpec, HeadSpec, MLPSpec, ModelSpec, StackSpec

__all__ = ["FAMILIES"]

#: BART keeps two unused rows in front of its position tables.
_OFFSET = 2

_BART: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("d_model"),
    "encoder_layers": layers("encoder_layers", default=12),
    "decoder_layers": layers("decoder_layers", default=12),
    "encoder_heads": size("encoder_attention_heads", default=16),
    "decoder_heads": size("decoder_attention_heads", default=16),
    "encoder_ffn": size("encoder_ffn_dim", default=4096),
    "decoder_ffn": size("decoder_ffn_dim", default=4096),
    "max_position_embeddings": size("max_position_embeddings", default=1024),
    "hidden_act": text("activation_function", default="gelu"),
    "hidden_dropout": probability("dropout", default=0.1),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _attention(v: Values, side: str, mask: Literal["causal", "bidirectional", "cross"]) -> AttentionSpec:
    heads, hidden = v.integer(f"{side}_heads"), v.integer("hidden_size")
    if hidden % heads:
        raise v.error(f"{v.spelled(f'{side}_heads')}={heads} does not divide d_model={hidden}")
    return AttentionSpec(
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        mask=mask,
        qkv_bias=True,
        out_bias=True,
    )


def _stack(v: Values, side: Literal["encoder", "decoder"], before: bool, learned: bool) -> StackSpec:
    decodes = side == "decoder"
    block = BlockSpec(
        mixer=_attention(v, side, "causal" if decodes else "bidirectional"),
        mlp=MLPSpec(intermediate_size=v.integer(f"{side}_ffn"), activation=v.text("hidden_act"), bias=True),
        norm=LAYER_NORM,
        norm_placement="pre" if before else "post",
        cross_attention=_attention(v, side, "cross") if decodes else None,
    )
    return StackSpec(
        layers=(block,) * v.integer(f"{side}_layers"),
        positions=v.integer("max_position_embeddings") + _OFFSET if learned else 0,
        sinusoidal=not learned,
        embedding_norm=LAYER_NORM if learned else None,
        final_norm=LAYER_NORM if before else None,
    )


def _model(v: Values, before: bool, learned: bool = True) -> ModelSpec:
    return ModelSpec(
        name="",
        family="",
        model_type="",
        architecture="encoder-decoder",
        vocab_size=v.integer("vocab_size"),
        hidden_size=v.integer("hidden_size"),
        decoder=_stack(v, "decoder", before, learned),
        encoder=_stack(v, "encoder", before, learned),
        head=HeadSpec(tied=v.flag("tie_word_embeddings")),
        context_length=v.integer("max_position_embeddings"),
        hidden_dropout=v.number("hidden_dropout"),
        attention_dropout=v.number("attention_dropout"),
    )


def _bart(v: Values) -> ModelSpec:
    return _model(v, before=False)


def _mbart(v: Values) -> ModelSpec:
    return _model(v, before=True)


def _sinusoidal(v: Values) -> ModelSpec:
    return _model(v, before=True, learned=False)


#: M2M-100 and NLLB: what differs from BART's defaults.
_M2M: Table = _BART | {
    "hidden_act": text("activation_function", default="relu"),
    "attention_dropout": probability("attention_dropout", default=0.1),
}

FAMILIES = (
    Family(
        title="BART",
        model_types=("bart",),
        table=_BART,
        build=_bart,
        tokenizer="byte-level BPE",
        fixed={
            "is_encoder_decoder": (True,),
            "normalize_before": (False,),
            "normalize_embedding": (True,),
            "add_final_layer_norm": (False,),
            "add_bias_logits": (False,),
            "static_position_embeddings": (False,),
        },
    ),
    Family(
        title="mBART",
        model_types=("mbart",),
        table=_BART,
        build=_mbart,
        tokenizer="SentencePiece BPE (250k)",
        fixed={
            "is_encoder_decoder": (True,),
            "normalize_before": (True,),
            "normalize_embedding": (True,),
            "add_final_layer_norm": (True,),
            "add_bias_logits": (False,),
            "static_position_embeddings": (False,),
        },
    ),
    Family(
        title="M2M-100/NLLB",
        model_types=("m2m_100",),
        table=_M2M,
        build=_sinusoidal,
        tokenizer="SentencePiece BPE (128k, 256k)",
        fixed={"is_encoder_decoder": (True,)},
    ),
)
