"""What the blocks of a model cost in every cell of a space: priced by the engine, once each, kept as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import saved_bytes
from simllm.parallel.memory import kept_bytes, layer_peak_bytes, loss_peak_bytes
from simllm.parallel.plan import Plan
from simllm.planner.space import Cells
from simllm.training import Training
from simllm.training.step import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Block", "Prices"]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """What one micro-batch of a block takes on a rank, an array over the cells for each quantity."""

    forward_s: Floats
    backward_s: Floats
    kept_bytes: Floats
    peak_bytes: Floats


class Prices:
    """What the blocks of a model cost in every cell, each priced once when a plan first needs it.

    Parameters
    ----------
    model : Model
    cluster : Cluster
        Any size: what happens inside a stage depends on the domain, not on the number of nodes.
    training : Training
    cells : Cells
    precision : str
    """

    def __init__(self, model: Model, cluster: Cluster, training: Training, cells: Cells, precision: str) -> None:
        graph = model.graph
        layers = tuple(layer for layer, _ in graph.layer_parts)
        outside = (graph.stem, *(bridge for _, bridge in graph.bridges), *graph.last_extras, graph.head)
        self._graphs = (*((layer, True) for layer in layers), *((extra, False) for extra in outside))
        self._head = graph.head
        self._ask = (model, cluster, training)
        self._cells, self._precision = cells, precision
        self._known = np.zeros(cells.count, dtype=bool)
        self.blocks: dict[int, Block] = {
            id(block): Block(*(np.full(cells.count, np.nan) for _ in range(4))) for block, _ in self._graphs
        }
        self.transfer_bytes: Floats = np.full(cells.count, np.nan)

    def need(self, cells: Ints) -> None:
        """Price the cells that are not priced yet."""
        for cell in cells[~self._known[cells]].tolist():
            self._price(cell)
        self._known[cells] = True

    def _price(self, cell: int) -> None:
        model, cluster, training = self._ask
        fields = self._cells.fields(cell)
        ranks = fields["ep"] * fields["etp"]
        batch = ranks * fields["micro_batch_size"]
        plan = Plan(**fields, dp=ranks, global_batch_size=batch, precision=self._precision)
        step = Step(model, cluster, plan, training)
        layout, impl, policy = step.layout, step.engine.impl, plan.recompute
        self.transfer_bytes[cell] = sum(exchange.size_bytes for exchange in step.p2p())
        for graph, is_layer in self._graphs:
            block = self.blocks[id(graph)]
            cost = step.engine.block(graph, layout, step.groups, policy, is_layer)
            block.forward_s[cell], block.backward_s[cell] = cost.forward.total, cost.backward.total
            if is_layer:
                block.kept_bytes[cell] = kept_bytes(graph, layout, impl, policy)
                block.peak_bytes[cell] = layer_peak_bytes(graph, layout, impl, policy)
            else:
                block.kept_bytes[cell] = saved_bytes(graph, layout, impl)
                if graph is self._head:
                    block.peak_bytes[cell] = loss_peak_bytes(graph, layout, impl)
