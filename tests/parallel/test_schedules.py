"""Schedules: exact traces, and the closed forms against the simulation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.parallel.schedules import (
    SCHEDULES,
    Action,
    Pair,
    StageTimes,
    Table,
    held_peak,
    in_flight_chunks,
    pipeline_time,
    schedule_actions,
    searched_zero_bubble,
    simulate,
    simulated_time,
    stage_of,
    zero_bubble_time,
)

CLOSED = ("gpipe", "1f1b", "interleaved", "looped-bfs")


def allowed(schedule: str, pp: int, m: int, vpp: int) -> bool:
    kind = SCHEDULES[schedule]
    if kind.rows is None or (pp == 1 and vpp > 1) or (vpp != kind.chunks if kind.chunks else vpp < 2):
        return False
    if schedule in ("interleaved", "interleaved-zb"):
        return m % pp == 0
    if schedule == "dualpipe":
        return pp % 2 == 0 and m % 2 == 0 and m >= 2 * pp
    return m >= (2 * pp if vpp == 2 and kind.chunks == 2 else pp if schedule == "looped-bfs" else 1)


CASES = [
    (schedule, pp, m, vpp)
    for schedule in SCHEDULES
    for pp in (1, 2, 4, 8)
    for m in (1, 2, 8, 16, 24)
    for vpp in (1, 2, 3)
    if allowed(schedule, pp, m, vpp)
]


def equal_stages(table: Table, forward: float, inputs: float, weights: float, lag: float = 0.0) -> StageTimes:
    n = table.num_stages
    return StageTimes(forward=[forward] * n, input_gradient=[inputs] * n, weight_gradient=[weights] * n, lag=lag)


def trace(table: Table, rank: int) -> str:
    words = []
    for item in table.rows[rank]:
        actions = item if isinstance(item, Pair) else (item,)
        words.append("&".join(f"{a.kind}{a.chunk if a.chunk else ''}.{a.micro_batch}" for a in actions))
    return " ".join(words)


def test_1f1b_trace_of_four_ranks() -> None:
    table = schedule_actions("1f1b", 4, 5)
    assert trace(table, 0) == "F.0 F.1 F.2 F.3 B.0 F.4 B.1 B.2 B.3 B.4"
    assert trace(table, 3) == "F.0 B.0 F.1 B.1 F.2 B.2 F.3 B.3 F.4 B.4"


def test_interleaved_trace_of_two_ranks() -> None:
    expected = "F.0 F.1 F1.0 F1.1 F.2 B1.0 F.3 B1.1 F1.2 B.0 F1.3 B.1 B1.2 B1.3 B.2 B.3"
    assert trace(schedule_actions("interleaved", 2, 4, 2), 0) == expected


def test_zb_h1_trace_of_three_ranks() -> None:
    # Weight gradients start as many input gradients late as the rank's number (arXiv:2401.10241, figure 2).
    table = schedule_actions("zb-h1", 3, 4)
    assert trace(table, 0) == "F.0 F.1 F.2 I.0 W.0 F.3 I.1 W.1 I.2 W.2 I.3 W.3"
    assert trace(table, 2) == "F.0 I.0 F.1 I.1 F.2 I.2 W.0 F.3 I.3 W.1 W.2 W.3"


def test_dualpipe_trace_of_two_ranks() -> None:
    # Both ranks hold both stages; the second starts with the second half of the micro-batches and chunk 1.
    table = schedule_actions("dualpipe", 2, 4)
    assert trace(table, 0) == "F.0 F1.2 F.1 B1.2 F1.3&B.0 B1.3 I.1 W.1"
    assert trace(table, 1) == "F1.2 F.0 F1.3 B.0 F.1&B1.2 B.1 I1.3 W1.3"


@pytest.mark.parametrize(("schedule", "pp", "m", "vpp"), [case for case in CASES if case[0] in CLOSED])
def test_closed_form_equals_simulation(schedule: str, pp: int, m: int, vpp: int) -> None:
    table = schedule_actions(schedule, pp, m, vpp)
    timeline = simulate(table, equal_stages(table, 1.0, 1.5, 0.5))
    assert timeline.total_s == pytest.approx(pipeline_time([3.0 * vpp] * pp, m, vpp), rel=1e-12)
    assert timeline.busy_s == pytest.approx([3.0 * vpp * m] * pp)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["zb-h1", "zb-h2", "interleaved-zb"]),
    st.integers(2, 6),
    st.integers(2, 4),
    st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3),
)
def test_zero_bubble_closed_form_equals_simulation(schedule: str, pp: int, groups: int, times: list[float]) -> None:
    forward, inputs, weights = times
    vpp = 2 if schedule == "interleaved-zb" else 1
    table = schedule_actions(schedule, pp, groups * pp, vpp)
    closed = zero_bubble_time(schedule, pp, groups * pp, forward, inputs, weights, vpp)
    assert simulate(table, equal_stages(table, *times)).total_s == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_published_bubbles(pp: int) -> None:
    m, unit = 4 * pp, 1.0

    def idle(schedule: str, vpp: int = 1) -> float:
        table = schedule_actions(schedule, pp, m, vpp)
        times = equal_stages(table, unit / vpp, unit / vpp, unit / vpp)
        return simulated_time(table, times, SCHEDULES[schedule].synchronised) - 3 * m * unit

    # arXiv:2401.10241, table 2: with T_F = T_B = T_W, 1F1B 3 (p-1), ZB-H1 p-1, ZB-H2 0; section 6: ZB-V 0.
    assert idle("1f1b") == pytest.approx(3 * (pp - 1))
    assert idle("zb-h1") == pytest.approx(pp - 1)
    assert idle("zb-h2") == pytest.approx(0)
    assert idle("zb-v", 2) == pytest.approx(0)
    # arXiv:2412.19437, table 2: DualPipe (p/2 - 1) (F&B + B - 3 W), folded: the same with all p ranks and half chunks.
    assert idle("dualpipe") == pytest.approx((pp / 2 - 1) * (3 + 2 - 3))
    assert idle("dualpipe-v", 2) == pytest.approx((pp - 1) * (3 + 2 - 3) / 2)


@pytest.mark.parametrize(("schedule", "most"), [("zb-h1", 4), ("zb-h2", 7), ("zb-v", 4), ("dualpipe", 5)])
def test_published_micro_batches_in_flight(schedule: str, most: int) -> None:
    # p, 2p - 1, p (arXiv:2401.10241, tables 2 and 3), p + 1 (arXiv:2412.19437, table 2); chunks of a V are halves.
    vpp = SCHEDULES[schedule].chunks
    table = schedule_actions(schedule, 4, 16, vpp)
    for rank in range(4):
        assert held_peak(table.actions(rank), [1 / vpp] * 2, [1 / vpp] * 2)[0] == most


@pytest.mark.parametrize(("schedule", "pp", "m", "vpp"), CASES)
def test_tables_do_everything_once_and_let_go_of_it(schedule: str, pp: int, m: int, vpp: int) -> None:
    table = schedule_actions(schedule, pp, m, vpp)
    share = m // SCHEDULES[schedule].copies
    for rank in range(pp):
        actions = table.actions(rank)
        work = [part for a in actions for part in (("I", "W") if a.kind == "B" else (a.kind,))]
        assert {kind: work.count(kind) for kind in "FIW"} == dict.fromkeys("FIW", share * table.chunks)
        assert len(set(actions)) == len(actions)
        held = 0.0
        for action in actions:
            held += {"F": 1.0, "B": -1.0, "I": -0.25, "W": -0.75}[action.kind]
            assert held >= -1e-9
        assert held == pytest.approx(0)
    assert simulate(table, equal_stages(table, 1, 1, 1)).busy_s == pytest.approx([3.0 * share * table.chunks] * pp)


@pytest.mark.parametrize(("schedule", "pp", "m", "vpp"), [case for case in CASES if case[0] in CLOSED])
def test_in_flight_equals_the_most_that_the_table_holds(schedule: str, pp: int, m: int, vpp: int) -> None:
    table = schedule_actions(schedule, pp, m, vpp)
    for rank in range(pp):
        assert in_flight_chunks(schedule, pp, m, rank, vpp) == held_peak(table.actions(rank), [1] * vpp, [0] * vpp)[0]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 6).flatmap(lambda pp: st.lists(st.floats(0.1, 3.0), min_size=pp, max_size=pp)),
    st.integers(1, 4),
)
def test_uneven_stages(stages: list[float], groups: int) -> None:
    pp = len(stages)
    m = groups * pp
    for schedule, vpp in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2)):
        third = [s / 3 / vpp for s in stages] * vpp
        times = StageTimes(forward=third, input_gradient=third, weight_gradient=third)
        total = simulate(schedule_actions(schedule, pp, m, vpp), times).total_s
        closed = pipeline_time(stages, m, vpp)
        assert m * max(stages) * (1 - 1e-9) <= total <= closed * (1 + 1e-9)
        if schedule == "gpipe":
            assert total == pytest.approx(closed, rel=1e-9)


def test_a_heavy_last_stage_stays_near_the_closed_form() -> None:
    # The head on the last of eight ranks: the closed form is at most four percent above the simulation.
    stages = [1.0] * 7 + [1.3]
    third = [s / 3 for s in stages]
    times = StageTimes(forward=third, input_gradient=third, weight_gradient=third)
    total = simulate(schedule_actions("1f1b", 8, 32), times).total_s
    assert 0.96 < total / pipeline_time(stages, 32) <= 1


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(*[st.floats(0.2, 2.0)] * 3), min_size=2, max_size=6),
    st.integers(1, 20),
    st.sampled_from([1, 2]),
    st.floats(0.2, 1.0),
)
def test_searched_tables_respect_their_memory_and_beat_the_handmade(
    stages: list[tuple[float, float, float]], m: int, limit: int, pending: float
) -> None:
    pp = len(stages)
    forward, inputs, weights = zip(*stages, strict=True)
    table = searched_zero_bubble(m, limit * pp, pending, forward, inputs, weights)
    times = StageTimes(forward=forward, input_gradient=inputs, weight_gradient=weights)
    found = simulated_time(table, times, synchronised=False)
    handmade = schedule_actions(f"zb-h{limit}", pp, m)
    assert found <= simulated_time(handmade, times, synchronised=False) * (1 + 1e-9)
    assert found >= m * max(map(sum, stages)) * (1 - 1e-9)
    for rank in range(pp):
        assert len(table.actions(rank)) == 3 * m
        assert held_peak(table.actions(rank), [1], [pending])[0] <= limit * pp + 1e-6


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CASES), st.floats(0, 1))
def test_transfers_never_make_it_faster(case: tuple[str, int, int, int], lag: float) -> None:
    table = schedule_actions(*case)
    without = simulate(table, equal_stages(table, 1, 1, 1)).total_s
    assert simulate(table, equal_stages(table, 1, 1, 1, lag)).total_s >= without - 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case[1:3] in ((4, 8), (4, 16))])
def test_every_action_starts_when_what_it_needs_is_there(case: tuple[str, int, int, int]) -> None:
    # The definition of a pipeline, checked without the simulator's own bookkeeping.
    table = schedule_actions(*case)
    pp, stages = case[1], table.num_stages
    forward = [1 + 0.1 * s for s in range(stages)]
    inputs = [1.2 - 0.05 * s for s in range(stages)]
    weights = [0.7 + 0.03 * s for s in range(stages)]
    times = StageTimes(forward=forward, input_gradient=inputs, weight_gradient=weights, lag=0.3)
    start, end, home = {}, {}, {}
    for rank, starts in enumerate(simulate(table, times).start_s):
        busy_until = 0.0
        for action, at in starts.items():
            stage = stage_of(table.placement, pp, rank, action.chunk)
            for part in ("I", "W") if action.kind == "B" else (action.kind,):
                start[part, stage, action.micro_batch] = at
            price = {
                "F": forward,
                "B": [i + w for i, w in zip(inputs, weights, strict=True)],
                "I": inputs,
                "W": weights,
            }
            paired = any(isinstance(item, Pair) and action in item for item in table.rows[rank])
            if not paired:
                assert at >= busy_until - 1e-9
                busy_until = at + price[action.kind][stage]
                for part in ("I", "W") if action.kind == "B" else (action.kind,):
                    end[part, stage, action.micro_batch] = busy_until
            home[stage, action.micro_batch] = rank
    for (kind, stage, i), at in start.items():
        before = {"F": ("F", stage - 1, i), "I": ("I", stage + 1, i), "W": ("I", stage, i)}[kind]
        if before in end and before[1] != stage:
            travels = home[before[1], i] != home[stage, i]
            assert at >= end[before] + 0.3 * travels - 1e-9
        if kind == "I" and ("F", stage, i) in end:
            assert at >= end["F", stage, i] - 1e-9


def test_wrong_schedules() -> None:
    with pytest.raises(InputError, match="did you mean 1f1b"):
        schedule_actions("1f1", 2, 4)
    with pytest.raises(InputError, match="pp=4 divides, but there are 6"):
        schedule_actions("interleaved", 4, 6, 2)
    with pytest.raises(InputError, match="even number of micro-batches"):
        schedule_actions("dualpipe", 4, 9)
    with pytest.raises(InputError, match="at least 8 micro-batches"):
        schedule_actions("zb-v", 4, 6, 2)
    with pytest.raises(InputError, match="depends on the times"):
        schedule_actions("zb-2p", 4, 8)
    row = (Action("B", 0, 0), Action("F", 0, 0))
    with pytest.raises(InputError, match="deadlocks"):
        simulate(
            Table(placement="loop", chunks=1, rows=(row,)),
            StageTimes(forward=[1.0], input_gradient=[1.0], weight_gradient=[0.0]),
        )
