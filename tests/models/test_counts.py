"""FLOPs and caches against the published counts, and the closed forms of papers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.build import build_graph
from simllm.models.conventions import FLOP_CONVENTIONS, training_flops
from simllm.models.counts import count_flops, count_parameters
from simllm.models.graph import Layout
from simllm.models.operators import Scan
from simllm.models.spec import ModelSpec
from simllm.models.work import AttentionWork, attended_pairs
from tests.strategies import gpt_spec, specs

PUBLISHED = Path(__file__).parents[1] / "published"


def rows(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


MEASURED = [row for row in rows("flops.csv") if row["forward_flops"]]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['name']}-{row['attn_impl']}-{row['seq']}")
def test_forward_flops_equal_pytorchs_counter(row: dict[str, str]) -> None:
    flops = Model.load(row["name"]).flops(int(row["seq"]), int(row["batch"]))
    assert flops.forward_full_attention == int(float(row["forward_flops"]))


def test_every_measured_flop_row_is_read() -> None:
    assert len(MEASURED) == 66


@pytest.mark.parametrize("row", rows("kv.csv"), ids=lambda row: row["name"])
def test_cache_bytes_per_token(row: dict[str, str]) -> None:
    assert Model.load(row["name"]).kv_cache_bytes_per_token() == float(row["bytes_per_token_bf16"])


def test_cross_attention_keeps_as_much_per_source_token() -> None:
    t5 = Model.load("t5-base")
    assert t5.cross_kv_cache_bytes_per_token() == t5.kv_cache_bytes_per_token() == 12 * 2 * 768 * 2
    assert Model.load("gpt2").cross_kv_cache_bytes_per_token() == 0


def test_narayanan_2021_flops_of_an_iteration() -> None:
    # arXiv:2104.04473, equation 3 without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12 l h).
    h, layers, s, v, batch = 12288, 96, 2048, 51200, 3
    spec = gpt_spec(hidden=h, heads=96, layers=layers, vocab=v)
    flops = count_flops(build_graph(spec), Layout(batch=batch, seq_len=s))
    assert flops.training_full_attention == 72 * batch * s * layers * h**2 + 12 * batch * s * s * layers * h + (
        6 * batch * s * h * v
    )


def test_masked_attention_counts_only_attended_pairs() -> None:
    gpt2 = Model.load("gpt2").flops(1024)
    scores = gpt2.forward_full_attention - gpt2.forward_masked
    pairs = 1024 * 1024 - 1024 * 1025 // 2
    assert scores == 12 * 12 * pairs * 2 * 64 * 2


def test_mask_pairs_by_enumeration() -> None:
    for window in (None, 1, 3, 7, 20):
        for prefix in (0, 1, 4, 9):
            seen = sum(
                1
                for query in range(9)
                for key in range(9)
                if (key <= query and (window is None or query - key < window)) or (key < prefix and query < prefix)
            )
            if window is None:
                assert attended_pairs("prefix", 9, 9, None, prefix) == seen
            if prefix == 0:
                assert attended_pairs("causal", 9, 9, window) == seen
    for chunk in (1, 2, 4, 9, 20):
        seen = sum(key <= query and key // chunk == query // chunk for query in range(9) for key in range(9))
        assert attended_pairs("chunked", 9, 9, chunk) == seen
    assert attended_pairs("cross", 5, 7) == 35
    with pytest.raises(ValueError, match="unknown mask"):
        attended_pairs("diagonal", 4, 4)


@settings(deadline=None)
@given(specs())
def test_parts_add_up(spec: ModelSpec) -> None:
    graph = build_graph(spec)
    parameters = count_parameters(graph)
    assert sum(parameters.by_component.values()) == parameters.total
    assert parameters.embedding + parameters.lm_head + parameters.non_embedding == parameters.total
    assert 0 < parameters.active <= parameters.total
    flops = count_flops(graph, Layout(batch=2, seq_len=128))
    assert sum(flops.by_component.values()) == flops.forward_masked <= flops.forward_full_attention
    assert flops.training_masked == 3 * flops.forward_masked


@settings(deadline=None)
@given(specs())
def test_ranks_share_the_work(spec: ModelSpec) -> None:
    # By the pairs that masks keep: a rank of a ring never computes the squares above the diagonal.
    graph = build_graph(spec)
    whole = count_flops(graph, Layout(batch=4, seq_len=256))
    rank = count_flops(graph, Layout(batch=4, seq_len=256, tp=4, cp=4, ep=4, sequence_parallel=True))
    # Sixteen ranks do at least the work of one; more only where few key-value heads or a padded vocabulary repeat it.
    repeated = any(
        block.mixer.num_key_value_heads < 4
        for block in spec.decoder.layers  # type: ignore[union-attr]
    )
    assert rank.forward_masked * 16 >= whole.forward_masked * (1 - 1e-9)
    if not repeated:
        assert rank.forward_masked * 16 == pytest.approx(whole.forward_masked, rel=1e-9)


def test_backward_is_twice_the_forward_per_operator() -> None:
    from simllm.models.graph import Implementation

    layout, impl = Layout(batch=2, seq_len=64), Implementation()
    for name in ("llama-3-8b", "mixtral-8x7b", "deepseek-v2-lite", "jamba-v0.1", "t5-base"):
        for part, _ in Model.load(name).graph.parts:
            for operator in part.operators:
                forward = sum(item.flops for item in operator.forward(layout, impl))
                inputs = sum(item.flops for item in operator.backward_input(layout, impl))
                weights = sum(item.flops for item in operator.backward_weight(layout, impl))
                # Attention and the scan multiply activations with each other: both gradients are those of inputs.
                attention = any(isinstance(item, AttentionWork) for item in operator.forward(layout, impl))
                no_weight = attention or isinstance(operator, Scan)
                assert (inputs, weights) == ((2 * forward, 0) if no_weight else (forward, forward)), operator.name


def test_traffic_of_unfused_attention_per_score() -> None:
    # Softmax reads and writes 2 bytes each, dropout too and a one-byte mask: 9 forward; 11 backward.
    from simllm.models.graph import Implementation
    from simllm.models.work import Stream

    layer = build_graph(gpt_spec(hidden=1024, heads=16)).layers[0]
    core = next(operator for operator in layer.operators if operator.name == "attention_core")
    layout, impl = Layout(batch=2, seq_len=128), Implementation(attention="unfused")
    scores = 2 * 16 * 128 * 128

    def moved(work: tuple[object, ...]) -> float:
        return sum(item.bytes for item in work if isinstance(item, Stream))

    assert moved(core.forward(layout, impl)) == 9 * scores
    assert moved(core.backward_input(layout, impl)) == 11 * scores
    assert moved(core.forward(layout, Implementation())) == 0


# -- conventions ---------------------------------------------------------------------------------------------------


def test_conventions_on_gpt3_by_hand() -> None:
    # Narayanan 2021, equation 3; GPT-3's table has 50257 rows, and its positions 2048.
    model, s, layers, h, v = Model.load("gpt3-175b"), 2048, 96, 12288, 50257
    matrices, scores, head = 72 * s * layers * h * h, 12 * s * s * layers * h, 6 * s * h * v
    causal = scores * (s + 1) // (2 * s)
    n = model.parameters.total
    expected = {
        "full-attention": matrices + scores + head,
        "masked": matrices + causal + head,
        "6n": 6 * n * s,
        "6n-non-embedding": 6 * (n - (v + s) * h) * s,
        "palm": 6 * n * s + scores,
        "torchtitan": 6 * (n - (v + s) * h) * s + scores,
        "with-recompute": (matrices + scores) * 4 // 3 + head,
    }
    assert {name: training_flops(model, s, name) for name in FLOP_CONVENTIONS} == expected


def test_conventions_of_an_untied_mixture() -> None:
    model, s = Model.load("mixtral-8x7b"), 4096
    parameters = model.parameters
    scores = 12 * 32 * 32 * 128 * s * s
    assert training_flops(model, s, "6n") == 6 * parameters.active * s
    assert training_flops(model, s, "6n-non-embedding") == 6 * (parameters.active - 2 * 32000 * 4096) * s
    assert training_flops(model, s, "palm") == 6 * parameters.active * s + scores
    assert training_flops(model, s, "torchtitan") == 6 * (parameters.active - 32000 * 4096) * s + scores


def test_recomputation_counts_what_runs_again() -> None:
    model, s = Model.load("llama-2-7b"), 4096
    plain = training_flops(model, s, "full-attention")
    scores = 4 * s * s * 4096 * 32

    def more(policy: str | Recompute) -> float:
        return training_flops(model, s, "with-recompute", recompute=policy) - plain

    assert (more("none"), more("selective")) == (0, scores)
    layers = model.flops(s).forward_full_attention - 2 * s * 4096 * 32000
    assert more("full") == more(Recompute(kind="full")) == layers
    assert more("every:4") == layers / 4
    with pytest.raises(InputError, match="unknown FLOP convention 'palms'; did you mean palm"):
        training_flops(model, s, "palms")


def test_convolution_and_state_of_a_mamba_layer() -> None:
    # mamba-130m at 64 tokens: 67 results of the convolution of width 4, 16 states a channel (counted by PyTorch too).
    config = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 768, "num_hidden_layers": 1}
    flops = Model.from_config(config).flops(64)
    products = 2 * 64 * (768 * 3072 + 1536 * (48 + 32) + 48 * 1536 + 1536 * 768 + 768 * 100)
    assert flops.forward_full_attention == products + 2 * 67 * 1536 * 4 + 2 * 64 * 1536 * 16
