"""One optimizer step of one plan: stages, pipeline, data parallelism and optimizer put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd, prod

from simllm.errors import UnsupportedError
from simllm.hardware import Cluster
from simllm.hardware.stack import Stack
from simllm.models import Model
from simllm.models.activations import recomputed_operators
from simllm.models.counts import operator_flops
from simllm.models.graph import Graph, Layout
from simllm.network import Group, price
from simllm.parallel.gradients import partial_sizes, tied_elements
from simllm.parallel.memory import StageMemory, held_along, shard_degrees, stage_kept_bytes, stage_memory
from simllm.parallel.placement import communicators, group_of
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import pipeline_bubble
from simllm.parallel.stages import (
    Stage,
    block_frozen_bytes,
    block_weights,
    pipeline_stages,
    stage_moments,
    stage_weights,
)
from simllm.parallel.states import StateBytes
from simllm.training.composition import (
    accumulation_s,
    data_parallel_s,
    over_blocks,
    sharded_exposure,
    step_s,
    transfer_share,
    transfers_of,
    update_bytes,
)
from simllm.training.cost import Cost
from simllm.training.engine import BlockGroups, Engine
from simllm.training.offload import HostWork, host_of
from simllm.training.pipeline import PipelineRun
from simllm.training.run import Training

__all__ = ["Exchange", "StageTime", "Step", "StepTime", "engine_for"]


_ALONE = Group(size=1)


@lru_cache(maxsize=64)
def engine_for(cluster: Cluster, stack: Stack, precision: str) -> Engine:
    """The engine of a cluster, stack and precision; its caches live as long as it is used."""
    return Engine(cluster, stack, precision)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One micro-batch on one pipeline rank, all of its chunks together.

    ``weight_s``: what of the backward makes gradients of weights.
    """

    forward: Cost
    backward: Cost
    weight_s: float
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
        self.layout = plan.layout(seq_len, self.prefix_len, round(self.stack.vocab_multiple.si), training.routing)
        self.groups = BlockGroups(
            tp=group_of(plan, "tp"),
            cp=group_of(plan, "cp"),
            cp_heads=group_of(plan, "cp_heads"),
            cp_ring=group_of(plan, "cp_ring"),
            ep=group_of(plan, "ep"),
            etp=group_of(plan, "etp"),
        )
        self.hsdp_shard = plan.hsdp_shard or gcd(plan.dp * plan.cp, max(1, cluster.gpus_per_domain // plan.tp))
        self.states: StateBytes = training.states(plan.precision)
        if plan.offload.anything:
            host_of(self)
        self.stages = pipeline_stages(self.graph, plan.pp, plan.vpp, plan.uneven_layers, plan.pipeline.placement)

    # -- memory ------------------------------------------------------------------------------------------------

    def memory(self, simulate: bool = False) -> tuple[StageMemory, ...]:
        """Peak memory of every pipeline rank; ``simulate``: walk the action table also where a closed form exists."""
        return tuple(self._rank_memory(stage, simulate) for stage in self.stages)

    def _rank_memory(self, stage: Stage, simulate: bool = False) -> StageMemory:
        held = None
        if simulate or not self.plan.pipeline.closed_form:
            run = self.pipeline_run
            held = held_along(run.table, stage.rank, run.stages, self.layout, self.engine.impl, self.plan.recompute)
        return stage_memory(
            stage,
            self.plan,
            self.layout,
            self.engine.impl,
            self.states,
            self.training.optimizer,
            self.context_bytes,
            self.hsdp_shard,
            held,
        )

    @property
    def context_bytes(self) -> float:
        """Device memory of a rank outside the framework's allocator."""
        plan, costs = self.plan, self.stack.costs
        replicas = group_of(plan, "expert_dp").size
        degrees = (plan.tp, plan.pp, plan.cp, plan.cp_a2a, plan.dp, plan.ep)
        groups = communicators(*degrees, replicas, plan.zero == "hsdp")
        return costs.context.si + groups * costs.communicator.si

    def kept_bytes(self, stage: Stage) -> float:
        """Bytes that one micro-batch keeps on a stage for its backward pass."""
        return stage_kept_bytes(stage, self.layout, self.engine.impl, self.plan.recompute)

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

    def _block(self, graph: Graph, is_layer: bool) -> tuple[Cost, Cost, float]:
        cost = self.engine.block(graph, self.layout, self.groups, self.plan.recompute, is_layer)
        if not self.plan.shards_parameters:
            added = accumulation_s(self.accumulation_stream_s(graph), self.plan.num_micro_batches)
            return cost.forward, cost.backward + Cost(elementwise=added), cost.weight_s + added
        gather, reduce = self.block_traffic_s(graph)
        share = self.stack.overlap.fully_sharded_exposed.si
        ahead, behind = sharded_exposure(gather, reduce, cost.forward.total, cost.backward.total, share)
        return cost.forward + Cost(data_parallel=ahead), cost.backward + Cost(data_parallel=behind), cost.weight_s

    def accumulation_stream_s(self, graph: Graph) -> float:
        """Seconds to add one micro-batch's gradients of a block to those before."""
        traffic = self.stack.costs.gradient_accumulation.si * sum(block_weights(graph, self.layout))
        return self.engine.stream_s(traffic) if traffic else 0.0

    def block_traffic_s(self, graph: Graph) -> tuple[float, float]:
        """Seconds to gather the parameters of one block, and to reduce its gradients."""
        weights = block_weights(graph, self.layout)
        return self.exchange_s(self.block_gathers(graph)), self.exchange_s(self.reductions(*weights))

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
            # Where the pipeline holds two copies of the model, the ranks of one stage sum their gradients too.
            twin = Group(size=2, stride=group_of(plan, "pp").stride) if plan.pipeline.copies == 2 else _ALONE
            return ("dp", dense, group_of(plan, "dp"), twin), ("expert_dp", expert, experts, twin)
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

    @cached_property
    def transfer_s(self) -> tuple[float, float]:
        """Seconds of a transfer between stages, and the share of it that occupies the ranks."""
        if self.plan.pp == 1:
            return 0.0, 0.0
        share = transfer_share(self.plan.vpp, self.plan.pipeline, self.stack.overlap)
        return self.exchange_s(self.p2p()), share

    def stage_time(self, stage: Stage) -> StageTime:
        """One micro-batch on one pipeline rank, transfers apart."""
        blocks = {id(graph): self._block(graph, True) for graph, _ in stage.layers}
        blocks |= {id(graph): self._block(graph, False) for graph in stage.extras}
        forward = over_blocks(stage, lambda graph, is_layer: blocks[id(graph)][0])
        backward = over_blocks(stage, lambda graph, is_layer: blocks[id(graph)][1])
        weight_s = over_blocks(stage, lambda graph, is_layer: blocks[id(graph)][2])
        if self.plan.offload.anything:
            ahead, behind = HostWork(self).per_micro_batch(stage, forward.total, backward.total)
            forward, backward = forward + ahead, backward + behind
        return StageTime(forward, backward, weight_s, 0.0)

    # -- the step ------------------------------------------------------------------------------------------------

    @cached_property
    def pipeline_run(self) -> PipelineRun:
        """The step's pipeline, event by event."""
        return PipelineRun(self)

    def time(self, simulate: bool = False) -> StepTime:
        """Seconds of the step by cause.

        Parameters
        ----------
        simulate : bool
            Run the action table also where the schedule has a closed form.
        """
        plan = self.plan
        transfer, visible = self.transfer_s
        times = [
            replace(time, p2p_s=transfers_of(stage, plan.pp, plan.vpp, plan.pipeline) * transfer * visible)
            for stage, time in zip(self.stages, self.stage_times(self.stages), strict=True)
        ]
        # Where the pipeline holds two copies of the model, half of the micro-batches pass each.
        m = plan.num_micro_batches / plan.pipeline.copies
        totals = [time.total_s for time in times]
        hidden = [0.0] * plan.pp
        exact = simulate or not plan.pipeline.closed_form
        if exact:
            hidden = [self.pipeline_run.hidden_s(rank) for rank in range(plan.pp)]
        busy = [m * total - saved for total, saved in zip(totals, hidden, strict=True)]
        busiest = max(range(plan.pp), key=busy.__getitem__)
        bubble = pipeline_bubble(totals[busiest], sum(totals), plan.vpp)
        if exact:
            bubble = max(0.0, self.pipeline_run.total_s - busy[busiest])
        onces = [self.once_per_step(stage, time) for stage, time in zip(self.stages, times, strict=True)]
        once = max(onces, key=lambda causes: sum(causes.values()))
        by_cause = ((times[busiest].forward + times[busiest].backward) * m).by_cause()
        by_cause["pipeline_p2p"] = times[busiest].p2p_s * m
        # What runs beside computation is transfers first, then the experts' exchanges.
        beside = min(hidden[busiest], by_cause["pipeline_p2p"])
        by_cause["pipeline_p2p"] -= beside
        by_cause["expert_parallel"] -= hidden[busiest] - beside
        by_cause["pipeline_bubble"] = bubble
        for cause, seconds in once.items():
            by_cause[cause] = by_cause.get(cause, 0.0) + seconds
        total = step_s(busy[busiest], bubble, sum(once.values()))
        return StepTime(total_s=total, by_cause=by_cause, busiest_stage=busiest)

    def stage_times(self, stages: tuple[Stage, ...]) -> list[StageTime]:
        """One micro-batch on each of some stages; equal ones are priced once."""
        known: dict[tuple[object, ...], StageTime] = {}
        times = []
        for stage in stages:
            key = (stage.layers, stage.extras, stage.first, stage.last)
            if key not in known:
                known[key] = self.stage_time(stage)
            times.append(known[key])
        return times

    def once_per_step(self, stage: Stage, time: StageTime) -> dict[str, float]:
        """What is done once a step on one rank, by cause: reductions and gathers that show, clipping, the optimizer."""
        forward, backward = time.forward.total, time.backward.total
        partial, tied = self.summed_gradients_s(stage)
        sums = self.plan.num_micro_batches if self.sums_every_micro_batch else 1
        found = {"tensor_parallel": partial * sums, "pipeline_p2p": tied, "gradient_clipping": self.clipping_s(stage)}
        if not self.plan.shards_parameters:  # otherwise the traffic is part of every block
            reduce, gather = self.stage_traffic_s(stage)
            found["data_parallel"] = data_parallel_s(
                reduce, gather, forward, backward, self.reductions_per_step, self.stack.overlap
            )
        if self.plan.offload.moves("optimizer"):
            shown, update = HostWork(self).per_step(stage, backward)
            return found | {"optimizer": update, "offload": shown}
        return found | {"optimizer": self.update_s(stage)}

    def summed_gradients(self, stage: Stage) -> tuple[list[Exchange], list[Exchange]]:
        """What sums gradients of whole weights over tp, and those of a tied table over both ends of the pipeline."""
        plan, together, states = self.plan, self.stack.partial_gradients == "together", self.states
        element = states.gradient if together else states.gradient_on_wire
        if self.sums_every_micro_batch:
            element = self.engine.impl.activation_bytes
        sizes = [(float(size * element), times) for size, times in partial_sizes(stage, self.layout)]
        if together and sizes:
            sizes = [(sum(size * times for size, times in sizes), 1)]
        partial = [Exchange("tp_gradients", "all_reduce", group_of(plan, "tp"), size, times) for size, times in sizes]
        table = float(tied_elements(self.graph, stage, self.layout))
        if not table:
            return partial, []
        if plan.shards_parameters:
            table /= shard_degrees(plan, self.hsdp_shard)[0]
        ends = Group(size=2, stride=group_of(plan, "pp").stride * (plan.pp - 1))
        return partial, [Exchange("tied_tables", "all_reduce", ends, table * states.gradient)]

    def summed_gradients_s(self, stage: Stage) -> tuple[float, float]:
        """Seconds of one sum of the partial gradients of a rank, and of its tied table's."""
        partial, tied = self.summed_gradients(stage)
        return self.exchange_s(partial), self.exchange_s(tied)

    @property
    def sums_every_micro_batch(self) -> bool:
        """Whether gradients that are partial over tp are summed with every micro-batch.

        So it is where each is summed by itself, when it is added to those before. In a pipeline FSDP2 adds up first.
        """
        each = self.stack.partial_gradients == "each"
        return each and not (self.plan.shards_parameters and self.plan.pp > 1)

    @property
    def reductions_per_step(self) -> int:
        """How often gradients are reduced without full sharding: ZeRO-2 keeps a shard only, so every time."""
        return self.plan.num_micro_batches if self.plan.zero == "2" else 1

    def stage_traffic_s(self, stage: Stage) -> tuple[float, float]:
        """Seconds to reduce the gradients of a rank, and to gather its parameters."""
        weights = stage_weights(stage, self.layout, self.plan.pp)
        return self.exchange_s(self.reductions(*weights)), self.exchange_s(self.gathers(*weights))

    def update_s(self, stage: Stage) -> float:
        """Seconds of the optimizer on one rank."""
        weights = stage_weights(stage, self.layout, self.plan.pp)
        if not any(weights):
            return 0.0
        degrees = self._owners
        moved = update_bytes(weights, self.moments(stage), degrees, self.states.update_traffic)
        streamed = self.engine.stream_s(moved, "optimizer")
        return streamed + self._projections_s(stage) + self._paging_s(stage, degrees)

    @property
    def _owners(self) -> tuple[int, int]:
        """Ranks that share the update of dense and of expert parameters."""
        return (1, 1) if self.plan.zero == "0" else shard_degrees(self.plan, self.hsdp_shard)

    def clipping_s(self, stage: Stage) -> float:
        """Seconds to clip the gradients of one rank by their norm over all parameters (arXiv:1211.5063, section 3.2).

        A rank reads the gradients that it updates, sums the squares with the other ranks and scales its gradients. The
        norm decides whether the step is taken: it is copied to the host, and the kernels behind it are launched only
        then, so that two launches show. Gradients whose update is on the host are scaled there.
        """
        weights = stage_weights(stage, self.layout, self.plan.pp)
        if not (self.training.gradient_clipping and any(weights)):
            return 0.0
        own = sum(count / by for count, by in zip(weights, self._owners, strict=True))
        stream = self.engine.stream_s
        norm = stream(own * self.states.norm_traffic, "optimizer") + self.exchange_s(self.norm_exchanges())
        shown = norm + 2 * self.engine.kernels.launch_s
        if self.plan.offload.moves("optimizer"):
            return shown + HostWork(self).scaling_s(stage)
        return shown + stream(own * self.states.scaling_traffic, "optimizer")

    def norm_exchanges(self) -> list[Exchange]:
        """What sums the squares of the gradients over the ranks that hold different ones."""
        plan = self.plan
        if plan.ep > 1 or self._owners[0] > 1:
            groups = [Group(size=plan.num_gpus)]
        else:
            groups = [group_of(plan, "tp"), group_of(plan, "pp")]
        return [Exchange("gradient_norm", "all_reduce", group, 4) for group in groups if group.size > 1]

    def _paging_s(self, stage: Stage, degrees: tuple[int, int]) -> float:
        """States in pages of the host come over its link for the update and go back."""
        dense, expert = self.moments(stage, paged=True)
        moved = 2 * (dense / degrees[0] + expert / degrees[1])
        link = self.cluster.accelerator.pcie_bandwidth
        if not moved:
            return 0.0
        if link is None:
            name = self.cluster.accelerator.name
            raise UnsupportedError(f"the profile of {name} has no link to its host; use an optimizer that is not paged")
        return self.engine.stream_s(moved, "optimizer") + moved / link

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

    def owned_moments(self, stage: Stage) -> tuple[float, float]:
        """The same on one rank."""
        by, moments = self._owners, self.moments(stage)
        return moments[0] / by[0], moments[1] / by[1]

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
