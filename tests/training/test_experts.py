"""What imbalance and capacity of experts and the clipping of gradients do to the time and memory of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.hardware.stack import Stack, load_stack
from simllm.models import Model
from simllm.models.graph import Graph
from simllm.models.routing import Routing
from simllm.network import Group, price
from simllm.parallel import Plan
from simllm.parallel.communication import block_collectives
from simllm.parallel.memory import kept_bytes
from simllm.parallel.stages import stage_weights
from simllm.training import Estimate, Training, estimate
from simllm.training.step import Step

MIXTRAL = Model.load("mixtral-8x7b")
PLAN = Plan(ep=8, dp=32, micro_batch_size=1, global_batch_size=256)
CLUSTER = Cluster.load("dgx-h100", 32)


def run(model: Model = MIXTRAL, plan: Plan = PLAN, **training: Any) -> Estimate:
    cluster = CLUSTER if plan.num_gpus == 32 else Cluster.load("dgx-h100", plan.num_gpus)
    return estimate(model, cluster, plan, Training(seq_len=4096, **training))


def test_the_busiest_rank_keeps_and_sends_more() -> None:
    step = Step(MIXTRAL, CLUSTER, PLAN, Training(seq_len=4096))
    layer: Graph = MIXTRAL.graph.layers[0]
    impl, even = step.engine.impl, step.layout
    busy = replace(even, routing=Routing(1.5))
    # Of every routed row of Mixtral a fused SwiGLU keeps the token (4096), gate and up (14336 each) and the activation
    # (14336) in 16 bits, which token it is (8 B) and its weight (4 B).
    row = 2 * (4096 + 3 * 14336) + 8 + 4
    more = kept_bytes(layer, busy, impl, PLAN.recompute) - kept_bytes(layer, even, impl, PLAN.recompute)
    assert more == pytest.approx(0.5 * 2 * 4096 * row)
    sizes = [
        [c.size_bytes for c in block_collectives(layer, layout, impl) if c.op == "all_to_all"]
        for layout in (even, busy)
    ]
    assert sizes[0] == [2 * 4096 * 4096 * 2] * 4
    assert sizes[1] == [1.5 * size for size in sizes[0]]


@settings(max_examples=12, deadline=None)
@given(low=st.floats(1, 4), more=st.floats(0, 3), factor=st.floats(0.5, 2))
def test_time_and_memory_grow_with_imbalance_and_capacity(low: float, more: float, factor: float) -> None:
    for one, other in (
        ({"expert_imbalance": low}, {"expert_imbalance": low + more}),
        ({"capacity_factor": factor}, {"capacity_factor": factor + more}),
    ):
        less, larger = run(**one), run(**other)
        assert less.step_time_s <= larger.step_time_s * (1 + 1e-12)
        assert less.peak_memory_bytes <= larger.peak_memory_bytes
        assert less.time.by_cause["matmul"] <= larger.time.by_cause["matmul"]
        assert less.time.by_cause["expert_parallel"] <= larger.time.by_cause["expert_parallel"]


def test_what_has_no_experts_stays() -> None:
    even, busy = run().time.by_cause, run(expert_imbalance=2.0).time.by_cause
    for cause in ("attention", "data_parallel", "optimizer", "gradient_clipping"):
        assert busy[cause] == even[cause]
    assert busy["expert_parallel"] > 1.5 * even["expert_parallel"]


def test_a_capacity_of_one_is_balance() -> None:
    assert run(capacity_factor=1.0).step_time_s == pytest.approx(run().step_time_s)
    assert run(capacity_factor=1.0, expert_imbalance=3.0).step_time_s == run(capacity_factor=1.0).step_time_s


def test_without_expert_parallelism_no_rank_is_busier() -> None:
    alone = Plan(tp=8, dp=4, global_batch_size=32, sequence_parallel=True)
    assert run(plan=alone, expert_imbalance=2.0).step_time_s == run(plan=alone).step_time_s


def test_what_is_said_of_the_experts() -> None:
    answer = run(expert_imbalance=1.5, capacity_factor=1.25)
    document = answer.to_dict()["experts"]
    assert document["capacity"] == 1280
    assert document["dropped_share"] == pytest.approx(0.25 / 8)
    assert document["computed_rows"] + document["dropped_rows"] == document["routed_rows"] == 8192
    said = " ".join(answer.assumptions)
    assert "the busiest of 8 expert-parallel ranks gets 1.5 times the mean" in said
    assert "an expert takes 1,280 rows of each rank's tokens" in said
    assert "3.1% of the rows are dropped" in said
    assert "as chance gives it" in " ".join(run(expert_imbalance="random").assumptions)
    assert "as benchmarks force it" in " ".join(run().assumptions)
    assert run(Model.load("gpt2"), Plan(dp=8, global_batch_size=8), optimizer="adam").to_dict()["experts"] is None


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"expert_imbalance": 0.9}, "expert_imbalance=0.9 must be random"),
        ({"expert_imbalance": "even"}, "expert_imbalance=even must be random"),
        ({"expert_imbalance": float("nan")}, "expert_imbalance=nan"),
        ({"capacity_factor": 0}, "capacity_factor=0 must be above 0"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
    ],
)
def test_wrong_routers(training: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Training(seq_len=1, **training)


@pytest.mark.parametrize("training", [{"expert_imbalance": 1.2}, {"capacity_factor": 1.0}])
def test_a_dense_model_has_no_router(training: dict[str, Any]) -> None:
    from simllm.planner import plan

    with pytest.raises(InputError, match="llama-3-8b has no experts"):
        run(Model.load("llama-3-8b"), Plan(dp=32, zero="3", global_batch_size=32), **training)
    with pytest.raises(InputError, match="llama-3-8b has no experts"):
        plan(Model.load("llama-3-8b"), CLUSTER, Training(seq_len=1024, **training), global_batch_size=32)


# -- clipping ------------------------------------------------------------------------------------------------------


def test_clipping_by_hand() -> None:
    plan = Plan(dp=32, global_batch_size=32)
    model = Model.load("llama-3-8b")
    step = Step(model, CLUSTER, plan, Training(seq_len=1024))
    own = sum(stage_weights(step.stages[0], step.layout, 1)) / 32
    card, kernels = CLUSTER.accelerator, step.engine.kernels
    rate = card.memory_bandwidth * kernels.profile.memory_efficiency
    # The float32 gradients of the rank's share: read for the norm, read and written to scale them. Two kernels, each no
    # shorter than a launch; the copy of the norm to the host and the launch after it; four bytes around all ranks.
    expected = own * 12 / rate + 4 * kernels.launch_s
    expected += price("all_reduce", 4, CLUSTER, Group(size=32)).time_s
    assert step.clipping_s(step.stages[0]) == pytest.approx(expected, rel=1e-6)
    assert step.time().by_cause["gradient_clipping"] == step.clipping_s(step.stages[0])


@pytest.mark.parametrize(
    "plan",
    [
        Plan(dp=32, zero="3", global_batch_size=32),
        Plan(tp=4, pp=2, dp=4, global_batch_size=32, sequence_parallel=True),
        Plan(tp=4, pp=8, dp=1, zero="0", global_batch_size=32, sequence_parallel=True),
    ],
)
def test_a_step_without_clipping_is_shorter_by_it(plan: Plan) -> None:
    model = Model.load("llama-3-8b")
    on, off = run(model, plan), run(model, plan, gradient_clipping=False)
    assert off.time.by_cause["gradient_clipping"] == 0
    assert on.step_time_s - off.step_time_s == pytest.approx(on.time.by_cause["gradient_clipping"], rel=1e-6)
    assert on.time.by_cause["optimizer"] == off.time.by_cause["optimizer"]
    assert on.peak_memory_bytes == off.peak_memory_bytes


def test_who_sums_the_norm() -> None:
    def ranks(**degrees: Any) -> list[tuple[int, int]]:
        plan = Plan(**{"global_batch_size": 32, **degrees})
        model = MIXTRAL if plan.ep > 1 else Model.load("llama-3-8b")
        step = Step(model, Cluster.load("dgx-h100", plan.num_gpus), plan, Training(seq_len=1024))
        return [(x.group.size, x.group.stride) for x in step.norm_exchanges()]

    assert ranks(dp=8, zero="0") == []  # every replica has all of the gradients
    assert ranks(tp=2, pp=2, dp=2, zero="0", sequence_parallel=True) == [(2, 1), (2, 4)]
    assert ranks(dp=8, zero="1") == [(8, 1)]
    assert ranks(dp=8, ep=8, zero="0") == [(8, 1)]


def test_gradients_whose_update_is_on_the_host_are_scaled_there() -> None:
    from simllm.parallel.offload import Offload

    plan = Plan(dp=8, zero="3", global_batch_size=8, offload=Offload.parse("optimizer"))
    model = Model.load("llama-3-8b")
    on, off = run(model, plan), run(model, plan, gradient_clipping=False)
    here = replace(plan, offload=Offload())
    device = run(model, here).time.by_cause["gradient_clipping"]
    assert on.time.by_cause["gradient_clipping"] > 2 * device
    assert on.step_time_s - off.step_time_s == pytest.approx(on.time.by_cause["gradient_clipping"], rel=1e-6)


# -- the host of experts ---------------------------------------------------------------------------------------------


def without(*names: str) -> Stack:
    """Megatron-Core without some of the costs of experts."""
    stack = load_stack("megatron-core")
    return msgspec.structs.replace(stack, costs=msgspec.structs.replace(stack.costs, **dict.fromkeys(names)))


@pytest.mark.parametrize(("precision", "kernels"), [("bf16", 1), ("fp8", 3)])
def test_kernels_of_every_expert_are_launched_by_hand(precision: str, kernels: int) -> None:
    plan = replace(PLAN, ep=2, precision=precision)
    each = load_stack("megatron-core").costs.expert_launch
    assert each is not None
    on, off = run(plan=plan), run(plan=plan, stack=without("expert_launch"))
    # Four experts on a rank; two products, each once forward and twice backward; 32 layers, 8 micro-batches.
    expected = 4 * 2 * 3 * kernels * each.si * 32 * 8
    assert on.time.by_cause["host"] - off.time.by_cause["host"] == pytest.approx(expected)
    assert on.time.by_cause["matmul"] == off.time.by_cause["matmul"]


def test_the_host_waits_for_the_router_in_every_layer_of_experts() -> None:
    costs = load_stack("megatron-core").costs
    assert costs.expert_wait is not None
    on, off = run(), run(stack=without("expert_wait"))
    expected = costs.expert_wait.si * (1 + costs.host_backward_ratio.si) * 32 * 8
    assert on.step_time_s - off.step_time_s == pytest.approx(expected)
    dense = Model.load("llama-3-8b"), Plan(dp=32, global_batch_size=32)
    assert run(*dense).step_time_s == run(*dense, stack=without("expert_wait", "expert_launch")).step_time_s


def test_the_weighted_bias_and_the_limits_of_experts_by_hand() -> None:
    model = Model.load("gpt-oss-20b")
    plan = Plan(ep=8, dp=32, global_batch_size=32)
    stack = load_stack("megatron-core")
    fused = msgspec.structs.replace(stack, kernels=msgspec.structs.replace(stack.kernels, expert_extras="fused"))
    step = Step(model, CLUSTER, plan, Training(seq_len=4096))
    more = run(model, plan).time.by_cause["elementwise"] - run(model, plan, stack=fused).time.by_cause["elementwise"]
    # 4096 tokens with four rows of 2880 each; 28 B forward in 2 kernels an expert and 2, 40 B backward in 5 and 2.
    elements, rate = (
        4 * 4096 * 2880,
        step.engine.kernels.profile.memory_efficiency * CLUSTER.accelerator.memory_bandwidth,
    )
    launch = step.engine.kernels.launch_s
    expected = sum(elements * b / rate + n * launch for b, n in ((28, 10), (40, 22)))
    # The limits of gate and linear part: 8 passes over 16 bits in 3 kernels forward, 10 in 3 backward.
    expected += elements * 2 * 18 / rate + 6 * launch
    assert more == pytest.approx(24 * expected, rel=1e-6)
    assert run(MIXTRAL, stack=stack).step_time_s == run(MIXTRAL, stack=fused).step_time_s
