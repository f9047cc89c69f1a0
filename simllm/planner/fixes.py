"""What would make a plan fit that does not: the nearest change of one choice, looked up for all plans at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from simllm.errors import InputError
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan, Zero
from simllm.planner.compare import NO_CHANGE
from simllm.planner.space import CELL_AXES, Cells, Structure
from simllm.planner.survey import Survey
from simllm.training import Estimate, Training, estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["fix_of", "nearest_fixes"]

_SHARDING: tuple[Zero, ...] = ("1", "2", "hsdp", "3")


def nearest_fixes(survey: Survey) -> dict[str, dict[str, int]]:
    """For every reason that plans do not fit for: the nearest change that makes them fit -> plans.

    Changes are tried from the one that costs least: recomputation, sequence parallelism, sharding, a smaller
    micro-batch, more GPUs to a stage, more stages. A plan counts under the first that is enough.

    Parameters
    ----------
    survey : Survey
    """
    outside = np.flatnonzero(~survey.fits)
    structure, cell = survey.structure[outside], survey.cell[outside]
    # One row and one column more: what a change that cannot be made leads to, and never fits.
    fits = np.zeros((len(survey.structures) + 1, survey.cells.count + 1), dtype=bool)
    fits[survey.structure[survey.fits], survey.cell[survey.fits]] = True
    labels: list[str] = [NO_CHANGE]
    label = np.zeros(len(outside), dtype=np.int64)
    for text, structures, cells in _changes(survey.cells, survey.structures):
        open_ = np.flatnonzero(label == 0)
        if not len(open_):
            break
        works = fits[structures[structure[open_]], cells[cell[open_]]]
        label[open_[works]] = len(labels)
        labels.append(text)
    fault, reasons = survey.faults()
    found: dict[str, dict[str, int]] = {}
    for number, reason in enumerate(reasons):
        counts = np.bincount(label[fault[outside] == number], minlength=len(labels)).tolist()
        here = Counter({text: count for text, count in zip(labels, counts, strict=True) if count})
        if here:
            found[reason] = dict(here.most_common())
    return found


def _changes(cells: Cells, structures: list[Structure]) -> Iterator[tuple[str, Ints, Ints]]:
    """Changes with where they lead: from each structure to a structure, and from each cell to a cell; -1: nowhere."""
    same_structure, same_cell = np.arange(len(structures)), np.arange(cells.count)
    for position, policy in enumerate(cells.values["recompute"]):
        if position:
            yield f"fits with recompute={policy}", same_structure, _moved(cells, "recompute", position, rising=True)
    if True in cells.values["sequence_parallel"]:
        position = cells.values["sequence_parallel"].index(True)
        yield "fits with sequence parallelism", same_structure, _moved(cells, "sequence_parallel", position)
    numbers = {structure: number for number, structure in enumerate(structures)}
    for zero in _SHARDING:
        before = ("0", *_SHARDING[: _SHARDING.index(zero)])
        to = [numbers.get(replace(s, zero=zero), -1) if s.zero in before else -1 for s in structures]
        yield f"fits with zero={zero}", np.array(to, dtype=np.int64), same_cell
    for offload in dict.fromkeys(structure.offload for structure in structures if structure.offload.anything):
        to = [numbers.get(replace(s, offload=offload), -1) if not s.offload.anything else -1 for s in structures]
        yield f"fits with offload={offload}", np.array(to, dtype=np.int64), same_cell
    sizes = cells.values["micro_batch_size"]
    for size in sorted(sizes, reverse=True):
        yield f"fits with micro-batch {size}", same_structure, _moved(cells, "micro_batch_size", sizes.index(size))
    for axis in ("tp", "cp", "ep"):
        values = cells.values[axis]
        for value in sorted(values):
            moved = _moved(cells, axis, values.index(value), rising=True)
            if axis == "ep":
                yield f"fits with ep={value}", same_structure, moved
                continue
            before_change = sorted({v for v in values if v < value})
            for old in before_change:
                here = np.where(cells.columns[axis] == old, moved, -1)
                factor = f"{value // old} times" if value % old == 0 else f"{value}/{old} times"
                yield f"needs {factor} the GPUs per stage: {axis}={value}", same_structure, here
    for pp in sorted({structure.pp for structure in structures}):
        to = [numbers.get(replace(s, pp=pp), -1) if s.pp < pp else -1 for s in structures]
        yield f"fits with pp={pp}", np.array(to, dtype=np.int64), same_cell


def _moved(cells: Cells, axis: str, position: int, rising: bool = False) -> Ints:
    """From each cell to the one that differs in one axis only; ``rising``: only from positions before it."""
    shape = cells.shape
    number = CELL_AXES.index(axis)
    stride = int(np.prod(shape[number + 1 :], dtype=np.int64))
    everyone = np.arange(cells.count)
    at = everyone // stride % shape[number]
    to = everyone + (position - at) * stride
    # Sizes of micro-batches fall: smaller ones stand before.
    able = at < position if rising else at != position
    if axis == "micro_batch_size":
        able = cells.columns[axis] > cells.values[axis][position]
    return np.where(able, to, -1)


def fix_of(answer: Estimate) -> tuple[str, Estimate] | None:
    """The nearest single change that makes one plan fit, in words and estimated, or None.

    Parameters
    ----------
    answer : Estimate
        Of a plan that does not fit.
    """
    for text, changed in _variants(answer.plan, answer.training):
        try:
            tried = estimate(answer.model, answer.cluster, changed(), answer.training)
        except InputError:
            continue
        if tried.fits:
            return text, tried
    return None


def _variants(plan: Plan, training: Training) -> Iterator[tuple[str, Callable[[], Plan]]]:
    for policy in ("selective", "every:4", "every:2", "full"):
        yield f"fits with recompute={policy}", partial(replace, plan, recompute=Recompute.parse(policy))
    if plan.tp > 1 and not plan.sequence_parallel:
        yield "fits with sequence parallelism", partial(replace, plan, sequence_parallel=True)
    for zero in _SHARDING[_SHARDING.index(plan.zero) + 1 if plan.zero in _SHARDING else 0 :]:
        yield f"fits with zero={zero}", partial(replace, plan, zero=zero)
    for size in (n for n in range(plan.micro_batch_size - 1, 0, -1) if plan.micro_batch_size % n == 0):
        yield f"fits with micro-batch {size}", partial(replace, plan, micro_batch_size=size)
    for axis in ("tp", "cp"):
        for factor in (2, 4, 8):
            value = getattr(plan, axis) * factor
            more = plan.tp * plan.cp * (factor - 1)
            moved = partial(_with_degree, plan, axis, value, training)
            yield f"needs {more} more GPUs per stage: {axis}={value}", moved
    for factor in (2, 4):
        yield f"fits with pp={plan.pp * factor}", partial(_with_degree, plan, "pp", plan.pp * factor, training)


def _with_degree(plan: Plan, axis: str, value: int, training: Training) -> Plan:
    """The plan on as many GPUs with one degree larger and fewer replicas."""
    factor = value // getattr(plan, axis)
    if plan.dp % factor:
        raise InputError(f"{axis}={value} leaves no whole number of replicas")
    fields: dict[str, Any] = {axis: value, "dp": plan.dp // factor}
    if axis == "cp" and plan.cp == 1:
        fields["cp_comm_type"] = training.context_kind(value)
    sequence = plan.sequence_parallel or (axis == "tp" and plan.tp == 1)
    return replace(plan, **fields, sequence_parallel=sequence)
