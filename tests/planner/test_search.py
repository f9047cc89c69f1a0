"""The search: nothing lost, nothing that does not fit, nothing better left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel import Plan
from simllm.planner import plan
from simllm.planner.space import Branch, Space, divisors
from simllm.training import Training, estimate

LLAMA_7B = Model.load("llama-2-7b")
TRAINING = Training(seq_len=4096)


def brute_force(model: Model, cluster: Cluster, training: Training, batch: int) -> dict[str, float]:
    """Every plan that `estimate` accepts and that fits, with its step time."""
    found = {}
    for tp in divisors(cluster.num_gpus):
        for pp in divisors(cluster.num_gpus // tp):
            for cp in divisors(cluster.num_gpus // tp // pp):
                dp = cluster.num_gpus // tp // pp // cp
                for vpp in range(1, 33):
                    for size in divisors(batch, 16):
                        for zero in ("0", "1", "2", "3"):
                            for recompute in ("none", "full"):
                                try:
                                    candidate = Plan(
                                        tp=tp,
                                        pp=pp,
                                        cp=cp,
                                        dp=dp,
                                        vpp=vpp,
                                        schedule="interleaved" if vpp > 1 else "1f1b",
                                        micro_batch_size=size,
                                        global_batch_size=batch,
                                        zero=zero,  # type: ignore[arg-type]
                                        sequence_parallel=tp > 1,
                                        recompute=Recompute(kind=recompute),
                                    )
                                    answer = estimate(model, cluster, candidate, training)
                                except InputError:
                                    continue
                                if answer.fits:
                                    found[str(candidate)] = answer.step_time_s
    return found


@pytest.mark.parametrize(("gpus", "batch"), [(4, 8), (8, 16)])
def test_best_plan_is_that_of_brute_force(gpus: int, batch: int) -> None:
    cluster = Cluster.load("dgx-h100", gpus)
    everything = brute_force(LLAMA_7B, cluster, TRAINING, batch)
    found = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=batch, top=3)
    assert found.plans[0].step_time_s == pytest.approx(min(everything.values()), rel=1e-12)
    for answer in found.plans:
        assert everything[str(answer.plan)] == answer.step_time_s


def test_counts_add_up_and_every_plan_fits() -> None:
    cluster = Cluster.load("dgx-a100", 64)
    found = plan(Model.load("llama-2-70b"), cluster, TRAINING, global_batch_size=512, top=8)
    assert found.searched == found.feasible + sum(found.rejected.values())
    assert len(found.plans) == 8 <= found.feasible
    assert all(answer.fits and answer.plan.num_gpus == 64 for answer in found.plans)
    times = [answer.step_time_s for answer in found.plans]
    assert times == sorted(times)
    assert len({str(answer.plan) for answer in found.plans}) == 8
    assert len(found.why) == 7
    assert "slower" in found.why[-1] or "as fast" in found.why[-1]
    assert "matrix products" in found.limits
    assert any(reason.startswith("out of memory") for reason in found.rejected)


def test_nothing_fits() -> None:
    found = plan(Model.load("gpt3-175b"), Cluster.load("dgx-a100", 8), TRAINING, global_batch_size=64)
    assert found.plans == ()
    assert found.feasible == 0
    assert found.nearest is not None
    assert not found.nearest.fits
    assert found.to_dict()["plans"] == []


def test_mixture_of_experts_spreads_its_experts() -> None:
    found = plan(Model.load("mixtral-8x7b"), Cluster.load("dgx-h100", 64), TRAINING, global_batch_size=256, top=20)
    assert {answer.plan.ep for answer in found.plans} - {1}


def test_objectives() -> None:
    cluster = Cluster.load("dgx-h100", 64)
    fast = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64)
    cheap = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, objective="cost")
    few = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, objective="gpus")
    assert fast.plans[0].plan.num_gpus == 64

    def gpu_seconds(index: int, found: object) -> float:
        answer = found.plans[index]  # type: ignore[attr-defined]
        return answer.step_time_s * answer.plan.num_gpus  # type: ignore[no-any-return]

    assert gpu_seconds(0, cheap) <= gpu_seconds(0, fast)
    assert few.plans[0].plan.num_gpus <= cheap.plans[0].plan.num_gpus <= 64
    assert {answer.plan.num_gpus for answer in few.plans} == {few.plans[0].plan.num_gpus}


def test_more_memory_is_never_slower() -> None:
    cluster = Cluster.load("dgx-a100", 64)
    card = cluster.accelerator
    larger = replace(cluster, accelerator=replace(card, memory_bytes=card.memory_bytes * 2))
    model = Model.load("llama-2-70b")
    times = [plan(model, c, TRAINING, global_batch_size=256).plans[0].step_time_s for c in (cluster, larger)]
    assert times[1] <= times[0]


def test_wrong_questions() -> None:
    cluster = Cluster.load("dgx-h100", 8)
    with pytest.raises(InputError, match="did you mean time"):
        plan(LLAMA_7B, cluster, TRAINING, global_batch_size=8, objective="tim")
    with pytest.raises(InputError, match="did you mean bf16"):
        plan(LLAMA_7B, cluster, TRAINING, global_batch_size=8, precision="bf61")
    with pytest.raises(InputError, match="global_batch_size=0"):
        plan(LLAMA_7B, cluster, TRAINING, global_batch_size=0)


def test_progress_is_reported() -> None:
    seen: list[int] = []
    plan(LLAMA_7B, Cluster.load("dgx-h100", 8), TRAINING, global_batch_size=8, progress=seen.append)
    assert seen
    assert seen == sorted(seen)


def test_every_way_of_sharding_is_tried() -> None:
    space = Space(LLAMA_7B, Cluster.load("dgx-h100", 64), TRAINING, 64, "bf16")

    def stages(tp: int, pp: int, dp: int) -> tuple[str, ...]:
        return space.sharding(Branch(tp=tp, pp=pp, vpp=1, cp=1, ep=1, dp=dp, micro_batch_size=1))

    assert stages(1, 1, 64) == ("0", "1", "2", "hsdp", "3")
    assert stages(8, 1, 8) == ("0", "1", "2", "3")  # one rank of a node: nothing to shard inside it
    assert stages(1, 2, 32) == ("0", "1", "hsdp", "3")  # ZeRO-2 does not go with a pipeline
    assert stages(8, 8, 1) == ("0",)


def test_full_sharding_is_found_where_nothing_else_fits() -> None:
    # 13 B parameters on eight 40 GB cards: 6 bytes a parameter unsharded do not leave room for long sequences.
    cluster = Cluster.load("azure-nd-a100-v4", 8)
    found = plan(Model.load("llama-7b"), cluster, Training(seq_len=4096, stack="fsdp1"), global_batch_size=8, top=500)
    assert {answer.plan.zero for answer in found.plans} >= {"3"}
