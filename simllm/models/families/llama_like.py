"""Decoders with sequential pre-norm blocks, rotary positions and mostly gated MLPs: the LLaMA line and its kin."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    context,
    flag,
    integers,
    probability,
    size,
    text,
)
from simllm.models.families.parts import (
    DECODER,
    LAYER_NORM,
    LAYER_NORM_NO_BIAS,
    RMS_NORM,
    Family,
    attention,
    decoder,
    gated_mlp,
    plain_mlp,
    stack_of,
    windows,
)
from simllm.models.spec import BlockSpec, ModelSpec, NormSpec

__all__ = ["FAMILIES"]

_LLAMA: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=2048),
    "attention_bias": flag("attention_bias", default=False),
    "mlp_bias": flag("mlp_bias", default=False),
}


def _uniform(v: Values, block: BlockSpec, final_norm: NormSpec) -> ModelSpec:
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=final_norm)


def _llama(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    mixer = attention(v, qkv_bias=bias, out_bias=bias)
    return _uniform(v, BlockSpec(mixer=mixer, mlp=gated_mlp(v, bias=v.flag("mlp_bias")), norm=RMS_NORM), RMS_NORM)


_SMOLLM3: Table = _LLAMA | {
    "num_key_value_heads": size("num_key_value_heads", default=4, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=32768),
    "no_rope_layers": integers("no_rope_layers"),
    "no_rope_layer_interval": size("no_rope_layer_interval", default=4),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _smollm3(v: Values) -> ModelSpec:
    number, bias = v.integer("num_hidden_layers"), v.flag("attention_bias")
    interval = v.integer("no_rope_layer_interval")
    # Despite its name the list holds 1 for layers that do rotate.
    rotates = v.tuple_of_int("no_rope_layers") or tuple(int((index + 1) % interval != 0) for index in range(number))
    if len(rotates) != number:
        raise v.error(f"no_rope_layers has {len(rotates)} entries for {number} layers; give one for each layer")

    def block(rotate: int) -> BlockSpec:
        mixer = attention(v, position="rope" if rotate else "none", qkv_bias=bias, out_bias=bias)
        return BlockSpec(mixer=mixer, mlp=gated_mlp(v, bias=v.flag("mlp_bias")), norm=RMS_NORM)

    return decoder(v, stack_of(rotates, block), final_norm=RMS_NORM)


_MISTRAL: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "head_dim": size("head_dim", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=131072),
    "sliding_window": size("sliding_window", default=4096, optional=True),
}

_PHI3: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=None),
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "sliding_window": size("sliding_window", default=None),
    "hidden_dropout": probability("resid_pdrop", default=0.0),
}


def _windowed(v: Values) -> ModelSpec:
    def block(window: int | None) -> BlockSpec:
        return BlockSpec(mixer=attention(v, sliding_window=window), mlp=gated_mlp(v), norm=RMS_NORM)

    return decoder(v, stack_of(windows(v), block), final_norm=RMS_NORM)


_BAICHUAN: Table = DECODER | {"max_position_embeddings": context("max_position_embeddings", "model_max_length")}

#: Baichuan 7B is rotary, 13B has ALiBi. Nothing but the code beside the weights says which.
_BAICHUAN_7B_HIDDEN = 4096


def _baichuan(v: Values) -> ModelSpec:
    position = "rope" if v.integer("hidden_size") <= _BAICHUAN_7B_HIDDEN else "alibi"
    block = BlockSpec(mixer=attention(v, position=position), mlp=gated_mlp(v), norm=RMS_NORM)
    blocks = (block,) * v.integer("num_hidden_layers")
    kind = {"rope": "rotary positions, as in the 7B models", "alibi": "ALiBi, as in the 13B models"}[position]
    return decoder(v, blocks, final_norm=RMS_NORM, notes=(f"position kind assumed from hidden_size: {kind}",))


_STABLELM: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=32, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "use_qkv_bias": flag("use_qkv_bias", default=False),
    "qk_layernorm": flag("qk_layernorm", default=False),
    "use_parallel_residual": flag("use_parallel_residual", default=False),
    "hidden_dropout": probability("hidden_dropout", default=0.0),
}


def _stablelm(v: Values) -> ModelSpec:
    parallel = v.flag("use_parallel_residual")
    qk_norm = LAYER_NORM_NO_BIAS if v.flag("qk_layernorm") else None
    # Each head has a norm of its own, so the weights are as wide as all heads.
    mixer = attention(v, qkv_bias=v.flag("use_qkv_bias"), qk_norm=qk_norm, qk_norm_per_head=False)
    block = BlockSpec(mixer=mixer, mlp=gated_mlp(v), norm=LAYER_NORM, parallel=parallel, shared_norm=parallel)
    return _uniform(v, block, LAYER_NORM)


_STARCODER2: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=2, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "hidden_act": text("hidden_act", default="gelu_pytorch_tanh"),
    "sliding_window": size("sliding_window", default=None),
    "use_bias": flag("use_bias", default=True),
    "hidden_dropout": probability("residual_dropout", default=0.0),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


def _starcoder2(v: Values) -> ModelSpec:
    bias = v.flag("use_bias")
    mixer = attention(v, sliding_window=v.maybe("sliding_window"), qkv_bias=bias, out_bias=bias)
    return _uniform(v, BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=bias), norm=LAYER_NORM), LAYER_NORM)


_NEMOTRON: Table = _LLAMA | {
    "max_position_embeddings": context("max_position_embeddings", default=4096),
    "hidden_act": text("hidden_act", default="relu2"),
}


def _nemotron(v: Values) -> ModelSpec:
    bias = v.flag("attention_bias")
    mixer = attention(v, qkv_bias=bias, out_bias=bias)
    return _uniform(v, BlockSpec(mixer=mixer, mlp=plain_mlp(v, bias=v.flag("mlp_bias")), norm=LAYER_NORM), LAYER_NORM)


FAMILIES = (
    Family(
        title="LLaMA",
        # Yi's first configs had a model_type of their own.
        model_types=("llama", "Yi"),
        table=_LLAMA,
        build=_llama,
        tokenizer="SentencePiece BPE (LLaMA 1 and 2), tiktoken byte-level BPE (Llama 3)",
    ),
    Family(
        title="Granite", model_types=("granite",), table=_LLAMA, build=_llama, tokenizer="byte-level BPE (StarCoder)"
    ),
    Family(
        title="SmolLM3",
        model_types=("smollm3",),
        table=_SMOLLM3,
        build=_smollm3,
        tokenizer="tiktoken byte-level BPE (128k)",
        fixed={"use_sliding_window": (False,)},
    ),
    Family(
        title="Mistral", model_types=("mistral",), table=_MISTRAL, build=_windowed, tokenizer="SentencePiece BPE (32k)"
    ),
    Family(
        title="Phi-3/4",
        model_types=("phi3",),
        table=_PHI3,
        build=_windowed,
        tokenizer="SentencePiece BPE (Phi-3), tiktoken byte-level BPE (Phi-4)",
        fixed={"attention_bias": (False,)},
    ),
    Family(
        title="Baichuan", model_types=("baichuan",), table=_BAICHUAN, build=_baichuan, tokenizer="SentencePiece BPE"
    ),
    Family(
        title="StableLM",
        # The remote code of 2023 had a model_type of its own.
        model_types=("stablelm", "stablelm_epoch"),
        table=_STABLELM,
        build=_stablelm,
        tokenizer="byte-level BPE",
    ),
    Family(
        title="StarCoder2",
        model_types=("starcoder2",),
        table=_STARCODER2,
        build=_starcoder2,
        tokenizer="byte-level BPE (49k)",
        fixed={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
    ),
    Family(
        title="Nemotron",
        model_types=("nemotron",),
        table=_NEMOTRON,
        build=_nemotron,
        tokenizer="SentencePiece BPE (256k)",
    ),
)
