"""Gradients that are reduced beside data parallelism, counted by hand."""

from __future__ import annotations

from simllm import Model
from simllm.models.graph import Layout
from simllm.parallel.gradients import partial_sizes, tied_elements
from simllm.parallel.stages import pipeline_stages


def total(name: str, layout: Layout) -> int:
    (stage,) = pipeline_stages(Model.load(name).graph, 1, 1)
    return sum(size * times for size, times in partial_sizes(stage, layout))


def test_norms_are_partial_under_sequence_parallelism() -> None:
    # Two norms of 8192 in each of 80 layers, and the last one.
    assert total("llama-3-70b", Layout(tp=8, sequence_parallel=True)) == (2 * 80 + 1) * 8192
    # Without it every rank uses them on all tokens.
    assert total("llama-3-70b", Layout(tp=8)) == 0
    assert total("llama-3-70b", Layout()) == 0


def test_what_else_is_whole_on_every_rank() -> None:
    """Routers; keys and values of fewer heads than ranks, which each rank uses for its own queries."""
    sequence = Layout(tp=4, sequence_parallel=True)
    # 32 layers: two norms of 4096, a router of 4096 x 8.
    assert total("mixtral-8x7b", sequence) == 32 * (2 * 4096 + 8 * 4096) + 4096
    # One key and one value head of 64 x 4544 in each of 32 layers, no sequence parallelism.
    assert total("falcon-7b", Layout(tp=2)) == 32 * 2 * 64 * 4544


def test_a_tied_table_stands_at_both_ends_of_a_pipeline() -> None:
    layout = Layout(tp=8)
    graph = Model.load("gpt3-175b").graph
    found = [tied_elements(graph, stage, layout) for stage in pipeline_stages(graph, 4, 1)]
    table = 6283 * 12288  # an eighth of 50257 rows, rounded up
    assert found == [table, 0, 0, table]
    assert tied_elements(graph, pipeline_stages(graph, 1, 1)[0], layout) == 0
    # Both ends of a V are on one rank, which holds the table once.
    assert not any(tied_elements(graph, s, layout) for s in pipeline_stages(graph, 4, 2, placement="v"))
    untied = Model.load("llama-3-70b").graph
    assert not any(tied_elements(untied, stage, layout) for stage in pipeline_stages(untied, 4, 1))
