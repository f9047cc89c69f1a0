"""Pieces that the families share: norms, attention, feed-forward layers, stacks, whole decoders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from simllm.models.families.fields import Table, Values, context, flag, layers, probability, size, text, vocabulary
from simllm.models.spec import (
    Architecture,
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    StackSpec,
)

__all__ = [
    "DECODER",
    "LAYER_NORM",
    "LAYER_NORM_NO_BIAS",
    "LAYER_NORM_PLAIN",
    "RMS_NORM",
    "Family",
    "attention",
    "decoder",
    "gated_mlp",
    "layer_kinds",
    "mixture",
    "plain_mlp",
    "stack_of",
    "windows",
]

LAYER_NORM = NormSpec(kind="layernorm", bias=True)
LAYER_NORM_NO_BIAS = NormSpec(kind="layernorm")
#: No weights at all (OLMo, arXiv:2402.00838, section 2.1).
LAYER_NORM_PLAIN = NormSpec(kind="layernorm", affine=False)
RMS_NORM = NormSpec(kind="rmsnorm")

#: The fields that most causal decoders of transformers spell alike. A family overrides what differs.
DECODER: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size"),
    "num_hidden_layers": layers("num_hidden_layers"),
    "num_attention_heads": size("num_attention_heads"),
    "intermediate_size": size("intermediate_size"),
    "max_position_embeddings": context("max_position_embeddings"),
    "hidden_act": text("hidden_act", default="silu"),
    "attention_dropout": probability("attention_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=False),
}

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How configs of some ``model_type`` become specs.

    Attributes
    ----------
    title : str
        The family's name in tables.
    model_types : tuple of str
        What the config's ``model_type`` says.
    table : Table
        Its fields.
    build : callable
        From checked values to a spec; the importer sets the name, the family and the model type.
    tokenizer : str
        Kind of tokenizer that the family's models were published with.
    fixed : mapping
        Keys that would change the model, with the only values that are modelled; null is always accepted.
    nested : str
        Key of the object that holds the text model of a multimodal config; empty: fields are at the top.
    marker : str
        A key that tells this family from others with the same ``model_type``; empty: none needed.
    """

    title: str
    model_types: tuple[str, ...]
    table: Table
    build: Callable[[Values], ModelSpec]
    tokenizer: str
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    nested: str = ""
    marker: str = ""


def head_dim_of(v: Values, heads: int) -> int:
    """The config's own head size, else hidden_size / num_attention_heads, which must then be whole."""
    own = v.maybe("head_dim")
    if own is not None:
        return own
    hidden = v.integer("hidden_size")
    if hidden % heads:
        raise v.error(
            f"{v.spelled('num_attention_heads')}={heads} does not divide {v.spelled('hidden_size')}={hidden}; "
            f"choose a number of heads that divides it, or give head_dim where the family has it"
        )
    return hidden // heads


def attention(v: Values, **changes: Any) -> AttentionSpec:
    """Self-attention from the usual fields, with rotary positions unless ``changes`` says otherwise.

    ``num_key_value_heads`` absent or null means as many as ``num_attention_heads``.
    """
    heads = v.integer("num_attention_heads")
    kv_heads = changes.pop("num_key_value_heads", None) or v.maybe("num_key_value_heads") or heads
    if heads % kv_heads:
        raise v.error(
            f"{v.spelled('num_key_value_heads')}={kv_heads} does not divide "
            f"{v.spelled('num_attention_heads')}={heads}; every key-value head serves the same number of query heads"
        )
    return AttentionSpec(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=changes.pop("head_dim", None) or head_dim_of(v, heads),
        position=changes.pop("position", "rope"),
        **changes,
    )


def plain_mlp(v: Values, *, bias: bool, intermediate_size: int | None = None) -> MLPSpec:
    """Two matrices; four times hidden_size wide when the config does not say it."""
    width = intermediate_size or v.maybe("intermediate_size") or 4 * v.integer("hidden_size")
    return MLPSpec(intermediate_size=width, activation=v.text("hidden_act"), bias=bias)


def gated_mlp(v: Values, *, bias: bool = False, intermediate_size: int | None = None) -> MLPSpec:
    """Three matrices (GLU, arXiv:2002.05202)."""
    width = intermediate_size or v.integer("intermediate_size")
    return MLPSpec(intermediate_size=width, activation=v.text("hidden_act"), gated=True, bias=bias)


def mixture(v: Values, expert: MLPSpec, **changes: Any) -> MoESpec:
    """A mixture of experts from ``num_experts`` and ``num_experts_per_tok``."""
    total, chosen = v.integer("num_experts"), v.integer("num_experts_per_tok")
    if chosen > total:
        raise v.error(
            f"{v.spelled('num_experts_per_tok')}={chosen} is more than {v.spelled('num_experts')}={total}; "
            f"a token cannot choose more experts than there are"
        )
    return MoESpec(num_experts=total, num_experts_per_tok=chosen, expert=expert, **changes)


def stack_of(keys: Iterable[Key], make: Callable[[Key], BlockSpec]) -> tuple[BlockSpec, ...]:
    """One layer per key; equal keys share one object."""
    order = tuple(keys)
    made = {key: make(key) for key in dict.fromkeys(order)}
    return tuple(made[key] for key in order)


def layer_kinds(v: Values, default: Sequence[str]) -> tuple[str, ...]:
    """``layer_types`` of the config, checked, or the family's own pattern."""
    given = v.tuple_of_text("layer_types")
    if given is None:
        return tuple(default)
    number = v.integer("num_hidden_layers")
    if len(given) != number:
        raise v.error(f"layer_types has {len(given)} entries for {number} layers; give one for each layer")
    known = ("full_attention", "sliding_attention", "chunked_attention")
    for kind in given:
        if kind not in known:
            raise v.unsupported(f"layer type {kind!r} is not modelled; known: {', '.join(known)}")
    return given


def windows(v: Values, local: Callable[[int], bool] = lambda _: True) -> tuple[int | None, ...]:
    """The attention window of each layer; None: the whole sequence.

    Parameters
    ----------
    v : Values
        ``sliding_window`` null, 0 or absent: no layer has one. ``layer_types`` wins over the pattern.
    local : callable
        The family's pattern: whether the layer of that index (from 0) is a local one.
    """
    number, window = v.integer("num_hidden_layers"), v.maybe("sliding_window")
    if not window:
        return (None,) * number
    pattern = ["sliding_attention" if local(index) else "full_attention" for index in range(number)]
    return tuple(None if kind == "full_attention" else window for kind in layer_kinds(v, pattern))


def decoder(
    v: Values,
    blocks: tuple[BlockSpec, ...],
    *,
    final_norm: NormSpec | None,
    embedding_norm: NormSpec | None = None,
    positions: int = 0,
    relative_attention_num_buckets: int = 0,
    embedding_size: int | None = None,
    head_bias: bool = False,
    vocab_size: int | None = None,
    sinusoidal: bool = False,
    architecture: Architecture = "causal-decoder",
    notes: tuple[str, ...] = (),
) -> ModelSpec:
    """A decoder-only model around its layers. The importer fills in name, family, model type and tokenizer."""
    return ModelSpec(
        name="",
        family="",
        model_type="",
        architecture=architecture,
        vocab_size=vocab_size or v.integer("vocab_size"),
        hidden_size=v.integer("hidden_size"),
        decoder=StackSpec(
            layers=blocks,
            positions=positions,
            sinusoidal=sinusoidal,
            embedding_norm=embedding_norm,
            final_norm=final_norm,
            relative_attention_num_buckets=relative_attention_num_buckets,
        ),
        head=HeadSpec(tied=v.flag("tie_word_embeddings"), bias=head_bias),
        embedding_size=embedding_size,
        context_length=v.maybe("max_position_embeddings"),
        hidden_dropout=v.number("hidden_dropout"),
        attention_dropout=v.number("attention_dropout"),
        notes=notes,
    )
