"""The schedules by name: what each needs, and its action table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from simllm.errors import InputError, unknown_name
from simllm.parallel.schedules.actions import Placement, Row, Table
from simllm.parallel.schedules.classic import gpipe, interleaved, looped_bfs, one_f_one_b
from simllm.parallel.schedules.dualpipe import dualpipe, dualpipe_v
from simllm.parallel.schedules.zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2, zb_v

__all__ = ["SCHEDULES", "Schedule", "check_schedule", "schedule_actions", "schedule_named"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is particular about a schedule.

    Attributes
    ----------
    name : str
    rows : callable, optional
        ``(pp, micro_batches, chunks of a rank) -> rows``; None where the table depends on the times of the stages.
    chunks : int
        Model chunks of a rank; 0: two or more, as the plan says.
    placement : {"loop", "v", "both"}
    splits_backward : bool
        Input and weight gradients are actions of their own.
    closed_form : bool
        Time and memory follow without a table.
    synchronised : bool
        Ranks wait for each other between steps, as the global gradient norm demands. The zero-bubble schedules update
        first and check afterwards (arXiv:2401.10241, section 4).
    pairs : bool
        Forwards run beside backwards.
    limit : int
        Of a searched table: micro-batches that a rank may hold, in multiples of pp.
    """

    name: str
    rows: Callable[[int, int, int], tuple[Row, ...]] | None
    chunks: int = 1
    placement: Placement = "loop"
    splits_backward: bool = False
    closed_form: bool = False
    synchronised: bool = True
    pairs: bool = False
    limit: int = 0

    @property
    def copies(self) -> int:
        """How often the model is held by the ranks together."""
        return 2 if self.placement == "both" else 1


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(name="gpipe", rows=lambda pp, m, v: gpipe(pp, m), closed_form=True),
        Schedule(name="1f1b", rows=lambda pp, m, v: one_f_one_b(pp, m), closed_form=True),
        Schedule(name="interleaved", rows=interleaved, chunks=0, closed_form=True),
        Schedule(name="looped-bfs", rows=looped_bfs, chunks=0, closed_form=True),
        Schedule(name="zb-h1", rows=lambda pp, m, v: zb_h1(pp, m), splits_backward=True, synchronised=False),
        Schedule(name="zb-h2", rows=lambda pp, m, v: zb_h2(pp, m), splits_backward=True, synchronised=False),
        Schedule(name="zb-1p", rows=None, splits_backward=True, synchronised=False, limit=1),
        Schedule(name="zb-2p", rows=None, splits_backward=True, synchronised=False, limit=2),
        Schedule(
            name="zb-v",
            rows=lambda pp, m, v: zb_v(pp, m),
            chunks=2,
            placement="v",
            splits_backward=True,
            synchronised=False,
        ),
        Schedule(name="interleaved-zb", rows=interleaved_zero_bubble, chunks=0, splits_backward=True),
        Schedule(
            name="dualpipe",
            rows=lambda pp, m, v: dualpipe(pp, m),
            placement="both",
            splits_backward=True,
            pairs=True,
        ),
        Schedule(
            name="dualpipe-v",
            rows=lambda pp, m, v: dualpipe_v(pp, m),
            chunks=2,
            placement="v",
            splits_backward=True,
            pairs=True,
        ),
    )
}


def schedule_named(name: str) -> Schedule:
    """A schedule by name.

    >>> schedule_named("zb-v").placement
    'v'
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def check_schedule(name: str, pp: int, num_micro_batches: int, vpp: int) -> None:
    """Refuse what a schedule cannot run.

    Raises
    ------
    InputError
        Saying which chunks or micro-batches it needs.
    """
    schedule, m = schedule_named(name), num_micro_batches
    if vpp > 1 and pp == 1:
        raise InputError(f"vpp={vpp} needs a pipeline, but pp=1; use vpp=1 or a larger pp")
    if schedule.chunks == 1 and vpp != 1:
        many = ", ".join(other.name for other in SCHEDULES.values() if other.chunks == 0)
        raise InputError(f"schedule={name} with vpp={vpp}: it needs vpp=1; {many} take more")
    if schedule.chunks == 2 and vpp != 2:
        raise InputError(f"schedule={name} with vpp={vpp}: its V has two chunks a rank; use vpp=2")
    if schedule.chunks == 0 and vpp == 1:
        raise InputError(f"schedule={name} with vpp=1: it needs vpp above 1, and 1f1b is the same with vpp=1")
    if name in ("interleaved", "interleaved-zb") and m % pp:
        raise InputError(
            f"the {name} schedule needs a number of micro-batches that pp={pp} divides, "
            f"but there are {m}; change micro_batch_size, dp or vpp"
        )
    few = {"looped-bfs": pp, "zb-v": 2 * pp, "dualpipe": 2 * pp, "dualpipe-v": 2 * pp}.get(name, 1)
    if m < few:
        raise InputError(
            f"schedule={name} with pp={pp} needs at least {few} micro-batches, but there are {m}; "
            "use a larger global_batch_size or a smaller micro_batch_size, dp or pp"
        )
    if name == "dualpipe" and (pp % 2 or m % 2):
        raise InputError(f"schedule=dualpipe needs an even pp and an even number of micro-batches; got pp={pp}, {m}")


@lru_cache(maxsize=512)
def schedule_actions(name: str, pp: int, num_micro_batches: int, vpp: int = 1) -> Table:
    """The action table of a schedule.

    Parameters
    ----------
    name : str
        A name of `SCHEDULES` other than zb-1p and zb-2p, whose tables follow from the times of the stages
        (`searched_zero_bubble`).
    pp, num_micro_batches, vpp : int

    Examples
    --------
    >>> [f"{a.kind}{a.micro_batch}" for a in schedule_actions("zb-h1", 2, 3).actions(1)]
    ['F0', 'I0', 'F1', 'I1', 'W0', 'F2', 'I2', 'W1', 'W2']
    """
    schedule = schedule_named(name)
    if schedule.rows is None:
        raise InputError(f"the table of {name} depends on the times of the stages")
    check_schedule(name, pp, num_micro_batches, vpp)
    rows = schedule.rows(pp, num_micro_batches, vpp)
    return Table(placement=schedule.placement, chunks=2 if schedule.placement == "both" else vpp, rows=rows)
