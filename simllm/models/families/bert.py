"""Encoders with a masked-language-model head: BERT, RoBERTa, XLM-RoBERTa."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    count,
    layers,
    probability,
    size,
    text,
    vocabulary,
)
from simllm.models.families.parts import LAYER_NORM, Family, attention, plain_mlp
from simllm.models.spec import BlockSpec, HeadSpec, ModelSpec, StackSpec

__all__ = ["FAMILIES"]

_BERT: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_hidden_layers"),
    "num_attention_heads": size("num_attention_heads"),
    "intermediate_size": size("intermediate_size"),
    "max_position_embeddings": size("max_position_embeddings", default=512),
    "type_vocab_size": count("type_vocab_size", default=2),
    "hidden_act": text("hidden_act", default="gelu"),
    "hidden_dropout": probability("hidden_dropout_prob", default=0.1),
    "attention_dropout": probability("attention_probs_dropout_prob", default=0.1),
}

#: RoBERTa's table starts after the padding index, which takes the first rows.
_ROBERTA_OFFSET = 2


def _encoder(v: Values, unused_positions: int) -> ModelSpec:
    block = BlockSpec(
        mixer=attention(v, mask="bidirectional", position="none", qkv_bias=True, out_bias=True),
        mlp=plain_mlp(v, bias=True),
        norm=LAYER_NORM,
        norm_placement="post",
    )
    positions = v.integer("max_position_embeddings")
    return ModelSpec(
        name="",
        family="",
        model_type="",
        architecture="encoder",
        vocab_size=v.integer("vocab_size"),
        hidden_size=v.integer("hidden_size"),
        decoder=StackSpec(
            layers=(block,) * v.integer("num_hidden_layers"),
            positions=positions,
            type_vocab_size=v.integer("type_vocab_size"),
            embedding_norm=LAYER_NORM,
        ),
        head=HeadSpec(tied=True, bias=True, transform=LAYER_NORM),
        context_length=max(1, positions - unused_positions),
        hidden_dropout=v.number("hidden_dropout"),
        attention_dropout=v.number("attention_dropout"),
        notes=("counted with its masked-language-model head and without a pooler",),
    )


def _bert(v: Values) -> ModelSpec:
    return _encoder(v, 0)


def _roberta(v: Values) -> ModelSpec:
    return _encoder(v, _ROBERTA_OFFSET)


_FIXED = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    # Untied, transformers' class keeps a second bias of the vocabulary that nothing reads.
    "tie_word_embeddings": (True,),
}

FAMILIES = (
    Family(title="BERT", model_types=("bert",), table=_BERT, build=_bert, tokenizer="WordPiece", fixed=_FIXED),
    Family(
        title="RoBERTa", model_types=("roberta",), table=_BERT, build=_roberta, tokenizer="byte-level BPE", fixed=_FIXED
    ),
    Family(
        title="XLM-RoBERTa",
        model_types=("xlm-roberta",),
        table=_BERT,
        build=_roberta,
        tokenizer="SentencePiece Unigram (250k)",
        fixed=_FIXED,
    ),
)
