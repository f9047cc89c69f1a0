"""Models that were described but not released: PaLM, LaMDA, Gopher, Chinchilla, GLaM.

Their configs use Hugging Face's usual names with ``head_dim`` written out, since heads x head_dim is often not
hidden_size.
"""

from __future__ import annotations

from simllm.models.families.fields import Table, Values, context, experts, flag, size, text
from simllm.models.families.parts import (
    DECODER,
    LAYER_NORM_NO_BIAS,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    mixture,
    plain_mlp,
    stack_of,
)
from simllm.models.spec import BlockSpec, MLPSpec, ModelSpec, MoESpec

__all__ = ["FAMILIES"]

#: Rows of T5's relative-bias table (arXiv:1910.10683, section 2.1), which LaMDA takes over.
_T5_BUCKETS = 32

_COMMON: Table = DECODER | {
    "head_dim": size("head_dim"),
    "max_position_embeddings": context("max_position_embeddings"),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}

_PALM: Table = _COMMON | {
    "num_key_value_heads": size("num_key_value_heads", default=1),
    "prefix_lm": flag("prefix_lm", default=False),
}


def _palm(v: Values) -> ModelSpec:
    """Parallel blocks, one norm, multi-query attention, SwiGLU, no biases (arXiv:2204.02311, section 2)."""
    prefix = v.flag("prefix_lm")
    block = BlockSpec(
        mixer=attention(v, mask="prefix" if prefix else "causal"),
        mlp=gated_mlp(v),
        norm=LAYER_NORM_NO_BIAS,
        parallel=True,
        shared_norm=True,
    )
    return decoder(
        v,
        (block,) * v.integer("num_hidden_layers"),
        final_norm=LAYER_NORM_NO_BIAS,
        architecture="prefix-decoder" if prefix else "causal-decoder",
    )


_GELU: Table = _COMMON | {"hidden_act": text("hidden_act", default="gelu")}


def _lamda(v: Values) -> ModelSpec:
    """Gated GELU and T5's relative attention (arXiv:2201.08239, section 3)."""
    block = BlockSpec(mixer=attention(v, position="relative"), mlp=gated_mlp(v), norm=LAYER_NORM_NO_BIAS)
    return decoder(
        v,
        (block,) * v.integer("num_hidden_layers"),
        final_norm=LAYER_NORM_NO_BIAS,
        relative_attention_num_buckets=_T5_BUCKETS,
        notes=("linear layers and norms are taken to have no biases; the paper does not say",),
    )


def _gopher(v: Values) -> ModelSpec:
    """RMSNorm and Transformer-XL's relative positions (arXiv:2112.11446, section 3.1)."""
    block = BlockSpec(mixer=attention(v, position="transformer-xl"), mlp=plain_mlp(v, bias=False), norm=RMS_NORM)
    return decoder(
        v,
        (block,) * v.integer("num_hidden_layers"),
        final_norm=RMS_NORM,
        notes=("biases of linear layers are not counted; the paper does not say whether there are any",),
    )


_GLAM: Table = _GELU | {
    "num_experts": experts("num_experts"),
    "num_experts_per_tok": experts("num_experts_per_tok"),
    "moe_every": size("moe_every", default=2),
}


def _glam(v: Values) -> ModelSpec:
    """Experts in every other layer, gated GELU in the dense ones (arXiv:2112.06905, section 4)."""
    every = v.integer("moe_every")

    def block(sparse: bool) -> BlockSpec:
        mlp: MLPSpec | MoESpec = mixture(v, plain_mlp(v, bias=False)) if sparse else gated_mlp(v)
        return BlockSpec(mixer=attention(v, position="relative"), mlp=mlp, norm=LAYER_NORM_NO_BIAS)

    keys = ((index + 1) % every == 0 for index in range(v.integer("num_hidden_layers")))
    return decoder(
        v,
        stack_of(keys, block),
        final_norm=LAYER_NORM_NO_BIAS,
        notes=("the relative-bias tables are not counted: their size was not published",),
    )


_SENTENCEPIECE_32K = "SentencePiece BPE (32k)"
_SENTENCEPIECE_256K = "SentencePiece (256k)"

FAMILIES = (
    Family(title="PaLM", model_types=("palm",), table=_PALM, build=_palm, tokenizer=_SENTENCEPIECE_256K),
    Family(title="LaMDA", model_types=("lamda",), table=_GELU, build=_lamda, tokenizer=_SENTENCEPIECE_32K),
    Family(title="Gopher", model_types=("gopher",), table=_GELU, build=_gopher, tokenizer=_SENTENCEPIECE_32K),
    Family(title="Chinchilla", model_types=("chinchilla",), table=_GELU, build=_gopher, tokenizer=_SENTENCEPIECE_32K),
    Family(title="GLaM", model_types=("glam",), table=_GLAM, build=_glam, tokenizer=_SENTENCEPIECE_256K),
)
