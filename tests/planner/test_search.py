"""The search: nothing lost, nothing that does not fit, nothing better left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel import Plan
from simllm.parallel.plan import ZERO_STAGES, even_split
from simllm.parallel.schedules import SCHEDULES
from simllm.planner import Constraints, PlanSearch, plan
from simllm.planner.compare import parse_plan
from simllm.planner.sizes import at_most, exactly
from simllm.planner.space import divisors
from simllm.training import Training, estimate

LLAMA_7B = Model.load("llama-2-7b")
TRAINING = Training(seq_len=4096)


POLICIES = tuple(Recompute.parse(text) for text in ("none", "every:2", "full"))


def brute_force(model: Model, cluster: Cluster, training: Training, batch: int) -> dict[Plan, tuple[float, float]]:
    """Every plan that `estimate` accepts and that fits, with its step time and peak memory."""
    found = {}
    gpus, layers = cluster.num_gpus, model.spec.num_hidden_layers
    moe = "experts" in model.parameters.by_component
    degrees = [
        (tp, pp, cp, gpus // (tp * pp * cp))
        for tp, pp, cp in product(divisors(gpus), repeat=3)
        if gpus % (tp * pp * cp) == 0 and training.seq_len // cp >= 512
    ]
    for (tp, pp, cp, dp), ep in product(degrees, divisors(8) if moe else [1]):
        for vpp, schedule in (
            (n, name) for n in range(1, layers // pp + 1) for name, kind in SCHEDULES.items() if kind.closed_form
        ):
            for size, zero, recompute, sp in product(divisors(batch, 16), ZERO_STAGES, POLICIES, (False, True)):
                try:
                    candidate = Plan(
                        tp=tp,
                        pp=pp,
                        cp=cp,
                        dp=dp,
                        ep=ep,
                        etp=training.expert_tensor_parallel(tp) if moe else 1,
                        vpp=vpp,
                        schedule=schedule,
                        uneven_layers=vpp == 1 and even_split(layers, pp) is None,
                        micro_batch_size=size,
                        global_batch_size=batch,
                        zero=zero,  # type: ignore[arg-type]
                        sequence_parallel=sp,
                        recompute=recompute,
                    )
                    answer = estimate(model, cluster, candidate, training)
                except InputError:
                    continue
                if answer.fits:
                    found[candidate] = (answer.step_time_s, answer.peak_memory_bytes)
    return found


def with_memory(cluster: Cluster, size: float) -> Cluster:
    return replace(cluster, accelerator=replace(cluster.accelerator, memory_bytes=round(size)))


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "memory"), [("gpt2", 4, 8, 80e9), ("gpt2", 4, 8, 4.2e9), ("gpt2", 6, 12, 3.5e9)]
)
def test_nothing_is_missed(name: str, gpus: int, batch: int, memory: float) -> None:
    model, training = Model.load(name), Training(seq_len=1024)
    cluster = with_memory(Cluster.load("dgx-h100", 4 if gpus == 4 else 8), memory)
    if gpus == 6:
        cluster = replace(cluster, num_gpus=6)
    everything = brute_force(model, cluster, training, batch)
    assert everything
    wanted = Constraints(recompute=POLICIES)
    found = plan(model, cluster, training, global_batch_size=batch, top=10**6, constraints=wanted, simulate=False)
    best, searched = found.plans[0], {answer.plan: answer for answer in found.plans}
    assert best.step_time_s == pytest.approx(min(seconds for seconds, _ in everything.values()), rel=1e-12)
    # Every plan found is one of brute force. What brute force has beside them is no choice: full sharding over one
    # rank, another schedule of one stage; a plan with the same degrees is as fast and needs no more memory.
    assert set(searched) <= set(everything)
    alike: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for split, answer in searched.items():
        alike.setdefault(degrees_of(split), []).append((answer.step_time_s, answer.peak_memory_bytes))
    for split, (seconds, peak) in everything.items():
        if split not in searched:
            near = alike[degrees_of(split)]
            assert any(t <= seconds * (1 + 1e-9) and m <= peak * (1 + 1e-9) for t, m in near), split


def degrees_of(split: Plan) -> tuple[object, ...]:
    degrees = (split.tp, split.pp, split.vpp, split.cp, split.ep)
    return (*degrees, split.micro_batch_size, split.sequence_parallel, split.recompute)


def test_experts_are_not_missed() -> None:
    model, training, cluster = Model.load("switch-base-8"), Training(seq_len=512), Cluster.load("dgx-h100", 2)
    everything = brute_force(model, cluster, training, 2)
    wanted = Constraints(recompute=POLICIES)
    found = plan(model, cluster, training, global_batch_size=2, constraints=wanted, simulate=False)
    assert {candidate.ep for candidate in everything} == {1, 2}
    assert found.plans[0].step_time_s == pytest.approx(min(seconds for seconds, _ in everything.values()), rel=1e-12)


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


def test_best_plans_are_run_event_by_event() -> None:
    model, cluster = Model.load("llama-3-70b"), Cluster.load("dgx-h100", 128)
    wanted = Constraints(pp=(8,), tp=(4, 8))
    found = plan(model, cluster, TRAINING, global_batch_size=256, top=4, constraints=wanted)
    times = [estimate(model, cluster, answer.plan, TRAINING, simulate=True).step_time_s for answer in found.plans]
    assert [answer.step_time_s for answer in found.plans] == times
    assert times == sorted(times)
    closed = plan(model, cluster, TRAINING, global_batch_size=256, top=4, constraints=wanted, simulate=False)
    assert closed.plans[0].step_time_s == pytest.approx(times[0], rel=0.01)


def test_schedules_without_a_closed_form_are_simulated() -> None:
    model, cluster = Model.load("llama-2-7b"), Cluster.load("dgx-h100", 32)
    few = Constraints(pp=(4,), tp=(1, 2), cp=(1,), schedule=("zb-h1", "1f1b"), zero=("1",))
    found = plan(model, cluster, TRAINING, global_batch_size=64, top=200, constraints=few)
    by_schedule = {name: [a for a in found.plans if a.plan.schedule == name] for name in ("zb-h1", "1f1b")}
    assert by_schedule["zb-h1"]
    best = {name: min(a.step_time_s for a in answers) for name, answers in by_schedule.items()}
    # Input gradients do not wait for weight gradients: a third of the bubble, at the least, is gone.
    assert best["zb-h1"] < best["1f1b"]
    assert found.plans[0].plan.schedule == "zb-h1"
    only = plan(model, cluster, TRAINING, global_batch_size=64, constraints=replace(few, schedule=("zb-h1",)))
    assert {answer.plan.schedule for answer in only.plans} == {"zb-h1"}
    assert only.searched == only.feasible + sum(only.rejected.values())


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
        answer = found.plans[index]
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
    def stages(tp: int, pp: int, dp: int) -> set[str]:
        few = Constraints(tp=(tp,), pp=(pp,), cp=(1,), micro_batch_size=(1,), recompute=(Recompute(),), vpp=(1,))
        huge = with_memory(Cluster.load("dgx-h100", tp * pp * dp), 1e15)
        found = plan(LLAMA_7B, huge, TRAINING, global_batch_size=64, constraints=few, top=100)
        assert {answer.plan.dp for answer in found.plans} == {dp}
        return {answer.plan.zero for answer in found.plans}

    assert stages(1, 1, 64) == {"0", "1", "2", "hsdp", "3"}
    assert stages(8, 1, 8) == {"0", "1", "2", "3"}  # one rank of a node: nothing to shard inside it
    assert stages(1, 2, 32) == {"0", "1", "hsdp", "3"}  # ZeRO-2 does not go with a pipeline
    assert stages(8, 8, 1) == {"0"}


def test_full_sharding_is_found_where_nothing_else_fits() -> None:
    # 13 B parameters on eight 40 GB cards: 6 bytes a parameter unsharded do not leave room for long sequences.
    cluster = Cluster.load("azure-nd-a100-v4", 8)
    found = plan(Model.load("llama-7b"), cluster, Training(seq_len=4096, stack="fsdp1"), global_batch_size=8, top=500)
    assert {answer.plan.zero for answer in found.plans} >= {"3"}


# -- constraints -------------------------------------------------------------------------------------------------


def test_constraints_hold() -> None:
    cluster = Cluster.load("dgx-h100", 64)
    wanted = Constraints(
        tp=(2, 4),
        pp=(4,),
        dp=(2, 4),
        zero=("1",),
        schedule=("interleaved",),
        recompute=(Recompute(kind="full"),),
        sequence_parallel=False,
    )
    found = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, constraints=wanted, top=10**6)
    assert len(found.plans) == found.feasible > 0
    for answer in found.plans:
        split = answer.plan
        assert split.tp in (2, 4)
        assert (split.pp, split.zero, split.schedule, split.sequence_parallel) == (4, "1", "interleaved", False)
        assert split.dp in (2, 4)
        assert str(split.recompute) == "full"


def test_a_constraint_never_makes_it_faster() -> None:
    cluster = Cluster.load("dgx-h100", 64)
    free = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, top=1).plans[0]
    for wanted in (Constraints(tp=(8,)), Constraints(pp=(2, 4)), Constraints(zero=("3",)), Constraints(cp=(2,))):
        held = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, top=1, constraints=wanted).plans[0]
        assert held.step_time_s >= free.step_time_s


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Constraints(tp=(3,)), "tp does not divide the attention heads"),
        (Constraints(tp=(8,), pp=(4,), dp=(100,)), "tp x pp x cp x dp is not 64 GPUs"),
        (Constraints(dp=(48,)), "dp=48"),
        (Constraints(ep=(2,)), "no experts"),
        (Constraints(pp=(64,)), "fewer layers than pipeline stages"),
        (Constraints(tp=(16,)), "tp=16"),
    ],
)
def test_constraints_that_leave_nothing(wanted: Constraints, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        plan(LLAMA_7B, Cluster.load("dgx-h100", 64), TRAINING, global_batch_size=64, constraints=wanted)
    assert "no plan has" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pp": (1,), "vpp": (2,)}, "needs a pipeline"),
        ({"tp": (1,), "sequence_parallel": True}, "needs tp above 1"),
        ({"zero": ("2",), "pp": (4,)}, "does not go with a pipeline"),
        ({"vpp": (1,), "schedule": ("interleaved",)}, "needs vpp above 1"),
        ({"max_days": -1.0}, "max_days=-1"),
        ({"tp_within": "rack"}, "rack"),
    ],
)
def test_contradictions_are_seen_at_once(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Constraints(**fields)  # type: ignore[arg-type]


def test_limits_on_time_and_money() -> None:
    cluster, tokens = Cluster.load("dgx-h100", 64), 10**12
    few = Constraints(tp=(1, 2), cp=(1,), vpp=(1,))
    free = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, tokens=tokens, constraints=few)
    days = free.plans[0].training_time_s(tokens) / 86400

    def limited(**limits: float) -> PlanSearch:
        wanted = replace(few, **limits)  # type: ignore[arg-type]
        return plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, tokens=tokens, constraints=wanted)

    some = limited(max_days=days * 1.05)
    assert 0 < some.feasible < free.feasible
    assert some.searched == free.searched
    none = limited(max_days=days * 0.7)
    assert none.plans == ()
    assert none.nearest.step_time_s == pytest.approx(free.plans[0].step_time_s, rel=1e-12)
    assert none.changes[-2][0] == f"without max_days={days * 0.7:g}"
    assert none.changes[-2][1].plan == free.plans[0].plan
    assert none.changes[-1][0] in ("with 128 GPUs", "with 256 GPUs")
    price = cluster.accelerator.price_usd_per_hour
    assert price is not None
    usd = days * 24 * 64 * price
    assert limited(max_usd=usd * 1.0001).feasible >= 1
    assert limited(max_usd=usd * 0.9999).feasible == 0
    with pytest.raises(InputError, match="--tokens"):
        plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, constraints=Constraints(max_days=1.0))


# -- sizes, front ------------------------------------------------------------------------------------------------


def test_numbers_of_gpus() -> None:
    cluster = Cluster.load("dgx-h100", 64)
    small, large = (
        plan(LLAMA_7B, Cluster.load("dgx-h100", n), TRAINING, global_batch_size=64, top=1) for n in (16, 64)
    )
    both = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, sizes=exactly(cluster, [64, 16]), top=1)
    assert both.searched == small.searched + large.searched
    assert both.feasible == small.feasible + large.feasible
    assert both.plans[0].step_time_s == large.plans[0].step_time_s
    sizes = {c.num_gpus for c in at_most(cluster)}
    assert {1, 2, 4, 8, 16, 24, 64} <= sizes
    assert max(sizes) == 64


def test_no_plan_of_the_front_is_beaten() -> None:
    cluster = Cluster.load("dgx-h100", 32)
    few = Constraints(tp=(2, 4), cp=(1,), zero=("1", "3"), vpp=(1,), recompute=(Recompute(), Recompute(kind="full")))
    found = plan(
        LLAMA_7B,
        cluster,
        TRAINING,
        global_batch_size=32,
        sizes=at_most(cluster),
        constraints=few,
        top=10**6,
        simulate=False,
    )
    points = {(a.step_time_s, a.plan.num_gpus, a.peak_memory_bytes) for a in found.plans}
    kept = {(float(f"{c.step_time_s:.9g}"), c.plan.num_gpus, float(f"{c.peak_bytes:.9g}")) for c in found.front}
    expected = {p for p in points if not any(q != p and all(x <= y for x, y in zip(q, p, strict=True)) for q in points)}
    assert kept == {(float(f"{t:.9g}"), g, float(f"{m:.9g}")) for t, g, m in expected}
    assert len(kept) > 5
    assert [c.to_dict()["gpus"] for c in found.front] == [c.plan.num_gpus for c in found.front]


# -- reasons -----------------------------------------------------------------------------------------------------


def test_fixes_make_plans_fit() -> None:
    """The counts of fixes add up, and what they say is so when tried one by one."""
    model, cluster = Model.load("llama-2-70b"), Cluster.load("dgx-h100", 64)
    wanted = Constraints(tp=(8,), pp=(2,), cp=(1,), vpp=(1,), schedule=("1f1b",), micro_batch_size=(1, 2))
    found = plan(model, cluster, TRAINING, global_batch_size=64, constraints=wanted)
    outside = {reason: count for reason, count in found.rejected.items() if reason.startswith("out of memory")}
    assert outside
    assert {reason: sum(changes.values()) for reason, changes in found.fixes.items()} == outside
    full = found.fixes["out of memory with recompute=none"]["fits with recompute=full"]
    by_hand = 0
    policies = ["none", "every:8", "every:6", "every:4", "every:3", "every:2", "full"]
    for zero, size, sp in product(("0", "1", "3"), (1, 2), (False, True)):
        fits = []
        for policy in policies:
            candidate = Plan(
                tp=8,
                pp=2,
                dp=4,
                zero=zero,  # type: ignore[arg-type]
                micro_batch_size=size,
                global_batch_size=64,
                sequence_parallel=sp,
                recompute=Recompute.parse(policy),
            )
            answer = estimate(model, cluster, candidate, TRAINING)
            fits.append(answer.fits)
            usable = answer.usable_memory_bytes
            states = max(stage.state_bytes for stage in answer.stages) > usable
        by_hand += not states and not any(fits[:-1]) and fits[-1]
    assert full == by_hand


def test_given_plans_are_ranked() -> None:
    cluster = Cluster.load("dgx-h100", 64)
    few = Constraints(tp=(2, 4), cp=(1,), micro_batch_size=(1,), sequence_parallel=True, zero=("1",))
    everything = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, constraints=few, top=10**6, simulate=False)
    given = [everything.plans[0].plan, everything.plans[40].plan]
    found = plan(LLAMA_7B, cluster, TRAINING, global_batch_size=64, constraints=few, compare=given, simulate=False)
    first, other = found.comparisons
    assert first.rank == 1
    slower = [a for a in everything.plans if a.step_time_s < other.answer.step_time_s * (1 - 1e-9)]
    assert other.rank == len(slower) + 1
    assert f"place {other.rank} of {everything.feasible:,}" in other.why[0]
    assert found.to_dict()["comparisons"][1]["rank"] == other.rank


def test_given_plan_that_does_not_fit_is_fixed() -> None:
    cluster, model = Cluster.load("dgx-h100", 64), Model.load("llama-2-70b")
    given = parse_plan("tp=8,pp=2,mbs=4", 64, 64, TRAINING, experts=False)
    found = plan(model, cluster, TRAINING, global_batch_size=64, compare=[given])
    comparison = found.comparisons[0]
    assert not comparison.answer.fits
    assert comparison.fixed is not None
    assert comparison.fixed.fits
    assert comparison.fixed_rank is not None
    assert comparison.fixed_rank > 1
    assert "does not fit" in comparison.why[0]
    assert str(comparison.fix) in comparison.why[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=8,qq=2", "qq"),
        ("tp=3", "does not divide the 64 GPUs"),
        ("tp=8,tp=4", "once"),
        ("tp=eight", "tp=eight"),
        ("tp=8,dp=100", "800 GPUs"),
        ("tp=8,sp=maybe", "maybe"),
        ("tp=8,zero=7", "'7'"),
    ],
)
def test_plans_written_wrongly(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_plan(text, 64, 64, TRAINING, experts=False)


def test_written_plans() -> None:
    assert parse_plan("tp=2 pp=4 vpp=2 sp=off recompute=every:2", 64, 64, TRAINING, experts=False) == Plan(
        tp=2,
        pp=4,
        vpp=2,
        dp=8,
        schedule="interleaved",
        recompute=Recompute(kind="full", every=2),
        global_batch_size=64,
    )


def test_what_would_help_is_feasible() -> None:
    found = plan(
        Model.load("llama-2-70b"),
        Cluster.load("dgx-a100", 8),
        TRAINING,
        global_batch_size=64,
        constraints=Constraints(zero=("0",)),
    )
    assert found.plans == ()
    assert [text for text, _ in found.changes] == ["without zero=0", "with 16 GPUs"] or found.changes[-1][
        0
    ] == "with 16 GPUs"
    assert all(answer.fits for _, answer in found.changes)
