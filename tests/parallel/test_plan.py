"""Plans that cannot be: each is refused with the numbers that do not fit and what would."""

from __future__ import annotations

from typing import Any

import pytest

from simllm.errors import InputError, UnsupportedError
from simllm.models import Model
from simllm.network import Group
from simllm.parallel.placement import group_of
from simllm.parallel.plan import Plan, check_plan, split_layers

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tp": 0}, "tp=0 must be a whole number"),
    ({"tp": -2}, "tp=-2 must be"),
    ({"tp": 2.0}, "tp=2.0 must be"),
    ({"dp": True}, "dp=True must be"),
    ({"tp": 10**9}, "tp=1000000000 must be"),
    ({"zero": "4"}, "unknown ZeRO stage '4'"),
    ({"schedule": "1f1"}, "did you mean 1f1b"),
    ({"precision": "bf17"}, "did you mean bf16"),
    ({"dp": 16, "global_batch_size": 1024, "micro_batch_size": 3}, "micro_batch_size=3 does not divide"),
    ({"dp": 16, "global_batch_size": 1000}, "dp=16 does not divide the global batch"),
    ({"vpp": 2}, "needs a pipeline"),
    ({"pp": 2, "vpp": 2, "global_batch_size": 2}, "schedule=1f1b with vpp=2: it needs vpp=1"),
    ({"pp": 4, "vpp": 2, "schedule": "interleaved", "global_batch_size": 6}, "pp=4 divides"),
    ({"sequence_parallel": True}, "sequence_parallel needs tp above 1"),
    ({"ep": 4}, "ep=4 x etp=1 does not divide the 1 ranks"),
    ({"hsdp_shard": 2}, "hsdp_shard=2 needs zero=hsdp"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_plans(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan(**arguments)
    assert message in str(caught.value)


def test_micro_batch_advice_lists_what_divides() -> None:
    with pytest.raises(InputError, match=r"/ dp=16 = 64; use 1, 2, 4, 8, 16, 32 or 64"):
        Plan(dp=16, global_batch_size=1024, micro_batch_size=3)


def test_zero_2_in_a_pipeline_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="zero=2 with pp=2"):
        Plan(pp=2, zero="2", global_batch_size=4)


MISFITS: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama-3-70b", {"tp": 3}, 8192, "tp=3 does not divide num_attention_heads=64; use 1, 2, 4, 8, 16, 32 or 64"),
    ("llama-3-70b", {"pp": 7}, 8192, "80 layers do not split into pp x vpp = 7 chunks"),
    ("llama-3-70b", {"pp": 128}, 8192, "128 chunks, but the model has 80 layers"),
    ("llama-3-70b", {"cp": 3}, 8192, "cp=3 does not divide seq_len=8192"),
    ("llama-3-70b", {"tp": 8, "sequence_parallel": True}, 8196, "does not divide seq_len=8196 (sequence parallel)"),
    ("llama-3-70b", {"tp": 2, "ep": 2}, 8192, "llama-3-70b has no experts"),
    ("mixtral-8x7b", {"ep": 3, "dp": 3, "global_batch_size": 3}, 4096, "ep=3 does not divide num_experts=8"),
    ("mixtral-8x7b", {"tp": 2}, 4096, "switch sequence parallelism on"),
    ("jamba-v0.1", {"cp": 2}, 4096, "context parallelism of a state-space mixer is not modelled"),
    ("falcon-7b", {"tp": 2}, 2048, "tp=2 does not divide num_attention_heads=71"),
]


@pytest.mark.parametrize(("name", "arguments", "seq_len", "message"), MISFITS)
def test_plans_that_do_not_fit_the_model(name: str, arguments: dict[str, Any], seq_len: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_plan(Model.load(name), Plan(**arguments), seq_len)
    assert message in str(caught.value)


def test_key_value_heads_are_split_or_replicated() -> None:
    model = Model.load("llama-3-70b")  # 64 heads, 8 key-value heads
    for tp in (1, 2, 4, 8, 16, 64):
        check_plan(model, Plan(tp=tp), 8192)


def test_uneven_layers_count_embedding_and_head() -> None:
    assert split_layers(126, 16) == (7, *(8,) * 14, 7)
    assert split_layers(95, 4) == (24, 24, 24, 23)
    assert split_layers(5, 1) == (5,)


def test_groups_of_a_plan() -> None:
    plan = Plan(tp=4, cp=2, dp=8, pp=2, global_batch_size=8, sequence_parallel=True)
    assert plan.num_gpus == 128
    assert group_of(plan, "tp") == Group(size=4)
    assert group_of(plan, "cp") == Group(size=2, stride=4)
    assert group_of(plan, "dp") == Group(size=16, stride=4)
    assert group_of(plan, "pp") == Group(size=2, stride=64)
    moe = Plan(tp=4, dp=16, ep=8, etp=2, global_batch_size=16, sequence_parallel=True)
    assert group_of(moe, "ep") == Group(size=8, stride=2)
    assert group_of(moe, "expert_dp") == Group(size=4, stride=16)
