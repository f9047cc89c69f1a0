"""Schedules: exact traces, and the closed form against the simulation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.parallel.schedules import Action, in_flight_chunks, pipeline_time, schedule_actions, simulate

CASES = [
    (schedule, pp, m, vpp)
    for schedule in ("gpipe", "1f1b", "interleaved")
    for pp in (1, 2, 4, 8)
    for m in (1, 2, 8, 16, 24)
    for vpp in (1, 2, 3)
    if (vpp > 1) == (schedule == "interleaved") and (vpp == 1 or (pp > 1 and m % pp == 0))
]


def trace(row: tuple[Action, ...]) -> str:
    return " ".join(f"{a.kind}{a.chunk if a.chunk else ''}.{a.micro_batch}" for a in row)


def test_1f1b_trace_of_four_ranks() -> None:
    rows = schedule_actions("1f1b", 4, 5)
    assert trace(rows[0]) == "F.0 F.1 F.2 F.3 B.0 F.4 B.1 B.2 B.3 B.4"
    assert trace(rows[3]) == "F.0 B.0 F.1 B.1 F.2 B.2 F.3 B.3 F.4 B.4"


def test_interleaved_trace_of_two_ranks() -> None:
    rows = schedule_actions("interleaved", 2, 4, 2)
    assert trace(rows[0]) == "F.0 F.1 F1.0 F1.1 F.2 B1.0 F.3 B1.1 F1.2 B.0 F1.3 B.1 B1.2 B1.3 B.2 B.3"


@pytest.mark.parametrize(("schedule", "pp", "m", "vpp"), CASES)
def test_closed_form_equals_simulation(schedule: str, pp: int, m: int, vpp: int) -> None:
    actions = schedule_actions(schedule, pp, m, vpp)
    timeline = simulate(actions, [1.0] * (pp * vpp), [2.0] * (pp * vpp))
    assert timeline.total_s == pytest.approx(pipeline_time([3.0 * vpp] * pp, m, vpp), rel=1e-12)
    assert timeline.busy_s == pytest.approx([3.0 * vpp * m] * pp)


@pytest.mark.parametrize(("schedule", "pp", "m", "vpp"), CASES)
def test_in_flight_equals_the_most_that_the_table_holds(schedule: str, pp: int, m: int, vpp: int) -> None:
    for rank, row in enumerate(schedule_actions(schedule, pp, m, vpp)):
        held = most = 0
        for action in row:
            held += 1 if action.kind == "F" else -1
            most = max(most, held)
        assert held == 0
        assert in_flight_chunks(schedule, pp, m, rank, vpp) == most
        assert len(set(row)) == len(row) == 2 * m * vpp


@settings(deadline=None)
@given(
    st.integers(2, 6).flatmap(lambda pp: st.lists(st.floats(0.1, 3.0), min_size=pp, max_size=pp)),
    st.integers(1, 4),
)
def test_uneven_stages(stages: list[float], groups: int) -> None:
    pp = len(stages)
    m = groups * pp
    for schedule, vpp in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2)):
        forward, backward = [s / 3 / vpp for s in stages] * vpp, [2 * s / 3 / vpp for s in stages] * vpp
        total = simulate(schedule_actions(schedule, pp, m, vpp), forward, backward).total_s
        closed = pipeline_time(stages, m, vpp)
        assert m * max(stages) * (1 - 1e-9) <= total <= closed * (1 + 1e-9)
        if schedule == "gpipe":
            assert total == pytest.approx(closed, rel=1e-9)


def test_a_heavy_last_stage_stays_near_the_closed_form() -> None:
    # The head on the last of eight ranks: the closed form is at most four percent above the simulation.
    stages = [1.0] * 7 + [1.3]
    total = simulate(schedule_actions("1f1b", 8, 32), [s / 3 for s in stages], [2 * s / 3 for s in stages]).total_s
    assert 0.96 < total / pipeline_time(stages, 32) <= 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 10), st.floats(0, 1))
def test_transfers_never_make_it_faster(pp: int, m: int, p2p: float) -> None:
    actions = schedule_actions("1f1b", pp, m)
    without = simulate(actions, [1.0] * pp, [2.0] * pp).total_s
    assert simulate(actions, [1.0] * pp, [2.0] * pp, p2p).total_s >= without - 1e-12


def test_starts_are_in_order_and_never_overlap() -> None:
    timeline = simulate(schedule_actions("1f1b", 3, 6), [1.0, 2.0, 1.5], [2.0, 4.0, 3.0])
    for rank, starts in enumerate(timeline.start_s):
        clock = 0.0
        for action, start in starts.items():
            assert start >= clock - 1e-12
            clock = start + ([1.0, 2.0, 1.5] if action.kind == "F" else [2.0, 4.0, 3.0])[rank]


def test_wrong_schedules() -> None:
    with pytest.raises(InputError, match="did you mean 1f1b"):
        schedule_actions("1f1", 2, 4)
    with pytest.raises(InputError, match="pp=4 to divide the 6"):
        schedule_actions("interleaved", 4, 6, 2)
    deadlock = ((Action("B", 0, 0), Action("F", 0, 0)),)
    with pytest.raises(InputError, match="deadlocks"):
        simulate(deadlock, [1.0], [1.0])
