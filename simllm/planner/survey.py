"""All plans of one number of GPUs: which can be, which fit, how long they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from simllm.hardware import Cluster
from simllm.parallel.plan import Plan
from simllm.planner.assemble import Assembly
from simllm.planner.frames import Evaluated
from simllm.planner.prices import Prices
from simllm.planner.space import Cells, Space, Structure, schedule_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["STATES_TOO_LARGE", "TOO_SLOW", "Survey", "survey"]

STATES_TOO_LARGE = "out of memory: the model and optimizer states alone"
_HOST_TOO_SMALL = "out of memory: the hosts cannot hold what is offloaded"
TOO_SLOW = "takes longer or costs more than allowed"


@dataclass(frozen=True, eq=False)
class Survey:
    """Every plan of a space for one number of GPUs, as arrays with one element a plan.

    Attributes
    ----------
    cluster : Cluster
    cells : Cells
    structures : list of Structure
    structure, cell : array of int
        What each plan is made of: positions in ``structures`` and ``cells``.
    time_s, peak_bytes, state_bytes : array of float
        Seconds of a step, peak memory, and the part of it that is model and optimizer states.
    fits : array of bool
        Whether the peak leaves the head-room free, and the hosts hold what is offloaded.
    in_memory : array of bool
        The first of the two.
    allowed : array of bool
        Those of them that keep the limits on time and money.
    rejected : Counter
        Reason -> combinations that are no plan at all.
    excluded : Counter
        Reason -> combinations that the number of GPUs or a fixed degree leaves out; not counted as searched.
    """

    cluster: Cluster
    global_batch_size: int
    cells: Cells
    structures: list[Structure]
    structure: Ints
    cell: Ints
    time_s: Floats
    peak_bytes: Floats
    state_bytes: Floats
    fits: NDArray[np.bool_]
    in_memory: NDArray[np.bool_]
    allowed: NDArray[np.bool_]
    usable_bytes: float
    rejected: Counter[str]
    excluded: Counter[str]

    def __len__(self) -> int:
        return len(self.time_s)

    def plan(self, number: int) -> Plan:
        """One of the plans."""
        fields = self.cells.fields(int(self.cell[number])) | vars(self.structures[int(self.structure[number])])
        dp = self.cluster.num_gpus // (fields["tp"] * fields["cp"] * fields["pp"])
        return Plan(**fields, dp=dp, global_batch_size=self.global_batch_size)

    @cached_property
    def feasible(self) -> Ints:
        """The plans that can be recommended, fastest first; of equal ones the one that needs least memory."""
        able = np.flatnonzero(self.allowed)
        return able[np.lexsort((self.peak_bytes[able], self.time_s[able]))]

    @cached_property
    def front(self) -> Ints:
        """The feasible plans that no other one beats in both time and memory, fastest first."""
        peaks = self.peak_bytes[self.feasible]
        before = np.minimum.accumulate(np.concatenate(([np.inf], peaks[:-1])))
        return self.feasible[peaks < before]

    def faults(self) -> tuple[Ints, tuple[str, ...]]:
        """For every plan the reason it is not feasible for, as a position in a list; -1 for those that are."""
        policies = self.cells.values["recompute"]
        reasons = (
            STATES_TOO_LARGE,
            TOO_SLOW,
            _HOST_TOO_SMALL,
            *(f"out of memory with recompute={policy}" for policy in policies),
        )
        fault = self.cells.columns["recompute"][self.cell] + 3
        fault[self.state_bytes > self.usable_bytes] = 0
        fault[self.in_memory] = 2
        fault[self.fits] = 1
        fault[self.allowed] = -1
        return fault, reasons

    def counts(self) -> Counter[str]:
        """Reason -> combinations that are not feasible."""
        fault, reasons = self.faults()
        found = np.bincount(fault[fault >= 0], minlength=len(reasons)).tolist()
        return self.rejected + Counter(dict(zip(reasons, found, strict=True)))


def survey(
    space: Space,
    prices: dict[str, Prices] | Callable[[Cells], dict[str, Prices]],
    usable_bytes: float,
    slowest_s: float,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Evaluate a space.

    Parameters
    ----------
    space : Space
    prices : callable
        Makes the prices of a table of cells by precision.
    usable_bytes : float
        Memory that a plan may use.
    slowest_s : float
        The longest step that keeps the limits on time and money.
    progress : callable, optional
        Called now and then with the plans evaluated so far.
    """
    cells = space.cells()
    structures: list[Structure] = []
    rejected: Counter[str] = Counter()
    excluded: Counter[str] = Counter()
    valid = np.flatnonzero(cells.fault == -1)
    for structure in space.structures():
        if isinstance(structure, str):
            rejected[structure] += len(valid)
        else:
            structures.append(structure)
    faulty = np.bincount(cells.fault[cells.fault >= 0], minlength=len(cells.reasons) + 1).tolist()
    for reason, count in zip(cells.reasons, faulty, strict=False):
        rejected[reason] += count * len(structures)
    table = prices(cells) if callable(prices) else prices
    assembly = Assembly(space.model, space.cluster, space.training, space.global_batch_size, cells, table)
    found: list[Evaluated] = []
    done = 0
    for evaluated in _evaluate(space, assembly, valid, structures, rejected, excluded):
        found.append(evaluated)
        done += len(evaluated.cells)
        if progress is not None:
            progress(done)
    numbers = {structure: number for number, structure in enumerate(structures)}
    time_s = _joined([e.time_s for e in found])
    peak_bytes = _joined([e.peak_bytes for e in found])
    in_memory = peak_bytes <= usable_bytes
    fits = in_memory & (np.concatenate([e.host_fits for e in found]) if found else in_memory)
    return Survey(
        cluster=space.cluster,
        global_batch_size=space.global_batch_size,
        cells=cells,
        structures=structures,
        structure=np.repeat(
            np.array([numbers[e.structure] for e in found], dtype=np.int64), [len(e.cells) for e in found]
        ),
        cell=np.concatenate([e.cells for e in found]) if found else np.zeros(0, dtype=np.int64),
        time_s=time_s,
        peak_bytes=peak_bytes,
        state_bytes=_joined([e.state_bytes for e in found]),
        fits=fits,
        in_memory=in_memory,
        allowed=fits & (time_s <= slowest_s),
        usable_bytes=usable_bytes,
        rejected=+rejected,
        excluded=+excluded,
    )


def _joined(arrays: list[Floats]) -> Floats:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _evaluate(
    space: Space,
    assembly: Assembly,
    valid: Ints,
    structures: list[Structure],
    rejected: Counter[str],
    excluded: Counter[str],
) -> Iterator[Evaluated]:
    for (precision, pp), same_pipeline in groupby(structures, key=lambda s: (s.precision, s.pp)):
        group = list(same_pipeline)
        cells, dp = _that_multiply(space, assembly.cells, valid, pp, len(group), rejected, excluded)
        if not len(cells):
            continue
        micro_batches = space.global_batch_size // (dp * assembly.cells.columns["micro_batch_size"][cells])
        counts = np.unique(micro_batches).tolist()
        frames = {}
        for (vpp, schedule), alike in groupby(group, key=lambda s: (s.vpp, s.schedule)):
            sharded = list(alike)
            runs = tuple(m for m in counts if schedule_runs(schedule, pp, vpp, m))
            able = np.isin(micro_batches, runs)
            reason = f"schedule {schedule} does not run with this number of micro-batches"
            rejected[reason] += int((~able).sum()) * len(sharded)
            if not runs:
                continue
            if runs not in frames:
                frames[runs] = assembly.frame(precision, pp, cells[able], dp[able])
            yield from assembly.evaluate(frames[runs], sharded)


def _that_multiply(
    space: Space, cells: Cells, valid: Ints, pp: int, structures: int, rejected: Counter[str], excluded: Counter[str]
) -> tuple[Ints, Ints]:
    """The cells that make plans with so many stages, and their data-parallel ranks."""
    gpus, batch, columns = space.cluster.num_gpus, space.global_batch_size, cells.columns
    dp = gpus // (columns["tp"] * columns["cp"] * pp)
    tests: list[tuple[Counter[str], str, Callable[[Ints], NDArray[np.bool_]]]] = [
        (
            excluded,
            f"tp x pp x cp does not divide {gpus} GPUs",
            lambda c: gpus % (columns["tp"][c] * columns["cp"][c] * pp) == 0,
        ),
        (
            excluded,
            f"tp x pp x cp x dp is not {gpus} GPUs",
            lambda c: np.isin(dp[c], space.constraints.dp or np.unique(dp)),
        ),
        (rejected, "dp does not divide the global batch", lambda c: batch % dp[c] == 0),
        (
            rejected,
            "the micro-batch does not divide dp's share of the batch",
            lambda c: batch // dp[c] % columns["micro_batch_size"][c] == 0,
        ),
        (
            rejected,
            "ep does not divide the ranks of a stage",
            lambda c: columns["tp"][c] * columns["cp"][c] * dp[c] % (columns["ep"][c] * cells.etp[c]) == 0,
        ),
    ]
    left = valid
    for counter, reason, test in tests:
        passed = test(left)
        counter[reason] += int((~passed).sum()) * structures
        left = left[passed]
    return left, dp[left]
