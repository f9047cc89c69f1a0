"""One optimizer step of one plan: stages, pipeline, data parallelism and optimizer put together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from simllm.errors import UnsupportedError
from simllm.hardware import Cluster
from simllm.hardware.stack import Stack
from simllm.models import Model
from simllm.models.activations import recomputed_operators
from simllm.models.counts import operator_flops
from simllm.models.graph import Graph, Layout
from simllm.network import Group, price
from simllm.parallel.memory import StageMemory, shard_degrees, stage_memory
from simllm.parallel.placement import group_of
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import pipeline_time
from simllm.parallel.stages import (
    Stage,
    block_frozen_bytes,
    block_weights,
    pipeline_stages,
    stage_moments,
    stage_weights,
)
from simllm.parallel.states import StateBytes
from simllm.training.cost import Cost
from simllm.training.engine import BlockGroups, Engine
from simllm.training.run import Training

__all__ = ["Exchange", "StageTime", "Step", "StepTime", "engine_for", "exposed"]


_ALONE = Group(size=1)


def exposed(communication_s: float, window_s: float, share: float) -> float:
    """Communication that shows beside a window of computation.

    What does not fit into the window shows, and of the rest the share that the software leaves visible.

    >>> exposed(3.0, 2.0, 0.5), exposed(1.0, 2.0, 0.0), exposed(1.0, 2.0, 1.0)
    (2.0, 0.0, 1.0)
    """
    return max(0.0, communication_s - window_s) + share * min(communication_s, window_s)


@lru_cache(maxsize=64)
def engine_for(cluster: Cluster, stack: Stack, precision: str) -> Engine:
    """The engine of a cluster, stack and precision; its caches live as long as it is used."""
    return Engine(cluster, stack, precision)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One micro-batch on one pipeline rank, all of its chunks together."""

    forward: Cost
    backward: Cost
    p2p_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the micro-batch on this rank."""
        return self.forward.total + self.backward.total + self.p2p_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step by cause; they add up to ``total_s``."""

    total_s: float
    by_cause: dict[str, float]
    busiest_stage: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective of data or pipeline parallelism, so many times; sizes as nccl-tests prints them."""

    role: str
    operation: str
    group: Group
    size_bytes: float
    times: int = 1


class Step:
    """Everything about one step of one plan, computed on demand.

    Parameters
    ----------
    model : Model
    cluster : Cluster
    plan : Plan
        Checked against the model and the cluster.
    training : Training
    """

    def __init__(self, model: Model, cluster: Cluster, plan: Plan, training: Training) -> None:
        self.model, self.cluster, self.plan, self.training = model, cluster, plan, training
        self.stack = training.software
        self.engine = engine_for(cluster, self.stack, plan.precision)
        self.graph = model.graph
        self.prefix_len = model.prefix_len(training.seq_len)
        seq_len = training.seq_len + self.graph.virtual_tokens
        self.layout = plan.layout(seq_len, self.prefix_len, round(self.stack.vocab_multiple.si))
        self.groups = BlockGroups(
            tp=group_of(plan, "tp"), cp=group_of(plan, "cp"), ep=group_of(plan, "ep"), etp=group_of(plan, "etp")
        )
        self.hsdp_shard = plan.hsdp_shard or gcd(plan.dp * plan.cp, max(1, cluster.gpus_per_domain // plan.tp))
        self.states: StateBytes = training.states(plan.precision)
        self.stages = pipeline_stages(self.graph, plan.pp, plan.vpp, plan.uneven_layers)

    # -- memory ------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[StageMemory, ...]:
        """Peak memory of every pipeline rank."""
        return tuple(self._rank_memory(stage) for stage in self.stages)

    def _rank_memory(self, stage: Stage) -> StageMemory:
        return stage_memory(
            stage,
            self.plan,
            self.layout,
            self.engine.impl,
            self.states,
            self.training.optimizer,
            self.stack.costs.context.si,
            self.hsdp_shard,
        )

    def first_overflow(self, usable_bytes: float) -> StageMemory | None:
        """The first pipeline rank found that needs more than there is, or None where all fit.

        The ends come first: the first rank holds most micro-batches, the last one the logits.
        """
        for stage in (self.stages[0], *self.stages[:0:-1]):
            memory = self._rank_memory(stage)
            if memory.peak_bytes > usable_bytes:
                return memory
        return None

    # -- one micro-batch on one rank -----------------------------------------------------------------------------

    def _block(self, graph: Graph, is_layer: bool) -> tuple[Cost, Cost]:
        cost = self.engine.block(graph, self.layout, self.groups, self.plan.recompute, is_layer)
        if not self.plan.shards_parameters:
            return cost.forward, cost.backward + Cost(elementwise=self._accumulation_s(graph))
        weights = block_weights(graph, self.layout)
        gather = self.exchange_s(self.block_gathers(graph))
        reduce = self.exchange_s(self.reductions(*weights))
        share = self.stack.overlap.fully_sharded_exposed.si
        forward = exposed(gather, cost.forward.total, share)
        backward = exposed(gather + reduce, cost.backward.total, share)
        return cost.forward + Cost(data_parallel=forward), cost.backward + Cost(data_parallel=backward)

    def _accumulation_s(self, graph: Graph) -> float:
        """Adding a micro-batch's gradients to those before, a mean over the step: the first one is only stored."""
        traffic = self.stack.costs.gradient_accumulation.si
        m = self.plan.num_micro_batches
        if not traffic or m == 1:
            return 0.0
        return self.engine.stream_s(sum(block_weights(graph, self.layout)) * traffic) * (m - 1) / m

    # -- data-parallel traffic -----------------------------------------------------------------------------------

    def gathers(self, dense: float, expert: float) -> list[Exchange]:
        """What brings the compute copy of so many parameters to every rank once: nothing without sharding."""
        if self.plan.zero == "0":
            return []
        shards = [
            (role, count, group) for role, count, group, _ in self._shards(dense, expert) if count and group.size > 1
        ]
        if self.stack.parameter_exchange == "broadcast" and not self.plan.shards_parameters:
            return [
                Exchange(role, "broadcast", group, count * self.states.gathered / group.size, group.size)
                for role, count, group in shards
            ]
        return [Exchange(role, "all_gather", group, count * self.states.gathered) for role, count, group in shards]

    def block_gathers(self, graph: Graph) -> list[Exchange]:
        """The same of one block under full sharding, frozen weights as they are stored."""
        dense, expert = block_weights(graph, self.layout)
        frozen = block_frozen_bytes(graph, self.layout, self.states.gathered)
        return self.gathers(dense + frozen[0] / self.states.gathered, expert + frozen[1] / self.states.gathered)

    def reductions(self, dense: float, expert: float) -> list[Exchange]:
        """What sums the gradients of so many parameters over the ranks that share them."""
        operation = "all_reduce" if self.plan.zero == "0" else "reduce_scatter"
        found = []
        for role, count, group, replicas in self._shards(dense, expert):
            size = count * self.states.gradient_on_wire
            if count and group.size > 1:
                found.append(Exchange(role, operation, group, size))
            if count and replicas.size > 1:
                found.append(Exchange(f"{role}_replicas", "all_reduce", replicas, size / group.size))
        return found

    def _shards(self, dense: float, expert: float) -> tuple[tuple[str, float, Group, Group], ...]:
        """Parameters with the group that shards them and that of its replicas: dense ones, then experts."""
        plan = self.plan
        experts = group_of(plan, "expert_dp")
        if plan.zero != "hsdp" and not plan.hsdp_shard:
            return ("dp", dense, group_of(plan, "dp"), _ALONE), ("expert_dp", expert, experts, _ALONE)
        size = gcd(experts.size, shard_degrees(plan, self.hsdp_shard)[1])
        return (
            (
                "dp",
                dense,
                group_of(plan, "hsdp_shard", self.hsdp_shard),
                group_of(plan, "hsdp_replicate", self.hsdp_shard),
            ),
            (
                "expert_dp",
                expert,
                Group(size=size, stride=experts.stride),
                Group(size=experts.size // size, stride=experts.stride * size),
            ),
        )

    def exchange_s(self, exchanges: list[Exchange]) -> float:
        """Seconds of exchanges one after the other."""
        return sum(x.times * price(x.operation, x.size_bytes, self.cluster, x.group).time_s for x in exchanges)

    # -- pipeline traffic ----------------------------------------------------------------------------------------

    def p2p(self) -> list[Exchange]:
        """One transfer of a micro-batch between neighbouring stages."""
        plan = self.plan
        size = self.layout.elements(self.graph.layers[-1].output) * self.engine.impl.activation_bytes
        pair = group_of(plan, "pp")
        if plan.tp == 1 or plan.sequence_parallel or self.stack.pipeline_tensor == "whole":
            return [Exchange("pp", "send_recv", pair, size)]
        return [
            Exchange("pp", "send_recv", pair, size / plan.tp),
            Exchange("pp_slices", "all_gather", group_of(plan, "tp"), size),
        ]

    def p2p_count(self, stage: Stage) -> int:
        """Transfers of one micro-batch that a rank takes part in.

        Every chunk receives and sends once forward and once backward, except at the ends of the model; a send and the
        receive of the same moment are one exchange.
        """
        return 0 if self.plan.pp == 1 else 2 * self.plan.vpp - stage.first - stage.last

    def stage_time(self, stage: Stage) -> StageTime:
        """One micro-batch on one pipeline rank."""
        forward, backward = Cost(), Cost()
        for graph, times in stage.layers:
            ahead, behind = self._block(graph, True)
            forward += ahead.scaled(times)
            backward += behind.scaled(times)
        for graph in stage.extras:
            ahead, behind = self._block(graph, False)
            forward += ahead
            backward += behind
        if self.plan.pp == 1:
            return StageTime(forward, backward, 0.0)
        visible = self.stack.overlap.pipeline_exposed.si if self.plan.schedule == "interleaved" else 1.0
        return StageTime(forward, backward, self.p2p_count(stage) * self.exchange_s(self.p2p()) * visible)

    # -- the step ------------------------------------------------------------------------------------------------

    def time(self) -> StepTime:
        """Seconds of the step by cause."""
        plan = self.plan
        times = self._stage_times()
        totals = [time.total_s for time in times]
        busiest = max(range(plan.pp), key=totals.__getitem__)
        m = plan.num_micro_batches
        pipeline = pipeline_time(totals, m, plan.vpp)
        once = max((self._once_per_step(stage, time) for stage, time in zip(self.stages, times, strict=True)), key=sum)
        by_cause = (times[busiest].forward + times[busiest].backward).scaled(m).by_cause()
        by_cause["data_parallel"] += once[0]
        by_cause["pipeline_p2p"] = times[busiest].p2p_s * m
        by_cause["pipeline_bubble"] = max(0.0, pipeline - totals[busiest] * m)
        by_cause["optimizer"] = once[1]
        return StepTime(total_s=sum(by_cause.values()), by_cause=by_cause, busiest_stage=busiest)

    def _stage_times(self) -> list[StageTime]:
        known: dict[tuple[object, ...], StageTime] = {}
        times = []
        for stage in self.stages:
            key = (stage.layers, stage.extras, stage.first, stage.last)
            if key not in known:
                known[key] = self.stage_time(stage)
            times.append(known[key])
        return times

    def _once_per_step(self, stage: Stage, time: StageTime) -> tuple[float, float]:
        """Data-parallel traffic that shows, and the optimizer, on one rank."""
        dense, expert = stage_weights(stage, self.layout, self.plan.pp)
        return self._data_parallel(dense, expert, time), self._optimizer(stage, dense, expert)

    def _data_parallel(self, dense: int, expert: int, time: StageTime) -> float:
        plan, overlap = self.plan, self.stack.overlap
        if plan.shards_parameters:
            return 0.0  # part of every block
        reduce, gather = self.exchange_s(self.reductions(dense, expert)), self.exchange_s(self.gathers(dense, expert))
        # Gradients are reduced beside the backward pass of the last micro-batch (ZeRO-2: of every one), parameters
        # gathered beside the forward pass of the first.
        times = plan.num_micro_batches if plan.zero == "2" else 1
        shown = times * exposed(reduce, time.backward.total, overlap.gradient_exposed.si)
        return shown + exposed(gather, time.forward.total, overlap.parameter_gather_exposed.si)

    def _optimizer(self, stage: Stage, dense: int, expert: int) -> float:
        """The update of a rank's own share: its states are read and written once, its moments too."""
        by_dense, by_expert = (1, 1) if self.plan.zero == "0" else shard_degrees(self.plan, self.hsdp_shard)
        moments = self.moments(stage)
        parameters = dense / by_dense + expert / by_expert
        if not parameters:
            return 0.0
        read_and_written = 2 * (moments[0] / by_dense + moments[1] / by_expert)
        streamed = self.engine.stream_s(parameters * self.states.update_traffic + read_and_written)
        return streamed + self._projections_s(stage) + self._paging_s(stage, by_dense, by_expert)

    def _paging_s(self, stage: Stage, by_dense: int, by_expert: int) -> float:
        """States in pages of the host come over its link for the update and go back."""
        dense, expert = self.moments(stage, paged=True)
        moved = 2 * (dense / by_dense + expert / by_expert)
        link = self.cluster.accelerator.pcie_bandwidth
        if not moved:
            return 0.0
        if link is None:
            name = self.cluster.accelerator.name
            raise UnsupportedError(f"the profile of {name} has no link to its host; use an optimizer that is not paged")
        return self.engine.stream_s(moved) + moved / link

    def _projections_s(self, stage: Stage) -> float:
        """Gradients projected down and updates projected back, where moments are kept of a projection."""
        seconds = 0.0
        for graph, times in (*stage.layers, *((graph, 1) for graph in stage.extras)):
            for weight in graph.weights:
                if weight.trained and weight.moment_rank:
                    *batch, rows, columns = (self.layout.size(axis) for axis in weight.axes)
                    rank = min(weight.moment_rank, rows, columns)
                    products = (max(rows, columns), rank, min(rows, columns)), (rows, columns, rank)
                    price_of = self.engine.kernels.matmul
                    seconds += times * sum(price_of(*p, self.engine.high_precision, prod(batch)) for p in products)
        return seconds

    def moments(self, stage: Stage, paged: bool = False) -> tuple[float, float]:
        """Bytes of optimizer moments of a stage's dense and expert weights, before sharding."""
        element = self.states.moment_element
        return stage_moments(stage, self.layout, self.plan.pp, self.training.optimizer, element, paged)

    # -- FLOPs ---------------------------------------------------------------------------------------------------

    def recompute_flops(self) -> int:
        """FLOPs of the step that recomputation adds, over full attention."""
        layout = Layout(seq_len=self.training.seq_len + self.graph.virtual_tokens, prefix_len=self.prefix_len)
        policy = self.plan.recompute
        total = 0.0
        for graph, times in self.graph.layer_parts:
            again = recomputed_operators(graph, policy, self.engine.impl)
            total += times * policy.fraction * sum(operator_flops(operator, layout)[0] for operator in again)
        return round(total) * self.plan.global_batch_size
