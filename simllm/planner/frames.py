"""Plans that share a pipeline, as arrays, and the numbers that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from simllm.hardware import Cluster
from simllm.models import Model
from simllm.parallel.plan import Plan
from simllm.parallel.stages import Stage, pipeline_stages
from simllm.planner.prices import Block
from simllm.planner.space import Structure
from simllm.training import Training
from simllm.training.step import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Evaluated", "Frame", "Kind", "Shared", "kinds_of"]


@dataclass(frozen=True, eq=False, slots=True)
class Evaluated:
    """Plans of one structure.

    Attributes
    ----------
    structure : Structure
    cells : array of int
        The cell of every plan.
    time_s, peak_bytes : array of float
        Seconds of a step, and peak memory of the rank that needs most.
    state_bytes : array of float
        What no recomputation and no smaller micro-batch frees, on the rank that has most of it.
    host_fits : array of bool
        Whether every node's host holds what is offloaded.
    """

    structure: Structure
    cells: Ints
    time_s: Floats
    peak_bytes: Floats
    state_bytes: Floats
    host_fits: NDArray[np.bool_]

    def where(self, able: NDArray[np.bool_]) -> Evaluated:
        """Some of the plans."""
        return Evaluated(
            self.structure,
            self.cells[able],
            self.time_s[able],
            self.peak_bytes[able],
            self.state_bytes[able],
            self.host_fits[able],
        )


@dataclass(frozen=True, eq=False)
class Frame:
    """Cells that make a plan with one pipeline degree and schedule, and their blocks.

    ``communicators``: of every plan, HSDP's second group apart. ``share``: for every plan, which of ``sharing`` it is;
    plans of one have the same weights and the same data-parallel ranks, and ``sharing`` holds a plan's fields for each.
    ``dealt``: numbers that were dealt out already.
    """

    cells: Ints
    num_micro_batches: Floats
    blocks: dict[int, Block]
    transfer_s: Floats
    communicators: Ints
    share: Ints
    sharing: tuple[dict[str, Any], ...]
    dealt: dict[tuple[Any, ...], list[Floats]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Kind:
    """Pipeline ranks that hold the same blocks."""

    stage: Stage
    ranks: tuple[int, ...]
    key: tuple[Any, ...]


def kinds_of(model: Model, structure: Structure) -> list[Kind]:
    """The kinds of pipeline ranks of a structure."""
    found: dict[tuple[Any, ...], list[Stage]] = {}
    stages = pipeline_stages(model.graph, structure.pp, structure.vpp, structure.uneven_layers)
    for stage in stages:
        layers = tuple((id(graph), times) for graph, times in stage.layers)
        key = (layers, tuple(id(graph) for graph in stage.extras), stage.first, stage.last)
        found.setdefault(key, []).append(stage)
    return [Kind(same[0], tuple(stage.rank for stage in same), key) for key, same in found.items()]


class Shared:
    """Numbers that plans with the same weights and the same data-parallel ranks share, for one number of GPUs.

    Parameters
    ----------
    model : Model
    cluster : Cluster
    training : Training
    """

    def __init__(self, model: Model, cluster: Cluster, training: Training) -> None:
        self.model, self.cluster, self.training = model, cluster, training
        self._numbers: dict[tuple[Any, ...], tuple[float, ...]] = {}
        self._steps: dict[tuple[Any, ...], Step] = {}

    def step(self, structure: Structure, fields: dict[str, Any]) -> Step:
        """The scalar step of one plan of those that share weights and data-parallel ranks."""
        return Step(self.model, self.cluster, Plan(**fields | vars(structure)), self.training)

    def numbers(
        self, frame: Frame, structure: Structure, what: tuple[Any, ...], of: Callable[[Step], tuple[float, ...]]
    ) -> list[Floats]:
        """Numbers of a scalar step, computed once for all plans that share them, dealt out to the plans.

        ``what`` names the numbers; beside it they depend on the weights and the data-parallel ranks only.
        """
        offload = str(structure.offload)
        dealt = (*what, structure.zero, offload)
        if dealt in frame.dealt:
            return frame.dealt[dealt]
        found = []
        for fields in frame.sharing:
            degrees = (structure.pp, fields["tp"], fields["ep"], fields["etp"], fields["sequence_parallel"])
            share = (structure.precision, structure.zero, offload, *degrees)
            numbers = self._numbers.get((*what, *share))
            if numbers is None:
                if share not in self._steps:
                    self._steps[share] = self.step(structure, fields)
                numbers = self._numbers[(*what, *share)] = of(self._steps[share])
            found.append(numbers)
        frame.dealt[dealt] = [np.array(column)[frame.share] for column in zip(*found, strict=True)]
        return frame.dealt[dealt]
