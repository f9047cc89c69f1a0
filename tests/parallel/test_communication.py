"""Collectives read off the sharding, against what Megatron-LM's papers say it sends."""

from __future__ import annotations

from collections import Counter

import pytest

from simllm.models import Model
from simllm.models.build import build_graph
from simllm.models.graph import Graph, Implementation, Layout
from simllm.parallel.communication import block_collectives
from tests.strategies import gpt_spec

IMPL = Implementation()


def summary(graph: Graph, layout: Layout) -> Counter[tuple[str, str, str]]:
    return Counter(
        {(c.op, c.group, c.phase): 0 for c in block_collectives(graph, layout, IMPL)}
        | Counter((c.op, c.group, c.phase) for c in block_collectives(graph, layout, IMPL))
    )


def test_tensor_parallel_layer_has_two_all_reduces_each_way() -> None:
    # arXiv:1909.08053, figure 4.
    layer = build_graph(gpt_spec()).layers[0]
    layout = Layout(batch=4, seq_len=512, tp=8)
    found = block_collectives(layer, layout, IMPL)
    assert Counter((c.op, c.phase) for c in found) == {("all_reduce", "forward"): 2, ("all_reduce", "backward"): 2}
    assert {c.size_bytes for c in found} == {4 * 512 * 1024 * 2}


def test_sequence_parallel_layer_gathers_and_scatters() -> None:
    # arXiv:2205.05198, section 4.2.2: all-gather and reduce-scatter in place of each all-reduce, and the gather of
    # each column-parallel input again for its weight gradient.
    layer = build_graph(gpt_spec()).layers[0]
    found = block_collectives(layer, Layout(batch=4, seq_len=512, tp=8, sequence_parallel=True), IMPL)
    assert Counter((c.op, c.phase) for c in found) == {
        ("all_gather", "forward"): 2,
        ("reduce_scatter", "forward"): 2,
        ("all_gather", "backward"): 4,
        ("reduce_scatter", "backward"): 2,
    }
    assert {c.size_bytes for c in found} == {4 * 512 * 1024 * 2}


def test_software_that_keeps_the_gathered_tokens_gathers_once() -> None:
    layer = build_graph(gpt_spec()).layers[0]
    layout = Layout(batch=4, seq_len=512, tp=8, sequence_parallel=True)
    found = block_collectives(layer, layout, Implementation(sequence_gather="kept"))
    assert Counter(c.phase for c in found if c.op == "all_gather") == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("name", ["falcon-40b", "gpt-j-6b", "palm-540b"])
def test_parallel_block_reduces_once(name: str) -> None:
    # arXiv:2204.02311, section 2: attention and MLP in parallel share their reductions.
    layer = Model.load(name).graph.layers[0]
    found = block_collectives(layer, Layout(seq_len=2048, tp=8), IMPL)
    forward = [c for c in found if c.phase == "forward"]
    assert [c.op for c in forward] == ["all_reduce"]
    # Falcon-40B has two norms, so two inputs whose gradients are reduced.
    assert len(found) - 1 == (2 if name == "falcon-40b" else 1)


def test_embedding_and_head() -> None:
    graph = Model.load("llama-3-70b").graph
    layout = Layout(seq_len=8192, tp=8, sequence_parallel=True)
    size = 8192 * 8192 * 2
    assert [(c.op, c.phase, c.size_bytes) for c in block_collectives(graph.stem, layout, IMPL)] == [
        ("reduce_scatter", "forward", size),
        ("all_gather", "backward", size),
    ]
    head = block_collectives(graph.head, layout, IMPL)
    assert [(c.op, c.phase) for c in head] == [
        ("all_gather", "forward"),
        ("all_gather", "backward"),
        ("reduce_scatter", "backward"),
        ("all_reduce", "forward"),
    ]
    # The loss over split logits: maximum, sum of exponentials and the label's logit of each token, in float32.
    assert (head[-1].count, head[-1].size_bytes) == (3, 8192 * 4)


def test_the_shared_part_of_a_latent_key() -> None:
    """Its 64 columns are used by every head: gathered with sequence parallelism, the gradient reduced either way."""
    layer = Model.load("deepseek-v3").graph.layers[0]
    for sequence_parallel, ops in ((True, ["all_gather", "all_gather", "reduce_scatter"]), (False, ["all_reduce"])):
        layout = Layout(seq_len=2048, tp=8, sequence_parallel=sequence_parallel)
        found = [c for c in block_collectives(layer, layout, IMPL) if c.operator == "rope"]
        assert [c.op for c in found] == ops
        assert {c.size_bytes for c in found} == {2048 * 64 * 2}


def test_experts_exchange_tokens_twice_each_way() -> None:
    layer = Model.load("mixtral-8x7b").graph.layers[0]
    found = [c for c in block_collectives(layer, Layout(seq_len=4096, ep=8), IMPL) if c.group == "ep"]
    assert Counter((c.op, c.phase) for c in found) == {("all_to_all", "forward"): 2, ("all_to_all", "backward"): 2}
    assert {c.size_bytes for c in found} == {4096 * 2 * 4096 * 2}


def test_expert_tensor_ranks_gather_and_scatter_what_they_share() -> None:
    layer = Model.load("mixtral-8x7b").graph.layers[0]
    layout = Layout(seq_len=4096, tp=2, etp=2, ep=4, sequence_parallel=True)
    found = [c for c in block_collectives(layer, layout, IMPL) if c.group in ("ep", "etp")]
    own = 4096 // 2 * 2 * 4096 * 2
    assert {(c.op, c.phase, c.size_bytes) for c in found} == {
        ("all_to_all", "forward", own),
        ("all_to_all", "backward", own),
        ("all_gather", "forward", 2 * own),
        ("reduce_scatter", "forward", 2 * own),
        ("all_gather", "backward", 2 * own),
        ("reduce_scatter", "backward", 2 * own),
    }


def test_ring_passes_keys_and_values() -> None:
    layer = Model.load("llama-3-70b").graph.layers[0]
    layout = Layout(batch=1, seq_len=8192, tp=4, cp=4)
    found = [c for c in block_collectives(layer, layout, IMPL) if c.group == "cp"]
    keys_values = 8192 // 4 * 2 * (8 // 4) * 128 * 2
    assert [(c.phase, c.count, c.size_bytes) for c in found] == [
        ("forward", 3, keys_values),
        ("backward", 3, 2 * keys_values),
    ]


def test_one_rank_sends_nothing() -> None:
    for name in ("llama-3-8b", "mixtral-8x7b", "t5-base", "jamba-v0.1"):
        for graph, _ in Model.load(name).graph.parts:
            assert block_collectives(graph, Layout(seq_len=128), IMPL) == ()
