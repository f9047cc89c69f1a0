"""The model of a published run: its sizes from the row, its components from the catalog or from its family."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.catalog import catalog_names, load_model
from simllm.models.spec import (
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    StackSpec,
)
from simllm.validation.table import Row

__all__ = ["Sizes", "check_parameters", "model_spec", "read_sizes"]

#: Published tables round parameters, and some leave out embeddings; more than this is another model.
_PARAMETER_TOLERANCE = 0.12

#: Where the row names no vocabulary: that of GPT-2, which Megatron-LM's own runs use.
_GPT2_VOCABULARY = 50257

#: Software whose own training script names a tokeniser and ties no tables: the Zero Bubble repository trains with a
#: SentencePiece model (examples/pretrain_zero_bubble.sh, which does not say its size; 32,000 is the usual one) and
#: --untie-embeddings-and-output-weights.
_SENTENCEPIECE_SCRIPTS = ("zero-bubble",)
_SENTENCEPIECE_VOCABULARY = 32000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a row states about its model; None where it does not."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    gated: bool | None = None
    tied: bool | None = None
    experts: int | None = None
    top_k: int | None = None
    moe_ffn: int | None = None


def read_sizes(row: Row) -> Sizes:
    """The sizes in a row's cells."""
    sizes = Sizes(
        layers=row.needed_integer("layers", 10_000),
        hidden=row.needed_integer("hidden"),
        heads=row.needed_integer("heads"),
        kv_heads=row.integer("kv_heads"),
        head_dim=row.integer("head_dim"),
        ffn=row.integer("ffn_hidden"),
        vocab=row.integer("vocab"),
        gated=row.flag("gated_mlp"),
        tied=row.flag("tied_embeddings"),
        experts=row.integer("n_experts", 100_000),
        top_k=row.integer("top_k"),
        moe_ffn=row.integer("moe_ffn_hidden"),
    )
    if sizes.experts is not None and sizes.experts > 1:
        if sizes.top_k is None:
            raise InputError(f"n_experts={sizes.experts} needs top_k, which is not stated")
        if sizes.top_k > sizes.experts:
            raise InputError(f"top_k={sizes.top_k} is more than n_experts={sizes.experts}")
        return sizes
    return replace(sizes, experts=None, top_k=None, moe_ffn=None)


def model_spec(row: Row, seq_len: int, dropout: float) -> ModelSpec:
    """The model of a row.

    The row's own columns decide the sizes. Components that no column names are those of a catalog model of the same
    sizes where there is one, and those of the family otherwise.

    Parameters
    ----------
    row : Row
    seq_len : int
        Rows of a learned position table.
    dropout : float
        Probability of dropout in this training run.
    """
    sizes = read_sizes(row)
    name = row.text("model_name") or row.text("model_family") or f"line {row.line}"
    alike = _catalog_model(sizes, name)
    spec = _from_catalog(row, sizes, alike) if alike else _from_family(row, sizes, name)
    decoder = spec.decoder
    if decoder.positions:
        decoder = replace(decoder, positions=max(decoder.positions, seq_len) if alike else seq_len)
    return replace(spec, name=name, decoder=decoder, hidden_dropout=dropout, attention_dropout=dropout, notes=())


def check_parameters(row: Row, model: Model) -> None:
    """Compare what the columns give with the parameters that the row states.

    The columns of a dense model say all there is; those of a mixture of experts cannot say that only some layers are.

    Raises
    ------
    InputError
        The parameters of a mixture of experts are further from ``params_b`` than rounding explains.
    """
    stated = row.number("params_b")
    if stated is None:
        return
    total = model.parameters.total / 1e9
    if abs(total / stated - 1) <= _PARAMETER_TOLERANCE:
        return
    sentence = f"the columns give a model of {total:.3g} billion parameters, but params_b={stated:g}"
    if any(isinstance(block.mlp, MoESpec) for block in model.spec.decoder.layers):
        raise InputError(f"{sentence}: layers of several kinds, or a wrong cell")
    row.assume(f"{sentence}; the columns decide")


# -- from the catalog --------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _catalog_model(sizes: Sizes, name: str) -> ModelSpec | None:
    """The catalog's model of these sizes, the one with the most similar name if there are several."""
    specs = [load_model(known) for known in catalog_names()]
    alike = [spec for spec in specs if _same_sizes(spec, sizes)]
    if not alike:
        return None
    plain = _letters(name)
    return max(
        alike,
        key=lambda spec: (
            len(spec.decoder.layers) == sizes.layers,
            SequenceMatcher(None, _letters(spec.name), plain).ratio(),
        ),
    )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _first_attention(spec: ModelSpec) -> AttentionSpec | None:
    return next((b.mixer for b in spec.decoder.layers if isinstance(b.mixer, AttentionSpec)), None)


def _same_sizes(spec: ModelSpec, sizes: Sizes) -> bool:
    """Whether a causal decoder has the sizes of a row in all that the row states, whatever its depth and experts."""
    attention = _first_attention(spec)
    if spec.encoder or attention is None or any(not isinstance(b.mixer, AttentionSpec) for b in spec.decoder.layers):
        return False
    moe = next((b.mlp for b in spec.decoder.layers if isinstance(b.mlp, MoESpec)), None)
    dense = next((b.mlp for b in spec.decoder.layers if isinstance(b.mlp, MLPSpec)), None)
    if (moe is None) != (sizes.experts is None):
        return False
    if moe is None and (len(spec.decoder.layers) != sizes.layers or sizes.vocab is None):
        return False  # a dense model of another depth or vocabulary shares no more than its family
    latent = attention.latent is not None
    mlp = dense or (moe.expert if moe else None)
    facts: list[tuple[int | bool | None, int | bool | None]] = [
        (sizes.hidden, spec.hidden_size),
        (sizes.heads, attention.num_attention_heads),
        (sizes.kv_heads, None if latent else attention.num_key_value_heads),
        (sizes.head_dim, None if latent else attention.head_dim),
        (sizes.vocab, spec.vocab_size),
        (sizes.ffn, dense.intermediate_size if dense else None),
        (sizes.moe_ffn, moe.expert.intermediate_size if moe else None),
        (sizes.gated, mlp.gated if mlp else None),
    ]
    return all(stated is None or known is None or stated == known for stated, known in facts)


def _from_catalog(row: Row, sizes: Sizes, known: ModelSpec) -> ModelSpec:
    """A catalog model with the row's depth and number of experts."""
    pattern = known.decoder.layers
    moe = next((block.mlp for block in pattern if isinstance(block.mlp, MoESpec)), None)
    others = [f"{sizes.layers} layers"] if sizes.layers != len(pattern) else []
    if moe is not None and (moe.num_experts, moe.num_experts_per_tok) != (sizes.experts, sizes.top_k):
        others.append(f"{sizes.top_k} of {sizes.experts} experts")
    but = f" but for the {' and '.join(others)}" if others else ""
    row.assume(f"components that no column names are those of {known.name} in the catalog, of the same sizes{but}")
    layers = [_with_experts(pattern[i % len(pattern)], sizes) for i in range(sizes.layers)]
    dense = re.search(r"dense_layers=(\d+)", row.text("notes"))
    if dense and sizes.experts:
        first = int(dense.group(1))
        plain = next((block for block in layers if not isinstance(block.mlp, MoESpec)), None)
        sparse = next(block for block in (_with_experts(b, sizes) for b in pattern) if isinstance(block.mlp, MoESpec))
        if plain is not None:
            layers = [plain] * min(first, sizes.layers) + [sparse] * max(0, sizes.layers - first)
            row.assume(f"the first {first} layers are dense, as the notes state")
    head = known.head if sizes.tied is None else replace(known.head, tied=sizes.tied)
    return replace(known, decoder=replace(known.decoder, layers=tuple(layers)), head=head)


def _with_experts(block: BlockSpec, sizes: Sizes) -> BlockSpec:
    if not isinstance(block.mlp, MoESpec) or sizes.experts is None or sizes.top_k is None:
        return block
    return replace(block, mlp=replace(block.mlp, num_experts=sizes.experts, num_experts_per_tok=sizes.top_k))


# -- from the family ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Components of a family, with the sentence that states them."""

    norm: NormSpec
    bias: bool
    rope: bool
    activation: str
    tied: bool
    sentence: str
    qk_norm: bool = False


_RMS = NormSpec(kind="rmsnorm")
_LAYER = NormSpec(kind="layernorm", bias=True)

_GPT = _Family(
    norm=_LAYER,
    bias=True,
    rope=False,
    activation="gelu",
    tied=True,
    sentence="a two-matrix MLP: LayerNorm, biases and learned positions, as GPT-2 and GPT-3 have",
)
_LLAMA = _Family(
    norm=_RMS,
    bias=False,
    rope=True,
    activation="silu",
    tied=False,
    sentence="a gated MLP: RMSNorm, rotary positions and no biases, as LLaMA has",
)

#: Families whose components the shape of the MLP does not tell, by a word in the model's family or name.
_NAMED: dict[str, _Family] = {
    "nemotron": _Family(
        norm=_LAYER,
        bias=False,
        rope=True,
        activation="relu2",
        tied=False,
        sentence="Nemotron: LayerNorm, squared ReLU, rotary positions and no biases (arXiv:2402.16819, section 2)",
    ),
    "qwen3": replace(
        _LLAMA, qk_norm=True, sentence="Qwen3: RMSNorm, QK-norm, rotary positions, no biases (arXiv:2505.09388)"
    ),
}


def _family(row: Row, gated: bool) -> _Family:
    words = _letters(row.text("model_family") + row.text("model_name"))
    named = next((family for word, family in _NAMED.items() if word in words), None)
    return named or (_LLAMA if gated else _GPT)


def _from_family(row: Row, sizes: Sizes, name: str) -> ModelSpec:
    """A model of equal layers from the row's columns."""
    gated = sizes.gated
    if gated is None:
        gated = "llama" in _letters(row.text("model_family") + name)
        row.assume(f"the MLP is taken as {'gated' if gated else 'two matrices'}, which the row does not state")
    family = _family(row, gated)
    row.assume(family.sentence)
    head_dim = sizes.head_dim
    if head_dim is None:
        if sizes.hidden % sizes.heads:
            raise InputError(f"head_dim is not stated, and heads={sizes.heads} does not divide hidden={sizes.hidden}")
        head_dim = sizes.hidden // sizes.heads
        row.assume(f"head_dim is not stated: hidden / heads = {head_dim}")
    if sizes.kv_heads is None:
        row.assume("kv_heads is not stated: one for every query head")
    kv_heads = sizes.kv_heads or sizes.heads
    if sizes.heads % kv_heads:
        raise InputError(f"kv_heads={kv_heads} does not divide heads={sizes.heads}")
    scripted = any(name in row.text("framework").casefold() for name in _SENTENCEPIECE_SCRIPTS)
    vocab, origin = (_SENTENCEPIECE_VOCABULARY, "SentencePiece") if scripted else (_GPT2_VOCABULARY, "GPT-2")
    if sizes.vocab is None:
        row.assume(f"vocab is not stated: {vocab}, that of {origin}")
    tied = (family.tied and not scripted) if sizes.tied is None else sizes.tied
    if sizes.tied is None:
        row.assume(f"tied_embeddings is not stated: {'tied' if tied else 'not tied'}")
    attention = AttentionSpec(
        num_attention_heads=sizes.heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        position="rope" if family.rope else "none",
        qkv_bias=family.bias,
        out_bias=family.bias,
        qk_norm=family.norm if family.qk_norm else None,
    )
    block = BlockSpec(mixer=attention, mlp=_mlp(row, sizes, family, gated), norm=family.norm)
    return ModelSpec(
        name=name,
        family=row.text("model_family") or "unknown",
        model_type="published-run",
        architecture="causal-decoder",
        vocab_size=sizes.vocab or vocab,
        hidden_size=sizes.hidden,
        decoder=StackSpec(layers=(block,) * sizes.layers, positions=0 if family.rope else 1, final_norm=family.norm),
        head=HeadSpec(tied=tied),
    )


def _mlp(row: Row, sizes: Sizes, family: _Family, gated: bool) -> MLPSpec | MoESpec:
    width = sizes.moe_ffn or sizes.ffn if sizes.experts else sizes.ffn
    if width is None:
        if gated or sizes.experts:
            raise InputError("ffn_hidden is not stated, and a gated MLP has no usual width")
        width = 4 * sizes.hidden
        row.assume("ffn_hidden is not stated: four times hidden")
    mlp = MLPSpec(intermediate_size=width, activation=family.activation, gated=gated, bias=family.bias)
    if sizes.experts is None or sizes.top_k is None:
        return mlp
    row.assume("every layer is a mixture of experts without a shared one")
    return MoESpec(num_experts=sizes.experts, num_experts_per_tok=sizes.top_k, expert=mlp)
