"""Encoder-decoders with relative position biases: T5, Flan-T5, mT5, UMT5, UL2 and Switch Transformers."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    context,
    count,
    experts,
    flag,
    layers,
    probability,
    size,
    text,
    vocabulary,
)
from simllm.models.families.parts import RMS_NORM, Family, attention, mixture, stack_of
from simllm.models.spec import BlockSpec, HeadSpec, MLPSpec, ModelSpec, MoESpec, StackSpec

__all__ = ["FAMILIES"]

_T5: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("d_model"),
    "head_dim": size("d_kv", default=64),
    "intermediate_size": size("d_ff"),
    "num_hidden_layers": layers("num_layers"),
    "num_decoder_layers": layers("num_decoder_layers", default=None),
    "num_attention_heads": size("num_heads"),
    "relative_attention_num_buckets": size("relative_attention_num_buckets", default=32),
    "feed_forward_proj": text("feed_forward_proj", default="relu"),
    # Training length of the published models; relative positions have no limit of their own.
    "max_position_embeddings": context("n_positions", default=512),
    "dropout": probability("dropout_rate", default=0.1),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}

#: transformers before version 5 unties mT5 by default; from 5 on the flag no longer reaches the head.
_MT5: Table = _T5 | {
    "feed_forward_proj": text("feed_forward_proj", default="gated-gelu"),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}

_UMT5: Table = _MT5 | {"tie_word_embeddings": flag("tie_word_embeddings", default=True)}


def _activation(v: Values) -> tuple[str, bool]:
    """Function and gating of ``feed_forward_proj``: ``relu``, ``gated-gelu``, ``gated-silu``."""
    name = v.text("feed_forward_proj")
    gated, function = name.startswith("gated-"), name.removeprefix("gated-")
    # transformers reads gated-gelu as the tanh form, which is what the original uses.
    return ("gelu_new" if gated and function == "gelu" else function), gated


def _block(v: Values, mlp: MLPSpec | MoESpec, decodes: bool, own_buckets: int) -> BlockSpec:
    return BlockSpec(
        mixer=attention(
            v,
            mask="causal" if decodes else "bidirectional",
            position="relative",
            relative_attention_num_buckets=own_buckets,
        ),
        mlp=mlp,
        norm=RMS_NORM,
        cross_attention=attention(v, mask="cross", position="none") if decodes else None,
    )


def _model(
    v: Values,
    encoder: tuple[BlockSpec, ...],
    decoder: tuple[BlockSpec, ...],
    shared_buckets: int,
) -> ModelSpec:
    def stack(blocks: tuple[BlockSpec, ...]) -> StackSpec:
        return StackSpec(layers=blocks, final_norm=RMS_NORM, relative_attention_num_buckets=shared_buckets)

    return ModelSpec(
        name="",
        family="",
        model_type="",
        architecture="encoder-decoder",
        vocab_size=v.integer("vocab_size"),
        hidden_size=v.integer("hidden_size"),
        decoder=stack(decoder),
        encoder=stack(encoder),
        head=HeadSpec(tied=v.flag("tie_word_embeddings")),
        context_length=v.maybe("max_position_embeddings"),
        hidden_dropout=v.number("dropout"),
        attention_dropout=v.number("dropout"),
    )


def _depths(v: Values) -> tuple[int, int]:
    encoder = v.integer("num_hidden_layers")
    return encoder, v.maybe("num_decoder_layers") or encoder


def _dense(v: Values, shared_buckets: int, own_buckets: int) -> ModelSpec:
    activation, gated = _activation(v)
    mlp = MLPSpec(intermediate_size=v.integer("intermediate_size"), activation=activation, gated=gated)
    encoder, decoder = _depths(v)
    return _model(
        v,
        (_block(v, mlp, False, own_buckets),) * encoder,
        (_block(v, mlp, True, own_buckets),) * decoder,
        shared_buckets,
    )


def _t5(v: Values) -> ModelSpec:
    return _dense(v, v.integer("relative_attention_num_buckets"), 0)


def _umt5(v: Values) -> ModelSpec:
    return _dense(v, 0, v.integer("relative_attention_num_buckets"))


_SWITCH: Table = _T5 | {
    "num_experts": experts("num_experts", default=8),
    "num_experts_per_tok": experts("num_selected_experts", default=1),
    "num_sparse_encoder_layers": count("num_sparse_encoder_layers", default=3),
    "num_sparse_decoder_layers": count("num_sparse_decoder_layers", default=3),
    "num_decoder_layers": layers("num_decoder_layers", default=12, optional=True),
    "encoder_sparse_step": count("encoder_sparse_step", default=None),
    "decoder_sparse_step": count("decoder_sparse_step", default=None),
    "router_bias": flag("router_bias", default=False),
}


def _switch(v: Values) -> ModelSpec:
    activation, gated = _activation(v)
    dense = MLPSpec(intermediate_size=v.integer("intermediate_size"), activation=activation, gated=gated)
    routed = mixture(v, dense, router_bias=v.flag("router_bias"))

    def blocks(depth: int, side: str) -> tuple[BlockSpec, ...]:
        # The second of every `step` layers has experts. Zero sparse layers make one step of the whole stack, which
        # in transformers' class still gives its second layer experts; a step of zero means no experts.
        sparse_layers, step = v.integer(f"num_sparse_{side}_layers"), v.maybe(f"{side}_sparse_step")
        if sparse_layers > depth:
            raise v.error(f"{sparse_layers} sparse layers are more than the {depth} layers of the stack")
        if step is None:
            step = depth // sparse_layers if sparse_layers else depth
        keys = (step == 1 or (step > 1 and index % step == 1) for index in range(depth))
        return stack_of(keys, lambda sparse: _block(v, routed if sparse else dense, side == "decoder", 0))

    encoder, decoder = _depths(v)
    return _model(
        v,
        blocks(encoder, "encoder"),
        blocks(decoder, "decoder"),
        v.integer("relative_attention_num_buckets"),
    )


_FIXED = {"is_encoder_decoder": (True,)}
_UNIGRAM_32K = "SentencePiece Unigram (32k)"
_UNIGRAM_250K = "SentencePiece Unigram (250k)"

FAMILIES = (
    Family(title="T5", model_types=("t5",), table=_T5, build=_t5, tokenizer=_UNIGRAM_32K, fixed=_FIXED),
    Family(title="mT5", model_types=("mt5",), table=_MT5, build=_t5, tokenizer=_UNIGRAM_250K, fixed=_FIXED),
    Family(title="UMT5", model_types=("umt5",), table=_UMT5, build=_umt5, tokenizer=_UNIGRAM_250K, fixed=_FIXED),
    Family(
        title="Switch",
        model_types=("switch_transformers",),
        table=_SWITCH,
        build=_switch,
        tokenizer=_UNIGRAM_32K,
        fixed=_FIXED,
    ),
)
