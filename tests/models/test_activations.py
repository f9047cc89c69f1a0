"""What a layer keeps: the published formulas as special cases, and what must always hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.activations import Recompute, kept_tensors, saved_bytes, saved_bytes_by_operator
from simllm.models.build import build_graph
from simllm.models.graph import Implementation, Layout
from simllm.models.spec import ModelSpec
from tests.strategies import gpt_spec, specs

UNFUSED = Implementation(attention="unfused")
NONE, SELECTIVE, FULL = Recompute(), Recompute(kind="selective"), Recompute(kind="full")

SHAPES = [
    # batch, sequence, hidden, heads, tp
    (1, 128, 256, 4, 1),
    (2, 128, 256, 4, 2),
    (4, 512, 1024, 16, 4),
    (1, 1024, 1024, 16, 8),
    (3, 256, 768, 12, 4),
    (8, 2048, 1600, 20, 4),
    (4, 2048, 6144, 64, 8),
    (1, 2048, 12288, 96, 8),
    (1, 2048, 20480, 128, 8),
    (1, 2048, 25600, 160, 8),
]


@pytest.mark.parametrize(("b", "s", "h", "a", "t"), SHAPES)
def test_korthikanti_2022(b: int, s: int, h: int, a: int, t: int) -> None:
    """arXiv:2205.05198, equations 1, 2, 4 and 6, and the text of section 5.

    The paper counts no statistics of the norms; there are two float32 of each row and norm.
    """
    layer = build_graph(gpt_spec(hidden=h, heads=a)).layers[0]
    statistics = 2 * 2 * 4 * b * s

    def kept(policy: Recompute, **degrees: object) -> float:
        layout = Layout(batch=b, seq_len=s, **degrees)  # type: ignore[arg-type]
        shared = t if degrees.get("sequence_parallel") else 1
        return saved_bytes(layer, layout, UNFUSED, policy) - (0 if policy == FULL else statistics // shared)

    unit = s * b * h
    assert kept(NONE) == unit * 34 + 5 * a * s * s * b
    assert kept(SELECTIVE) == unit * 34
    assert kept(FULL) == unit * 2
    assert kept(NONE, tp=t) * t == pytest.approx(unit * (10 * t + 24) + 5 * a * s * s * b, rel=1e-12)
    if t > 1:
        assert kept(NONE, tp=t, sequence_parallel=True) * t == pytest.approx(unit * 34 + 5 * a * s * s * b, rel=1e-12)
        assert kept(SELECTIVE, tp=t, sequence_parallel=True) * t == pytest.approx(unit * 34, rel=1e-12)
        assert kept(FULL, tp=t, sequence_parallel=True) * t == unit * 2


def test_flash_attention_keeps_its_output_and_one_number_per_query() -> None:
    layer = build_graph(gpt_spec(dropout=0.0)).layers[0]
    layout = Layout(batch=2, seq_len=512)
    difference = saved_bytes(layer, layout, UNFUSED) - saved_bytes(layer, layout, Implementation())
    # The softmax of every score against one float32 per query and head.
    assert difference == 2 * 16 * 512 * 512 * 2 - 2 * 16 * 512 * 4


def test_llama_layer_by_hand() -> None:
    """Bytes per token of a Llama-3-8B layer with flash attention and fused SwiGLU."""
    layer = Model.load("llama-3-8b").graph.layers[0]
    by_operator = saved_bytes_by_operator(layer, Layout(), Implementation())
    assert by_operator == {
        "mixer_norm": 2 * 4096 + 4,
        "qkv": 2 * 4096,
        "attention_core": 2 * (4096 + 2 * 1024 + 4096) + 4 * 32,
        "mlp_norm": 2 * 4096 + 4,
        "gate_up": 2 * 4096,
        "act": 2 * 2 * 14336,
        "down": 2 * 14336,
    }


def test_eager_gated_activation_keeps_one_tensor_more() -> None:
    layer = Model.load("llama-3-8b").graph.layers[0]
    eager = Implementation(activation="eager")
    assert saved_bytes(layer, Layout(), eager) - saved_bytes(layer, Layout(), Implementation()) == 2 * 14336


def test_encoder_result_is_kept_once() -> None:
    graph = Model.load("t5-base").graph
    decoder = graph.layers[-1]
    assert "memory" not in kept_tensors(decoder, Implementation())
    assert "memory" in kept_tensors(graph.bridges[0][1], Implementation())


@settings(deadline=None)
@given(specs(), st.sampled_from(["flash", "unfused"]), st.sampled_from(["fused", "eager"]))
def test_more_recomputation_or_sharding_never_keeps_more(spec: ModelSpec, attention: str, fused: str) -> None:
    impl = Implementation(attention=attention, activation=fused, norm=fused)  # type: ignore[arg-type]
    layout = Layout(batch=2, seq_len=256)
    for layer in dict.fromkeys(build_graph(spec).layers):
        none, selective, full = (saved_bytes(layer, layout, impl, policy) for policy in (NONE, SELECTIVE, FULL))
        assert full <= selective <= none
        assert sum(saved_bytes_by_operator(layer, layout, impl).values()) == none
        previous = none
        for degrees in ({"tp": 2}, {"tp": 4}, {"tp": 4, "sequence_parallel": True}):
            now = saved_bytes(layer, Layout(batch=2, seq_len=256, **degrees), impl)  # type: ignore[arg-type]
            assert now <= previous
            previous = now
        assert saved_bytes(layer, Layout(batch=2, seq_len=256, cp=2), impl) * 2 <= none * (1 + 1e-12)


def test_policies_in_words() -> None:
    assert str(Recompute.parse("every:3")) == "every:3"
    assert Recompute.parse("every:4").fraction == 0.25
    for wrong in ("ful", "every:0", "every:x", "list:", "none:2"):
        with pytest.raises(InputError):
            Recompute.parse(wrong)


def test_listed_operators_run_again_and_their_results_are_dropped() -> None:
    layer = Model.load("llama-3-8b").graph.layers[0]
    layout, impl = Layout(), Implementation()
    freed = saved_bytes(layer, layout, impl) - saved_bytes(layer, layout, impl, Recompute.parse("list:act"))
    assert freed == 2 * 14336
    with pytest.raises(InputError, match="unknown operator to recompute 'actt'"):
        saved_bytes(layer, layout, impl, Recompute.parse("list:actt"))
