"""One rank of a case as the predictions see it: its blocks, chunks, parameters and groups, and named terms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from simllm.models.activations import Recompute
from simllm.models.build import build_graph
from simllm.models.graph import Graph, Operator
from simllm.parallel.schedules import Action, schedule_actions
from simllm.parallel.stages import pipeline_stages
from simllm.validation.execution.case import Case, group_ranks
from simllm.validation.execution.weights import Unit, stage_units

__all__ = ["RankView", "Term", "operator_named"]


@dataclass(frozen=True)
class Term:
    """A named difference between the count and what PyTorch does, and how much it is."""

    quantity: str
    amount: float
    why: str


class RankView:
    """What a prediction needs to know of a rank.

    Parameters
    ----------
    case : Case
    rank : int
        Global rank.
    backend : {"gloo", "nccl", "fake"}
        Of the process group that executed it.
    """

    def __init__(self, case: Case, rank: int, backend: str) -> None:
        plan = case.plan
        self.case, self.rank, self.plan, self.backend = case, rank, plan, backend
        self.impl, self.layout = case.implementation, case.layout
        self.graph = build_graph(case.spec)
        self.pp_rank = rank // (plan.tp * plan.dp)
        self.groups = group_ranks(case, rank)
        placement = plan.pipeline.placement
        self.stage = pipeline_stages(self.graph, plan.pp, plan.vpp, plan.uneven_layers, placement)[self.pp_rank]
        self.m = plan.num_micro_batches
        self.terms: list[Term] = []
        #: Layers of each model chunk with their place in the model.
        self.chunks = [
            [(index, self.graph.layers[index]) for index in range(*span)] for span in case.spans(self.pp_rank)
        ]
        self.layers = [layer for chunk in self.chunks for layer in chunk]
        experts = "experts" in {w.component for part, _ in self.graph.parts for w in part.weights}
        self.experts_apart = experts and (plan.ep > 1 or plan.tp > 1)
        graphs = [graph for _, graph in self.layers]
        self.units: list[Unit] = stage_units(self.stage, graphs, self.layout, plan.pp, self.experts_apart)

    def term(self, quantity: str, amount: float, why: str) -> int:
        """Note a named difference, and return it."""
        if amount:
            self.terms.append(Term(quantity, amount, why))
        return round(amount)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """What the schedule has this rank do."""
        plan = self.plan
        if plan.pp == 1:
            return ()
        return schedule_actions(plan.schedule, plan.pp, self.m, plan.vpp).actions(self.pp_rank)

    @cached_property
    def blocks(self) -> list[tuple[Graph, Recompute]]:
        """Every block of this rank with what is recomputed in it: what is outside the layers first."""
        return [(graph, Recompute()) for graph in self.stage.extras] + [
            (graph, self.policy(index)) for index, graph in self.layers
        ]

    def policy(self, layer: int) -> Recompute:
        """What is recomputed in a layer of the model."""
        policy = self.plan.recompute
        return policy if policy.kind != "full" or layer % policy.every == 0 else Recompute()

    # -- parameters ----------------------------------------------------------------------------------------------

    def shard_ranks(self, unit: Unit) -> int:
        """Ranks over which FSDP2 shards a unit."""
        if self.plan.zero not in ("2", "3", "hsdp"):
            return 1
        if unit.experts:
            return len(self.groups.expert_dp)
        if self.plan.zero == "hsdp":
            return self.case.hsdp_shard
        return self.plan.dp

    def shard_rank(self, unit: Unit) -> int:
        """Which of those this rank is."""
        group = self.groups.expert_dp if unit.experts else self.groups.dp
        return group.index(self.rank) % self.shard_ranks(unit)

    @cached_property
    def parameters(self) -> int:
        """Elements of this rank's shards."""
        return sum(
            p.shard_of(self.shard_ranks(unit), self.shard_rank(unit)) for unit in self.units for p in unit.parameters
        )

    @cached_property
    def layer_units(self) -> list[list[Unit]]:
        """The units of each layer: its own, and its experts where other ranks share them."""
        apart = [unit for unit in self.units if not unit.root]
        return [[apart.pop(0), *([apart.pop(0)] if apart and apart[0].experts else [])] for _ in self.layers]

    def chunk_of(self, unit: Unit) -> int:
        """The model chunk that a unit is in; what is outside the layers is in the first or in the last."""
        if unit.root:
            return self.plan.vpp - 1 if self.stage.last and not self.stage.first and unit is self.units[-1] else 0
        layer = next(i for i, units in enumerate(self.layer_units) if any(one is unit for one in units))
        ends = [sum(len(chunk) for chunk in self.chunks[: i + 1]) for i in range(len(self.chunks))]
        return next(i for i, end in enumerate(ends) if layer < end)


def operator_named(graph: Graph, name: str) -> Operator:
    """The operator of a name."""
    return next(operator for operator in graph.operators if operator.name == name)
