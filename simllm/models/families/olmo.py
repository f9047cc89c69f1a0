"""OLMo 1 (norms without weights), OLMo 2 and 3 (norms on the outputs of the sub-layers), and OLMo 1's remote code."""

from __future__ import annotations

from dataclasses import replace

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
from simllm.models.families.parts import (
    DECODER,
    LAYER_NORM,
    LAYER_NORM_NO_BIAS,
    LAYER_NORM_PLAIN,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    plain_mlp,
    stack_of,
    windows,
)
from simllm.models.spec import BlockSpec, ModelSpec

__all__ = ["FAMILIES"]

_OLMO: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "attention_bias": flag("attention_bias", default=False),
}


def _olmo(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    mixer = attention(v, qkv_bias=bias, out_bias=bias)
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=LAYER_NORM_PLAIN)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=LAYER_NORM_PLAIN)


_OLMO3: Table = _OLMO | {
    "sliding_window": size("sliding_window", default=4096, optional=True),
    "layer_types": texts("layer_types"),
}


def _olmo2(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")

    def block(window: int | None) -> BlockSpec:
        mixer = attention(
            v, sliding_window=window, qkv_bias=bias, out_bias=bias, qk_norm=RMS_NORM, qk_norm_per_head=False
        )
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=RMS_NORM, norm_placement="output")

    # OLMo 3: three local layers, then a global one. OLMo 2 has no windows.
    return decoder(v, stack_of(windows(v, lambda index: (index + 1) % 4 != 0), block), final_norm=RMS_NORM)


#: The fields of the training code, with its defaults (allenai/OLMo, olmo/config.py).
_HF_OLMO: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "embedding_size": count("embedding_size", default=None),
    "hidden_size": size("d_model"),
    "num_hidden_layers": layers("n_layers"),
    "num_attention_heads": size("n_heads"),
    "num_key_value_heads": size("n_kv_heads", default=None),
    "multi_query": flag("multi_query_attention", default=False),
    "mlp_ratio": size("mlp_ratio", default=4),
    "mlp_hidden_size": size("mlp_hidden_size", default=None),
    "hidden_act": text("activation_type", default="swiglu"),
    "layer_norm_type": text("layer_norm_type", default="default"),
    "affine": flag("layer_norm_with_affine", default=True),
    "bias_for_layer_norm": flag("bias_for_layer_norm", default=None),
    "bias": flag("include_bias", default=True),
    "alibi": flag("alibi", default=False),
    "rope": flag("rope", default=False),
    "max_position_embeddings": size("max_sequence_length", default=1024),
    "hidden_dropout": probability("residual_dropout", default=0.1),
    "attention_dropout": probability("attention_dropout", default=0.1),
    "tie_word_embeddings": flag("weight_tying", default=True),
}


def _hf_olmo(v: Values) -> ModelSpec:
    gated = v.text("hidden_act") == "swiglu"
    # The published width of a gated MLP counts gate and up together.
    width = v.maybe("mlp_hidden_size") or v.integer("mlp_ratio") * v.integer("hidden_size")
    bias, affine = v.flag("bias"), v.flag("affine")
    norm = LAYER_NORM_PLAIN
    if affine:
        norm = LAYER_NORM if v.given("bias_for_layer_norm", bias) else LAYER_NORM_NO_BIAS
    if v.text("layer_norm_type") == "rms":
        norm = RMS_NORM
        if not affine:
            raise v.unsupported("layer_norm_type='rms' without layer_norm_with_affine is not modelled")
    rotates, alibi = v.flag("rope"), v.flag("alibi")
    mixer = attention(
        v,
        num_key_value_heads=1 if v.flag("multi_query") else None,
        position="rope" if rotates else "alibi" if alibi else "none",
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = (
        replace(gated_mlp(v, bias=bias, intermediate_size=width // 2), activation="silu")
        if gated
        else plain_mlp(v, bias=bias, intermediate_size=width)
    )
    learned = 0 if rotates or alibi else v.integer("max_position_embeddings")
    block = BlockSpec(mixer=mixer, mlp=mlp, norm=norm)
    return decoder(
        v,
        (block,) * v.integer("num_hidden_layers"),
        final_norm=norm,
        positions=learned,
        vocab_size=v.maybe("embedding_size") or v.integer("vocab_size"),
    )


_TOKENIZER, _TOKENIZER_2 = "byte-level BPE (NeoX)", "tiktoken byte-level BPE (100k)"

FAMILIES = (
    Family(title="OLMo", model_types=("olmo",), table=_OLMO, build=_olmo, tokenizer=_TOKENIZER),
    Family(
        title="OLMo",
        model_types=("hf_olmo",),
        table=_HF_OLMO,
        build=_hf_olmo,
        tokenizer=_TOKENIZER,
        fixed={
            "block_type": ("sequential",),
            "activation_type": ("swiglu", "gelu", "relu"),
            "layer_norm_type": ("default", "low_precision", "rms"),
            "attention_layer_norm": (False,),
        },
    ),
    Family(title="OLMo-2", model_types=("olmo2",), table=_OLMO, build=_olmo2, tokenizer=_TOKENIZER_2),
    Family(title="OLMo-3", model_types=("olmo3",), table=_OLMO3, build=_olmo2, tokenizer=_TOKENIZER_2),
)
