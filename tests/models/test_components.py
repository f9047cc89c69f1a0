"""Every component is a field of the spec, has its words, and its effect on parameters, work, bytes, communication."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simllm.models import Model, ModelSpec
from simllm.models.activations import saved_bytes
from simllm.models.catalog import load_model
from simllm.models.components import components, layer_words
from simllm.models.graph import Graph, Implementation, Layout
from simllm.models.operators import Rope
from simllm.models.spec import AttentionSpec, BlockSpec, HeadSpec, MambaSpec, MLPSpec, NormSpec
from simllm.models.work import AttentionWork, Stream
from simllm.parallel.communication import block_collectives
from tests.strategies import LAYERNORM, RMSNORM, gpt_spec

HIDDEN, HEADS, LAYERS, FFN, VOCAB = 256, 8, 2, 1024, 1000
ROWS, IMPL = Layout(batch=2, seq_len=64), Implementation()
BASE = gpt_spec(HIDDEN, HEADS, LAYERS, VOCAB, dropout=0.0)


def attention(**changes: object) -> ModelSpec:
    block = BASE.decoder.layers[0]
    assert isinstance(block.mixer, AttentionSpec)
    return block_of(mixer=replace(block.mixer, **changes))  # type: ignore[arg-type]


def mlp(**changes: object) -> ModelSpec:
    block = BASE.decoder.layers[0]
    assert isinstance(block.mlp, MLPSpec)
    return block_of(mlp=replace(block.mlp, **changes))  # type: ignore[arg-type]


def block_of(**changes: object) -> ModelSpec:
    block: BlockSpec = replace(BASE.decoder.layers[0], **changes)  # type: ignore[arg-type]
    return replace(BASE, decoder=replace(BASE.decoder, layers=(block,) * LAYERS))


def stack(**changes: object) -> ModelSpec:
    return replace(BASE, decoder=replace(BASE.decoder, **changes))  # type: ignore[arg-type]


def parameters(spec: ModelSpec) -> int:
    return Model(spec).parameters.total - Model(BASE).parameters.total


def flops(spec: ModelSpec) -> int:
    return Model(spec).flops(64, 2).forward_masked - Model(BASE).flops(64, 2).forward_masked


def layer(spec: ModelSpec) -> Graph:
    return Model(spec).graph.layers[-1]


def streamed(graph: Graph) -> float:
    """Bytes that bandwidth-bound kernels move forward."""
    work = [item for operator in graph.operators for item in operator.forward(ROWS, IMPL)]
    return sum(item.bytes for item in work if isinstance(item, Stream))


def kept(spec: ModelSpec) -> float:
    return saved_bytes(layer(spec), ROWS, IMPL) - saved_bytes(layer(BASE), ROWS, IMPL)


def word(spec: ModelSpec, name: str) -> str:
    return components(spec)[name]


STREAM = 2 * 64 * HIDDEN * 2  # bytes of one tensor of the residual stream


def test_tokenizer_and_vocabulary() -> None:
    wide = replace(BASE, vocab_size=2 * VOCAB, tokenizer="WordPiece")
    assert (word(wide, "tokenizer"), word(wide, "vocabulary")) == ("WordPiece", "2000")
    assert parameters(wide) == VOCAB * HIDDEN
    assert flops(wide) == 2 * 128 * HIDDEN * VOCAB


def test_padding_of_the_vocabulary() -> None:
    padded = replace(BASE, vocab_multiple=128)
    assert (padded.padded_vocab_size, word(padded, "vocabulary")) == (1024, "1000, padded to 1024")
    assert parameters(padded) == 24 * HIDDEN
    assert flops(padded) == 2 * 128 * HIDDEN * 24
    assert word(replace(BASE, vocab_multiple=8), "vocabulary") == "1000"


def test_learned_and_sinusoidal_positions() -> None:
    learned, sinusoidal = stack(positions=512), stack(sinusoidal=True)
    assert (word(learned, "position"), word(sinusoidal, "position")) == ("learned absolute", "sinusoidal absolute")
    assert (parameters(learned), parameters(sinusoidal)) == (512 * HIDDEN, 0)
    base = streamed(Model(BASE).graph.stem)
    for spec in (learned, sinusoidal):
        assert streamed(Model(spec).graph.stem) == base + STREAM
    gradient = [
        sum(item.bytes for item in Model(spec).graph.stem.operators[0].backward_weight(ROWS, IMPL))  # type: ignore[union-attr]
        for spec in (BASE, sinusoidal, learned)
    ]
    assert gradient[0] == gradient[1] == gradient[2] / 2
    assert load_model("gpt2").decoder.positions == 1024


def test_rotary_positions_are_a_kernel_without_weights() -> None:
    rotary = attention(position="rope")
    assert (word(BASE, "position"), word(rotary, "position")) == ("none", "RoPE")
    assert parameters(rotary) == flops(rotary) == 0
    assert sum(isinstance(operator, Rope) for operator in layer(rotary).operators) == 1
    assert streamed(layer(rotary)) - streamed(layer(BASE)) == 4 * STREAM


def test_alibi_has_neither_weights_nor_a_kernel() -> None:
    alibi = attention(position="alibi")
    assert word(alibi, "position") == "ALiBi"
    assert parameters(alibi) == flops(alibi) == kept(alibi) == 0
    assert streamed(layer(alibi)) == streamed(layer(BASE))


def test_relative_positions() -> None:
    shared, own = stack(relative_attention_num_buckets=32), attention(relative_attention_num_buckets=32)
    assert word(shared, "position") == "relative bias (buckets)"
    assert (parameters(shared), parameters(own)) == (32 * HEADS, 32 * HEADS * LAYERS)
    xl = attention(position="transformer-xl")
    assert word(xl, "position") == "Transformer-XL relative"
    assert parameters(xl) == LAYERS * (HIDDEN * HIDDEN + 2 * HIDDEN)


@pytest.mark.parametrize(
    ("norm", "words", "per_norm"),
    [
        (LAYERNORM, "LayerNorm, pre", 2 * HIDDEN),
        (RMSNORM, "RMSNorm, pre", HIDDEN),
        (NormSpec(kind="layernorm"), "LayerNorm without bias, pre", HIDDEN),
        (NormSpec(kind="layernorm", affine=False), "LayerNorm without weights, pre", 0),
    ],
)
def test_kinds_of_norms(norm: NormSpec, words: str, per_norm: int) -> None:
    spec = block_of(norm=norm)
    assert word(spec, "norm") == words
    assert parameters(spec) == 2 * LAYERS * (per_norm - 2 * HIDDEN)
    # LayerNorm keeps a mean beside the inverse deviation: one float32 a row and norm.
    assert kept(spec) == (-2 * 128 * 4 if norm.kind == "rmsnorm" else 0)


def test_places_of_norms() -> None:
    for placement, norms in (("pre", 2), ("post", 2), ("output", 2), ("sandwich", 4)):
        spec = block_of(norm_placement=placement)
        assert word(spec, "norm") == f"LayerNorm, {placement}"
        assert parameters(spec) == LAYERS * (norms - 2) * 2 * HIDDEN
        assert streamed(layer(spec)) - streamed(layer(BASE)) == (norms - 2) * 2 * STREAM


def test_deepnorm_scales_the_residual() -> None:
    deep, post = block_of(norm_placement="post", residual_scale=2.0), block_of(norm_placement="post")
    assert word(deep, "norm") == "LayerNorm, post, DeepNorm (residual x 2)"
    assert parameters(deep) == kept(deep) - kept(post) == 0
    # Two residual sums, each with a kernel that reads and writes the stream.
    assert streamed(layer(deep)) - streamed(layer(post)) == 2 * 2 * STREAM
    # GLM: alpha = (2 layers) ^ 1/2 (arXiv:2210.02414, section 2.1).
    for name, layers in (("chatglm-6b", 28), ("glm-130b", 70)):
        block = load_model(name).decoder.layers[0]
        assert block.residual_scale == pytest.approx((2 * layers) ** 0.5)
        assert "DeepNorm" in components(load_model(name))["norm"]


def test_norms_of_queries_and_keys() -> None:
    by_head = attention(qk_norm=RMSNORM)
    over_all = attention(qk_norm=RMSNORM, qk_norm_per_head=False)
    assert word(by_head, "norm") == word(over_all, "norm") == "LayerNorm, pre, QK-norm"
    assert parameters(by_head) == LAYERS * 2 * (HIDDEN // HEADS)
    assert parameters(over_all) == LAYERS * 2 * HIDDEN
    assert streamed(layer(by_head)) - streamed(layer(BASE)) == 2 * 2 * STREAM


def test_embedding_norm() -> None:
    spec = stack(embedding_norm=LAYERNORM)
    assert word(spec, "norm") == "LayerNorm, pre, embedding norm"
    assert parameters(spec) == 2 * HIDDEN
    assert streamed(Model(spec).graph.stem) - streamed(Model(BASE).graph.stem) == 2 * STREAM


def test_activations() -> None:
    assert word(mlp(activation="relu"), "activation") == "relu"
    assert word(BASE, "activation") == "gelu"
    for function, name in (("silu", "SwiGLU"), ("gelu_pytorch_tanh", "GeGLU"), ("relu", "ReGLU")):
        gated = mlp(activation=function, gated=True)
        assert word(gated, "activation") == name
        assert parameters(gated) == LAYERS * (HIDDEN * FFN + FFN)
        assert flops(gated) == LAYERS * 2 * 128 * HIDDEN * FFN
        assert kept(gated) == 128 * FFN * 2  # gate and up instead of up


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, "MHA"), (2, "GQA"), (1, "MQA")])
def test_heads(kv_heads: int, kind: str) -> None:
    spec = attention(num_key_value_heads=kv_heads)
    less = 2 * HIDDEN * (1 - kv_heads / HEADS)
    assert word(spec, "attention") == kind
    assert parameters(spec) == -LAYERS * (HIDDEN + 1) * less
    assert flops(spec) == -LAYERS * 2 * 128 * HIDDEN * less
    assert Model(spec).kv_cache_bytes_per_token() == LAYERS * 2 * (HIDDEN // HEADS) * kv_heads * 2
    assert kept(spec) == -128 * less * 2
    ring = Layout(batch=2, seq_len=64, cp=2)
    sent = sum(c.size_bytes * c.count for c in block_collectives(layer(spec), ring, IMPL) if c.phase == "forward")
    assert sent == 64 * 2 * (HIDDEN // HEADS) * kv_heads * 2


def test_latent_attention() -> None:
    model = Model.load("deepseek-v2-lite")
    assert model.components["attention"] == "MLA"
    assert model.kv_cache_bytes_per_token() == 27 * (512 + 64) * 2
    assert layer_words(model.spec.decoder.layers[0]) == "MLA, SwiGLU MLP"


def test_windows_and_alternating_attention() -> None:
    window, whole = attention(sliding_window=16), BASE.decoder.layers[0]
    assert word(window, "attention") == "MHA with window 16"
    pairs = 16 * 17 // 2 + 48 * 16
    assert flops(window) == LAYERS * 2 * HEADS * 4 * (HIDDEN // HEADS) * (pairs - 64 * 65 // 2)
    assert Model(window).flops(64).forward_full_attention == Model(BASE).flops(64).forward_full_attention
    mixed = stack(layers=(window.decoder.layers[0], whole))
    assert word(mixed, "attention") == "MHA with window 16 (1 of 2 layers) + MHA (1 of 2 layers)"
    assert flops(mixed) == flops(window) // 2
    gemma = components(load_model("gemma-2-2b"))["attention"]
    assert gemma == "GQA with window 4096 (13 of 26 layers) + GQA (13 of 26 layers)"


def test_sinks() -> None:
    spec = attention(sinks=True)
    assert word(spec, "attention") == "MHA with sinks"
    assert parameters(spec) == LAYERS * HEADS
    # One number a head, split over tensor-parallel ranks like the heads.
    sink = next(weight for weight in layer(spec).weights if weight.name == "sinks")
    assert Layout(tp=4).weight_elements(sink) == HEADS // 4


def test_biases() -> None:
    assert word(BASE, "bias") == "q, k, v, attention output, MLP"
    assert parameters(attention(qkv_bias=False)) == -LAYERS * 3 * HIDDEN
    assert parameters(attention(out_bias=False)) == -LAYERS * HIDDEN
    assert parameters(mlp(bias=False)) == -LAYERS * (FFN + HIDDEN)
    headed = replace(BASE, head=HeadSpec(tied=True, bias=True))
    assert word(headed, "bias").endswith("MLP, head")
    assert parameters(headed) == VOCAB
    assert word(attention(qkv_bias=False, out_bias=False), "bias") == "MLP"
    assert components(load_model("gpt-oss-20b"))["bias"].endswith("router")


def test_parallel_blocks() -> None:
    own, shared = block_of(parallel=True), block_of(parallel=True, shared_norm=True)
    assert (word(BASE, "parallel_block"), word(own, "parallel_block")) == ("no", "yes")
    assert word(own, "norm") == "LayerNorm, pre, one for each branch"
    assert word(shared, "norm") == "LayerNorm, pre, one for both branches"
    assert (parameters(own), parameters(shared)) == (0, -LAYERS * 2 * HIDDEN)
    split = Layout(batch=2, seq_len=64, tp=4)
    sums = [
        len([c for c in block_collectives(layer(spec), split, IMPL) if c.phase == "forward"]) for spec in (BASE, own)
    ]
    assert sums == [2, 1]


def test_heads_of_the_model() -> None:
    untied = replace(BASE, head=HeadSpec(tied=False))
    assert (word(BASE, "head"), word(untied, "head")) == ("tied to the token table", "own matrix")
    assert parameters(untied) == VOCAB * HIDDEN
    assert flops(untied) == 0
    assert Model(BASE).parameters.lm_head == 0


def test_state_space_mixers() -> None:
    mamba = block_of(
        mixer=MambaSpec(inner_size=512, state_size=16, conv_kernel=4, dt_rank=16, inner_norm=RMSNORM), mlp=None
    )
    assert word(mamba, "attention") == "Mamba"
    assert "norms inside the mixer" in word(mamba, "norm")
    assert word(mamba, "activation") == "silu (mixer)"
    assert word(mamba, "position") == "none"
    assert not any(isinstance(item, AttentionWork) for op in layer(mamba).operators for item in op.forward(ROWS, IMPL))
    jamba = components(load_model("jamba-v0.1"))["attention"]
    assert jamba == "Mamba (28 of 32 layers) + GQA (4 of 32 layers)"


def test_experts_and_cross_attention_in_words() -> None:
    assert components(load_model("deepseek-v3"))["experts"] == "8 of 256 in 58 of 61 layers, shared expert"
    assert components(load_model("glam-64b-64e"))["activation"] == "GeGLU (32 of 64 layers) + gelu (32 of 64 layers)"
    assert components(load_model("t5-base"))["attention"] == "MHA with cross-attention"
    assert components(load_model("u-palm-540b"))["attention"] == "MQA"
