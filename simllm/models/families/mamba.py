"""State-space models and their hybrids: Mamba, Falcon-Mamba, Jamba."""

from __future__ import annotations

from simllm.models.families.fields import (
    Table,
    Values,
    auto,
    context,
    count,
    experts,
    flag,
    layers,
    size,
    vocabulary,
)
from simllm.models.families.parts import DECODER, RMS_NORM, Family, attention, decoder, gated_mlp, mixture, stack_of
from simllm.models.spec import AttentionSpec, BlockSpec, MambaSpec, MLPSpec, ModelSpec, MoESpec, NormSpec

__all__ = ["FAMILIES"]

_MAMBA: Table = {
    "vocab_size": vocabulary("vocab_size"),
    "hidden_size": size("hidden_size", "d_model"),
    "num_hidden_layers": layers("num_hidden_layers", "n_layer"),
    "inner_size": size("intermediate_size", "d_inner", default=None),
    "expand": size("expand", default=2),
    "state_size": size("state_size", default=16),
    "conv_kernel": size("conv_kernel", default=4),
    "dt_rank": auto("time_step_rank", default=None),
    "conv_bias": flag("use_conv_bias", default=True),
    "proj_bias": flag("use_bias", default=False),
    "max_position_embeddings": context("max_position_embeddings"),
    "tie_word_embeddings": flag("tie_word_embeddings", default=True),
}


#: Scales dt, B and C to unit length; no weights (Falcon-Mamba, arXiv:2410.05355, section 2).
_RMS_PLAIN = NormSpec(kind="rmsnorm", affine=False)


def _mixer(v: Values, inner_norm: NormSpec | None) -> MambaSpec:
    hidden = v.integer("hidden_size")
    return MambaSpec(
        inner_size=v.maybe("inner_size") or v.integer("expand") * hidden,
        state_size=v.integer("state_size"),
        conv_kernel=v.integer("conv_kernel"),
        # "auto" and null: one rank for every 16 channels, rounded up.
        dt_rank=v.maybe("dt_rank") or -(-hidden // 16),
        conv_bias=v.flag("conv_bias"),
        proj_bias=v.flag("proj_bias"),
        inner_norm=inner_norm,
    )


def _model(v: Values, inner_norm: NormSpec | None) -> ModelSpec:
    block = BlockSpec(mixer=_mixer(v, inner_norm), mlp=None, norm=RMS_NORM)
    return decoder(v, (block,) * v.integer("num_hidden_layers"), final_norm=RMS_NORM)


def _mamba(v: Values) -> ModelSpec:
    return _model(v, None)


def _falcon_mamba(v: Values) -> ModelSpec:
    return _model(v, _RMS_PLAIN)


_JAMBA: Table = DECODER | {
    "num_key_value_heads": size("num_key_value_heads", default=8, optional=True),
    "max_position_embeddings": context("max_position_embeddings", default=262144),
    "num_experts": experts("num_experts", "num_local_experts", default=16),
    "num_experts_per_tok": experts("num_experts_per_tok", default=2),
    "attn_layer_period": size("attn_layer_period", default=8),
    "attn_layer_offset": count("attn_layer_offset", default=4),
    "expert_layer_period": size("expert_layer_period", default=2),
    "expert_layer_offset": count("expert_layer_offset", default=1),
    "expand": size("mamba_expand", default=2),
    "state_size": size("mamba_d_state", default=16),
    "conv_kernel": size("mamba_d_conv", default=4),
    "dt_rank": auto("mamba_dt_rank", default=None),
    "conv_bias": flag("mamba_conv_bias", default=True),
    "proj_bias": flag("mamba_proj_bias", default=False),
}


def _jamba(v: Values) -> ModelSpec:
    """One attention layer in every ``attn_layer_period``, experts in every ``expert_layer_period``, no positions."""
    routed = v.integer("num_experts") > 1

    def block(key: tuple[bool, bool]) -> BlockSpec:
        attends, sparse = key
        mixer: AttentionSpec | MambaSpec = _mixer(v, RMS_NORM)
        if attends:
            mixer = attention(v, position="none")
        mlp: MLPSpec | MoESpec = gated_mlp(v)
        if sparse:
            mlp = mixture(v, gated_mlp(v))
        return BlockSpec(mixer=mixer, mlp=mlp, norm=RMS_NORM)

    def every(kind: str, index: int) -> bool:
        return index % v.integer(f"{kind}_layer_period") == v.integer(f"{kind}_layer_offset")

    keys = ((every("attn", i), routed and every("expert", i)) for i in range(v.integer("num_hidden_layers")))
    return decoder(v, stack_of(keys, block), final_norm=RMS_NORM)


FAMILIES = (
    Family(
        title="Mamba",
        model_types=("mamba",),
        table=_MAMBA,
        build=_mamba,
        tokenizer="byte-level BPE (NeoX)",
        fixed={"ssm_cfg": ({},)},
    ),
    Family(
        title="Falcon-Mamba",
        model_types=("falcon_mamba",),
        table=_MAMBA,
        build=_falcon_mamba,
        tokenizer="byte-level BPE (65k)",
    ),
    Family(title="Jamba", model_types=("jamba",), table=_JAMBA, build=_jamba, tokenizer="SentencePiece BPE (65k)"),
)
