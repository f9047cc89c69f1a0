"""Peak memory of a pipeline rank whose parameters are whole, along its actions.

`torch.distributed.pipelining` receives in buffers that stay from step to step, one for each micro-batch and direction.
Schedules of one chunk wait for a transfer before the next; those of several wait for all at the end of a step, and
until then what was sent stays. A backward pass in two halves frees nothing after the first: PyTorch keeps the graph
until the weights' gradients are there, and beside it the gradients that reached the operators with weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simllm.parallel.schedules import Action

__all__ = ["Chunk", "pipeline_peak"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One model chunk of a rank; sizes in bytes.

    Attributes
    ----------
    kept : float
        What a micro-batch keeps for its backward pass, the received input apart, which is a buffer.
    working : float
        Most bytes at once while it goes backward, what was kept included.
    output, gradient : float
        What stays of a forward and of a backward pass because it was sent, or is to be.
    splitting : float
        Most bytes of gradients in the first half of a split backward pass; 0 where it does nothing.
    pending : float
        Gradients that wait with the graph for the second half.
    weights : float
        Weight gradients at once in the second half: those of a product, and of the one before it.
    loosened : float
        What the first half frees: the tensors of operators behind the last one with weights.
    """

    kept: float
    working: float
    output: float = 0.0
    gradient: float = 0.0
    splitting: float = 0.0
    pending: float = 0.0
    weights: float = 0.0
    loosened: float = 0.0


def pipeline_peak(actions: Sequence[Action], chunks: Sequence[Chunk], sent_stays: bool) -> float:
    """Most bytes beside states and receive buffers at any moment of a step.

    Parameters
    ----------
    actions : sequence of Action
        Of one rank, in order.
    chunks : sequence of Chunk
    sent_stays : bool
        Whether what was sent stays until the end of the step, or only an output until its own backward pass.

    Examples
    --------
    >>> chunk = Chunk(kept=3.0, working=5.0, output=1.0)
    >>> pipeline_peak([Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)], [chunk], False)
    10.0
    """
    held = peak = 0.0
    for action in actions:
        chunk = chunks[action.chunk]
        if action.kind == "F":
            held += chunk.kept + chunk.output
            peak = max(peak, held)
            continue
        if action.kind == "B":
            peak = max(peak, held - chunk.kept + chunk.working)
            held -= chunk.kept + (0.0 if sent_stays else chunk.output)
        elif action.kind == "I":
            peak = max(peak, held + chunk.splitting)
            held += chunk.pending - chunk.loosened
        else:
            peak = max(peak, held - chunk.kept + chunk.working if not chunk.splitting else held + chunk.weights)
            held -= chunk.kept + chunk.pending - chunk.loosened
        if action.kind in "BI" and sent_stays:
            held += chunk.gradient
    return peak
