"""Schedules without a closed form: the best plans of one that has one, run event by event in the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simllm.errors import InputError
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import SCHEDULES
from simllm.planner.constraints import Constraints

__all__ = ["open_schedules", "stand_in", "with_schedule"]


def open_schedules(constraints: Constraints) -> tuple[str, ...]:
    """The allowed schedules that have to be simulated; none unless they are named.

    >>> open_schedules(Constraints()), open_schedules(Constraints(schedule=("1f1b", "zb-h1")))
    ((), ('zb-h1',))
    """
    return tuple(name for name in constraints.schedule if not SCHEDULES[name].closed_form)


def stand_in(constraints: Constraints, schedule: str) -> Constraints:
    """The same question for the closed-form schedule with as many chunks: it orders the plans to be simulated.

    >>> stand_in(Constraints(schedule=("zb-v",)), "zb-v").schedule
    ('interleaved',)
    """
    chunks = SCHEDULES[schedule].chunks
    vpp = constraints.vpp or ((chunks,) if chunks else ())
    return replace(constraints, schedule=("1f1b",) if chunks == 1 else ("interleaved",), vpp=vpp)


def with_schedule(plans: Iterator[Plan], schedule: str) -> Iterator[Plan]:
    """The plans that can run another schedule, with it."""
    for plan in plans:
        try:
            if plan.pp > 1:
                yield replace(plan, schedule=schedule)
        except InputError:  # too few micro-batches, an odd number of stages
            continue
