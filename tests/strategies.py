"""Hypothesis strategies and small models that tests share."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from simllm.models import Model
from simllm.models.spec import AttentionSpec, BlockSpec, HeadSpec, MLPSpec, ModelSpec, MoESpec, NormSpec, StackSpec

LAYERNORM = NormSpec(kind="layernorm", bias=True)
RMSNORM = NormSpec(kind="rmsnorm")


def gpt_spec(
    hidden: int = 1024, heads: int = 16, layers: int = 2, vocab: int = 50304, dropout: float = 0.1
) -> ModelSpec:
    """A GPT-2-like model: LayerNorm, biases, GELU of four times the width."""
    block = BlockSpec(
        mixer=AttentionSpec(
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=MLPSpec(intermediate_size=4 * hidden, activation="gelu", bias=True),
        norm=LAYERNORM,
    )
    return ModelSpec(
        name="gpt",
        family="GPT",
        model_type="gpt2",
        architecture="causal-decoder",
        vocab_size=vocab,
        hidden_size=hidden,
        decoder=StackSpec(layers=(block,) * layers, final_norm=LAYERNORM),
        head=HeadSpec(tied=True),
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Random decoders whose sizes tp=4, cp=4 and ep=4 divide."""
    heads = draw(st.sampled_from([4, 8, 16]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if heads % n == 0]))
    head_dim = draw(st.sampled_from([16, 64, 128]))
    hidden = draw(st.sampled_from([64, 256, 512]))
    mlp = MLPSpec(
        intermediate_size=draw(st.sampled_from([128, 512, 1536])),
        activation="silu",
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    norm = draw(st.sampled_from([LAYERNORM, RMSNORM, NormSpec(kind="layernorm", affine=False)]))
    parallel = draw(st.booleans())
    dense = BlockSpec(
        mixer=AttentionSpec(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            position=draw(st.sampled_from(["none", "rope", "alibi"])),
            sliding_window=draw(st.sampled_from([None, 64])),
            qkv_bias=draw(st.booleans()),
            qk_norm=draw(st.sampled_from([None, RMSNORM])),
        ),
        mlp=mlp,
        norm=norm,
        norm_placement="pre" if parallel else draw(st.sampled_from(["pre", "post", "sandwich", "output"])),
        residual_scale=draw(st.sampled_from([1.0, 2.5])),
        parallel=parallel,
        shared_norm=parallel and draw(st.booleans()),
    )
    layers = [dense] * draw(st.integers(1, 4))
    if draw(st.booleans()):
        experts = draw(st.sampled_from([4, 8]))
        moe = MoESpec(
            num_experts=experts,
            num_experts_per_tok=draw(st.integers(1, 4)),
            expert=replace(mlp, bias=False),
            shared=draw(st.sampled_from([None, mlp])),
            shared_gate=draw(st.booleans()),
        )
        layers += [replace(dense, mlp=moe)] * draw(st.integers(1, 4))
    dropout = draw(st.sampled_from([0.0, 0.1]))
    return ModelSpec(
        name="random",
        family="random",
        model_type="llama",
        architecture="causal-decoder",
        vocab_size=draw(st.sampled_from([256, 1000])),
        hidden_size=hidden,
        decoder=StackSpec(
            layers=tuple(layers),
            positions=draw(st.sampled_from([0, 1024])),
            sinusoidal=draw(st.booleans()),
            final_norm=norm,
        ),
        vocab_multiple=draw(st.sampled_from([1, 128])),
        multi_token_prediction=(layers[-1],) * draw(st.integers(0, 2)),
        head=HeadSpec(tied=draw(st.booleans()), bias=draw(st.booleans())),
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )


def model(spec: ModelSpec) -> Model:
    """The model of a spec."""
    return Model(spec)
