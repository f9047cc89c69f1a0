"""What stages send, how updated parameters travel, and islands inside a node."""

import msgspec
import pytest

from simllm.hardware import load_cluster
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.network import Group, price
from simllm.parallel.plan import Plan
from simllm.training import Training, estimate
from simllm.training.step import Step

MODEL = Model.load("llama-2-7b")


def step(stack: str, gpus: int = 64, **plan: object) -> Step:
    cluster = load_cluster("dgx-a100", gpus)
    return Step(MODEL, cluster, Plan(global_batch_size=64, **plan), Training(seq_len=2048, stack=stack))


def test_a_pipeline_tensor_is_sent_in_slices_and_gathered() -> None:
    whole = 2048 * 4096 * 2
    scattered = step("megatron-lm", tp=8, pp=2, dp=4, zero="0").p2p()
    assert [(x.operation, x.size_bytes) for x in scattered] == [("send_recv", whole / 8), ("all_gather", whole)]
    # With sequence parallelism a rank holds its part only.
    split = step("megatron-core", tp=8, pp=2, dp=4, sequence_parallel=True).p2p()
    assert [(x.operation, x.size_bytes) for x in split] == [("send_recv", whole / 8)]
    torch = step("torchtitan", tp=8, pp=2, dp=4, zero="1").p2p()
    assert [(x.operation, x.size_bytes) for x in torch] == [("send_recv", whole)]


def test_gradients_of_norms_are_summed_over_tensor_parallel_ranks() -> None:
    """Megatron: once, as one buffer in float32. Distributed tensors: each norm's, with every micro-batch, in bf16."""
    plan = {"tp": 8, "pp": 2, "sequence_parallel": True}
    together = step("megatron-core", dp=4, **plan)
    found = [together.summed_gradients(stage)[0] for stage in together.stages]
    assert [[(x.operation, x.group, x.size_bytes, x.times) for x in rank] for rank in found] == [
        [("all_reduce", Group(size=8), 4 * 4096 * norms, 1)] for norms in (32, 33)
    ]
    assert not together.sums_every_micro_batch
    each = step("torchtitan", dp=8, tp=8, sequence_parallel=True)
    assert [(x.size_bytes, x.times) for x in each.summed_gradients(each.stages[0])[0]] == [(2 * 4096, 65)]
    assert each.sums_every_micro_batch
    assert not step("torchtitan", dp=4, zero="3", **plan).sums_every_micro_batch


def test_both_ends_of_a_pipeline_sum_the_gradients_of_a_tied_table() -> None:
    plan = Plan(tp=2, pp=4, dp=8, zero="1", global_batch_size=64)
    tied = Step(Model.load("gpt2"), load_cluster("dgx-a100", 64), plan, Training(seq_len=1024, stack="megatron-core"))
    found = [tied.summed_gradients(stage)[1] for stage in tied.stages]
    table = 4 * 768 * 50432 // 2  # float32, half of the 50257 rows padded to a multiple of 128 x tp
    assert [[x.size_bytes for x in rank] for rank in found] == [[table], [], [], [table]]
    assert found[0][0].group == Group(size=2, stride=3 * 16)
    by_cause = tied.time().by_cause
    assert sum(by_cause.values()) == pytest.approx(tied.time().total_s)


def test_every_rank_broadcasts_its_parameters() -> None:
    (one,) = step("internevo", dp=64, zero="1").gathers(6_400_000, 0)
    assert (one.operation, one.times, one.size_bytes) == ("broadcast", 64, 200_000)
    (usual,) = step("megatron-core", dp=64, zero="1").gathers(6_400_000, 0)
    assert (usual.operation, usual.times, usual.size_bytes) == ("all_gather", 1, 12_800_000)


def test_broadcasts_to_many_ranks_cost_more_than_a_gather() -> None:
    stack = load_stack("internevo")
    gather = msgspec.structs.replace(stack, parameter_exchange="all_gather")
    cluster = load_cluster("dgx-a100", 512)
    plan = Plan(dp=512, zero="1", global_batch_size=512)
    times = [estimate(MODEL, cluster, plan, Training(seq_len=2048, stack=s)).step_time_s for s in (stack, gather)]
    assert times[0] > times[1]


def test_states_in_groups_are_reduced_over_the_replicas() -> None:
    grouped = step("megatron-core", dp=64, zero="1", hsdp_shard=8)
    found = [(x.operation, x.group.size, x.size_bytes) for x in grouped.reductions(1000, 0)]
    assert found == [("reduce_scatter", 8, 4000), ("all_reduce", 8, 500)]
    whole = step("megatron-core", dp=64, zero="1").memory()[0].by_kind["optimizer"]
    assert grouped.memory()[0].by_kind["optimizer"] == pytest.approx(8 * whole)


def test_groups_that_leave_an_island_share_what_joins_islands() -> None:
    cluster = load_cluster("jean-zay-a100", 8)
    inside, across = (price("all_reduce", 1e9, cluster, Group(size=size)) for size in (4, 8))
    assert inside.busbw > 2 * across.busbw
    assert across.busbw < 100e9
    strided = price("all_reduce", 1e9, cluster, Group(size=2, stride=4))
    assert strided.busbw < 100e9
