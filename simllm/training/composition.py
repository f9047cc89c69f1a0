"""How the parts of a step add up: the formulas that one plan and a million plans share.

Every function takes floats, or numpy arrays with one element a plan. `Step` puts one plan together with them,
`simllm.planner.assemble` all plans of a search at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, TypeVar

from simllm.elementwise import Real
from simllm.hardware.stack import Overlap
from simllm.models.graph import Graph
from simllm.parallel.schedules import Schedule
from simllm.parallel.stages import Stage
from simllm.training.cost import Cost
from simllm.training.exposure import exposed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "accumulation_s",
    "data_parallel_s",
    "over_blocks",
    "sharded_exposure",
    "step_s",
    "transfer_share",
    "transfers_of",
    "update_bytes",
]

_Summed = TypeVar("_Summed", float, "NDArray[np.float64]", Cost)


def over_blocks(stage: Stage, block: Callable[[Graph, bool], _Summed]) -> _Summed:
    """A quantity of one micro-batch, added up over the blocks of a rank.

    Parameters
    ----------
    stage : Stage
    block : callable
        ``(graph, whether it is a layer) -> quantity``.
    """
    parts = [block(graph, True) * times for graph, times in stage.layers]
    parts += [block(graph, False) for graph in stage.extras]
    return reduce(add, parts)


def accumulation_s(stream_s: Real, num_micro_batches: Real) -> Real:
    """Adding a micro-batch's gradients to those before, a mean over the step: the first one is only stored.

    >>> accumulation_s(0.25, 5)
    0.2
    """
    return stream_s * (num_micro_batches - 1) / num_micro_batches


def sharded_exposure(
    gather_s: Real, reduce_s: Real, forward_s: Real, backward_s: Real, share: float
) -> tuple[Real, Real]:
    """What shows of a block's data-parallel traffic under full sharding, forward and backward.

    Its parameters are gathered for the forward and again for the backward pass, its gradients reduced in the latter
    (arXiv:2304.11277, section 3.3).
    """
    return exposed(gather_s, forward_s, share), exposed(gather_s + reduce_s, backward_s, share)


def transfers_of(stage: Stage, pp: int, vpp: int, schedule: Schedule) -> int:
    """Transfers of one micro-batch that a pipeline rank takes part in.

    Every chunk receives and sends once forward and once backward, except at the ends of the model; a send and the
    receive of the same moment are one exchange. At the turn of a V a chunk hands over to one of its own rank.
    """
    if pp == 1:
        return 0
    turns = schedule.placement == "v" and stage.rank == pp - 1
    return 2 * max(vpp, schedule.copies) - stage.first - stage.last - 2 * turns


def transfer_share(vpp: int, schedule: Schedule, overlap: Overlap) -> float:
    """The part of a transfer that occupies the ranks.

    With one chunk a rank sends and waits; with several, other chunks have work meanwhile.
    """
    return 1.0 if vpp * schedule.copies == 1 else overlap.pipeline_exposed.si


def data_parallel_s(
    reduce_s: Real, gather_s: Real, forward_s: Real, backward_s: Real, reductions: Real, overlap: Overlap
) -> Real:
    """What shows of a step's data-parallel traffic on one rank, without full sharding.

    Gradients are reduced beside the backward pass of the last micro-batch, parameters gathered beside the forward pass
    of the first.

    Parameters
    ----------
    reduce_s, gather_s : float
        Seconds of one reduction of all gradients and one gather of all parameters of the rank.
    forward_s, backward_s : float
        Of one micro-batch.
    reductions : float
        How often gradients are reduced: once, with ZeRO-2 in every micro-batch.
    overlap : Overlap
    """
    shown = reductions * exposed(reduce_s, backward_s, overlap.gradient_exposed.si)
    return shown + exposed(gather_s, forward_s, overlap.parameter_gather_exposed.si)


def update_bytes(
    weights: tuple[float, float], moments: tuple[float, float], degrees: tuple[int, int], traffic: float
) -> float:
    """Bytes that the optimizer moves on one rank: its share's states are read and written once, its moments too.

    Parameters
    ----------
    weights, moments : (dense, experts)
        Parameters of the rank, and bytes of their moments, before sharding.
    degrees : (dense, experts)
        Ranks that share them.
    traffic : float
        Bytes moved per parameter, the moments apart.
    """
    parameters = weights[0] / degrees[0] + weights[1] / degrees[1]
    return parameters * traffic + 2 * (moments[0] / degrees[0] + moments[1] / degrees[1])


def step_s(busiest_s: Real, bubble_s: Real, once_s: Real) -> Real:
    """Seconds of a step: the busiest rank's micro-batches, the bubble, what is done once a step."""
    return busiest_s + bubble_s + once_s
