"""What a schedule is made of: actions, tables of them, and which stage of the model a rank's chunk is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Action", "Pair", "Placement", "Row", "Table", "stage_of"]

#: ``loop``: chunk c of rank r is stage c * pp + r. ``v``: down the ranks with chunk 0 and back up with chunk 1.
#: ``both``: two copies of a model of pp stages, one going down the ranks and one going up.
Placement = Literal["loop", "v", "both"]


class Action(NamedTuple):
    """One unit of work of a pipeline rank on one model chunk for one micro-batch.

    ``kind``: F forward, B whole backward, I gradient of the input only, W gradient of the weights only.
    """

    kind: str
    chunk: int
    micro_batch: int


class Pair(NamedTuple):
    """A forward and a backward that run beside each other: the communication of one hides behind the other."""

    forward: Action
    backward: Action


Row = tuple[Action | Pair, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The work of every rank, in order. Tables are made once and known by identity: they can be long.

    Attributes
    ----------
    placement : {"loop", "v", "both"}
    chunks : int
        Model chunks on a rank.
    rows : tuple of Row
        One row per pipeline rank.
    """

    placement: Placement
    chunks: int
    rows: tuple[Row, ...]

    @property
    def num_stages(self) -> int:
        """Stages that the model is cut into."""
        return len(self.rows) * (1 if self.placement == "both" else self.chunks)

    def actions(self, rank: int) -> tuple[Action, ...]:
        """The actions of a rank; of a pair the forward first."""
        flat: list[Action] = []
        for item in self.rows[rank]:
            flat += item if isinstance(item, Pair) else (item,)
        return tuple(flat)


def stage_of(placement: Placement, pp: int, rank: int, chunk: int) -> int:
    """The stage of the model that a chunk of a rank is.

    >>> [stage_of("v", 4, rank, 1) for rank in range(4)], stage_of("loop", 4, 1, 1), stage_of("both", 4, 1, 1)
    ([7, 6, 5, 4], 5, 2)
    """
    if chunk == 0 or placement == "loop":
        return chunk * pp + rank
    return (2 * pp if placement == "v" else pp) - 1 - rank
