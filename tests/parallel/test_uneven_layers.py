"""Layers that a pipeline does not divide, dealt out all the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.models import Model
from simllm.parallel.plan import Plan, check_plan, even_split, split_layers
from simllm.parallel.stages import pipeline_stages


@given(st.integers(1, 200), st.integers(1, 130))
def test_every_layer_goes_somewhere(layers, chunks):
    if chunks > layers + 2:
        with pytest.raises(InputError, match="use fewer chunks"):
            split_layers(layers, chunks, uneven=True)
        return
    split = split_layers(layers, chunks, uneven=True)
    assert sum(split) == layers
    assert len(split) == chunks
    assert max(split) == -(-layers // chunks) or split == even_split(layers, chunks)
    assert min(split) > 0 or chunks > layers


def test_an_even_split_stays_even():
    assert split_layers(80, 8, uneven=True) == (10,) * 8
    assert split_layers(126, 64, uneven=True) == (1, *(2,) * 62, 1)


def test_chunks_are_filled_from_the_front():
    assert split_layers(78, 12, uneven=True) == (*(7,) * 11, 1)
    assert split_layers(61, 32, uneven=True) == (*(2,) * 29, 1, 1, 1)


def test_one_or_two_chunks_more_than_layers_hold_the_embedding_and_the_head():
    assert split_layers(22, 24, uneven=True) == (0, *(1,) * 22, 0)
    assert split_layers(22, 23, uneven=True) == (*(1,) * 22, 0)


def test_planning_refuses_what_it_refused():
    model = Model.load("llama-3.1-405b")
    even = Plan(tp=8, pp=12, dp=1, global_batch_size=12, sequence_parallel=True)
    with pytest.raises(InputError, match="126 layers do not split into pp x vpp = 12 chunks"):
        check_plan(model, even, 8192)
    check_plan(model, Plan(tp=8, pp=12, global_batch_size=12, sequence_parallel=True, uneven_layers=True), 8192)
    with pytest.raises(InputError, match="pp=127 stages, but the model has 126 layers"):
        check_plan(model, Plan(tp=8, pp=127, sequence_parallel=True, uneven_layers=True), 8192)


def test_ranks_hold_what_the_split_says():
    graph = Model.load("deepseek-v3").graph
    stages = pipeline_stages(graph, 4, 4, True)
    # 61 layers in 16 chunks: fifteen of four and a last one of one.
    assert [stage.num_layers for stage in stages] == [16, 16, 16, 13]
    assert [stage.first for stage in stages] == [True, False, False, False]
    assert [stage.last for stage in stages] == [False, False, False, True]
