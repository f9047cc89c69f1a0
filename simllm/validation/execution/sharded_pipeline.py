"""Peak memory of a pipeline rank whose parameters FSDP2 shards, along its actions.

`torch.distributed.pipelining` tells FSDP2 not to free or to reduce anything until the last backward pass of a step.
So a backward pass gathers layer after layer and leaves them gathered until a forward pass frees them, and gradients
add up unsharded in the precision they are reduced in, each layer's copied there from the precision of its products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simllm.parallel.schedules import Action

__all__ = ["ShardedBlock", "ShardedChunk", "sharded_pipeline_peak"]


@dataclass(frozen=True, kw_only=True)
class ShardedBlock:
    """A layer, or what is outside the layers, of one model chunk; sizes in bytes.

    Attributes
    ----------
    kept : float
        What a micro-batch keeps for its backward pass.
    working, working_again : float
        Most bytes at once while it goes backward, what was kept included; in the first backward pass of a step, and
        in a later one.
    units : tuple of float
        Gathered parameters, padding included, by unit of FSDP2: the layer's own, and its experts'.
    reduced : tuple of float
        Input of the reduce-scatter of each unit.
    made : tuple of float
        Gradients as their products make them, by parameter.
    copied : float
        Bytes of an added-up gradient over those of one that was made; 1: there is no copy.
    """

    kept: float = 0.0
    working: float = 0.0
    working_again: float = 0.0
    units: tuple[float, ...] = ()
    reduced: tuple[float, ...] = ()
    made: tuple[float, ...] = ()
    copied: float = 1.0

    @property
    def gathered(self) -> float:
        """Bytes of all gathered parameters."""
        return sum(self.units)

    @property
    def gradients(self) -> float:
        """Bytes of the added-up gradients."""
        return sum(self.made) * self.copied

    @property
    def copying(self) -> float:
        """Most bytes while the gradients are copied one by one, each freed after its copy."""
        if self.copied == 1.0:
            return sum(self.made)
        return max(
            (self.copied * sum(self.made[: i + 1]) + sum(self.made[i:]) for i in range(len(self.made))), default=0.0
        )


@dataclass(frozen=True, kw_only=True)
class ShardedChunk:
    """One model chunk of a rank.

    Attributes
    ----------
    layers : tuple of ShardedBlock
        In the order of the forward pass.
    stem, head : ShardedBlock
        What is outside the layers, gathered with the whole chunk: empty where the chunk has none. The working memory
        of the head is what the loss takes beside what was kept.
    """

    layers: tuple[ShardedBlock, ...]
    stem: ShardedBlock
    head: ShardedBlock

    @property
    def kept(self) -> float:
        """Bytes that a micro-batch keeps."""
        return sum(layer.kept for layer in self.layers) + self.stem.kept + self.head.kept

    @property
    def root(self) -> float:
        """Gathered bytes outside the layers."""
        return self.stem.gathered + self.head.gathered

    @property
    def gathered(self) -> float:
        """Gathered bytes of the whole chunk."""
        return sum(layer.gathered for layer in self.layers) + self.root

    @property
    def gradients(self) -> float:
        """Added-up gradients of the whole chunk."""
        return sum(block.gradients for block in (*self.layers, self.stem, self.head))


def sharded_pipeline_peak(actions: Iterable[Action], chunks: Sequence[ShardedChunk], frees: bool) -> float:
    """Most bytes beside the states at any moment of a step.

    Parameters
    ----------
    actions : iterable of Action
        Forward and backward passes of the rank.
    chunks : sequence of ShardedChunk
    frees : bool
        Whether a forward pass frees what was gathered (stage 3).
    """
    gathered, gradients, received = ([0.0] * len(chunks) for _ in range(3))
    held = peak = 0.0
    for action in actions:
        chunk, number = chunks[action.chunk], action.chunk
        elsewhere = held + sum(gathered) - gathered[number] + sum(received) - received[number] + sum(gradients)
        if action.kind == "F":
            peak = max(peak, elsewhere + _forward(chunk, gathered[number] > 0))
            # What the last layer was gathered in stays until the chunk gathers again.
            received[number] = 0.0 if gathered[number] else chunk.layers[-1].units[-1]
            held += chunk.kept
            gathered[number] = 0.0 if frees else chunk.gathered
            continue
        held -= chunk.kept
        received[number] = 0.0
        elsewhere -= chunk.kept + gradients[number]
        peak = max(peak, elsewhere + _backward(chunk, gathered[number] > 0, gradients[number] > 0))
        gathered[number], gradients[number] = chunk.gathered, chunk.gradients
    return max(peak, _reductions(chunks))


def _forward(chunk: ShardedChunk, all_gathered: bool) -> float:
    """Bytes of the chunk, and of its micro-batch, that goes forward: layers are freed behind it."""
    gathered = chunk.gathered if all_gathered else chunk.root
    kept, peak = chunk.stem.kept, 0.0
    for layer in chunk.layers:
        kept += layer.kept
        peak = max(peak, kept + gathered + (0.0 if all_gathered else 2 * layer.gathered))
        gathered -= layer.gathered if all_gathered else 0.0
    return peak


def _backward(chunk: ShardedChunk, all_gathered: bool, again: bool) -> float:
    """Bytes of the chunk, and of its micro-batch, that goes backward."""
    head, stem = chunk.head, chunk.stem
    gathered = chunk.gathered if all_gathered else chunk.root
    gradients = chunk.gradients if again else 0.0
    left = sum(layer.kept for layer in chunk.layers) + stem.kept
    following = 0.0 if all_gathered else chunk.layers[-1].units[0]
    peak = left + head.kept + head.working + gathered + following + gradients
    made = sum(head.made) if not again or head.copied != 1.0 else 0.0  # those of the head wait for the end
    for i, layer in reversed(list(enumerate(chunk.layers))):
        for unit in layer.units if not all_gathered else ():
            gathered += unit
            # What was received is copied into the parameters.
            peak = max(peak, left + gathered + unit + gradients + made)
        following = chunk.layers[i - 1].units[0] if i and not all_gathered else 0.0
        left -= layer.kept
        working = layer.working_again if again else layer.working
        peak = max(peak, left + working + gathered + following + gradients + made)
        waiting = layer.copying - (layer.gradients if again else 0.0)
        peak = max(peak, left + gathered + following + gradients + made + waiting)
        gradients += 0.0 if again else layer.gradients
    outside = ShardedBlock(made=stem.made + head.made, copied=head.copied)
    return max(peak, gathered + gradients + outside.copying - (outside.gradients if again else 0.0))


def _reductions(chunks: Sequence[ShardedChunk]) -> float:
    """At the end units are freed and reduced one by one, what is outside the layers first."""
    gathered, gradients = sum(chunk.gathered for chunk in chunks), sum(chunk.gradients for chunk in chunks)
    peak = 0.0
    for chunk in chunks:
        for block in (chunk.stem, chunk.head, *chunk.layers):
            for unit, reduced in zip(block.units, block.reduced, strict=True):
                gathered -= unit
                peak = max(peak, gathered + gradients + reduced)
            gradients -= block.gradients
    return peak
