"""What the analytic model says of an execution: the same quantities that the recorder reads off it.

Counts come from the graph and from `simllm.parallel`; what PyTorch does in its own way is a named term, with the
reason, that is added to the count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from simllm.models.activations import Recompute, kept_tensors, saved_bytes
from simllm.models.build import build_graph
from simllm.models.graph import Graph, Operator
from simllm.models.operators import Attention, Combine, Embedding, Loss, Norm, Projection
from simllm.models.work import AttentionWork
from simllm.parallel.communication import block_collectives
from simllm.parallel.memory import stage_memory
from simllm.parallel.schedules import Action, in_flight_chunks, schedule_actions
from simllm.parallel.stages import Stage, pipeline_stages
from simllm.validation.execution.case import Case, Groups, group_ranks
from simllm.validation.execution.peak import backward_peak, loss_workspace
from simllm.validation.execution.sharded_pipeline import ShardedBlock, ShardedChunk, sharded_pipeline_peak
from simllm.validation.execution.weights import (
    Parameter,
    Unit,
    block_parameters,
    stage_units,
    whole_parameter_shares,
)

__all__ = ["Prediction", "Term", "predict"]

#: (operation, global ranks) -> (calls, bytes)
Traffic = dict[tuple[str, tuple[int, ...]], tuple[int, int]]

Adder = Callable[..., None]

#: PyTorch's DistributedDataParallel: a first bucket of 1 MiB, then of 25 MiB (its documented bucket_cap_mb).
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20


@dataclass(frozen=True)
class Term:
    """A named difference between the count and what PyTorch does, and how much it is."""

    quantity: str
    amount: float
    why: str


@dataclass(kw_only=True)
class Prediction:
    """Of one rank; every number with its terms included."""

    rank: int
    parameters: int
    flops: int
    traffic: Traffic
    saved: dict[str, int]
    persistent: dict[str, int]
    actions: tuple[Action, ...]
    in_flight: int
    peak_bytes: float = 0.0
    terms: list[Term] = field(default_factory=list)


def predict(case: Case, rank: int, device: str = "cpu") -> Prediction:
    """The quantities of one rank.

    Parameters
    ----------
    case : Case
    rank : int
        Global rank.
    device : {"cpu", "cuda"}
        Where it was executed.
    """
    return _Predictor(case, rank, device).run()


class _Predictor:
    def __init__(self, case: Case, rank: int, device: str) -> None:
        self.case, self.rank, self.plan, self.device = case, rank, case.plan, device
        self.impl, self.layout = case.implementation, case.layout
        self.graph = build_graph(case.spec)
        plan = self.plan
        self.pp_rank = rank // (plan.tp * plan.dp)
        self.groups: Groups = group_ranks(case, rank)
        self.stage: Stage = pipeline_stages(self.graph, plan.pp, plan.vpp, plan.uneven_layers)[self.pp_rank]
        self.layers = list(self._layers())
        self.terms: list[Term] = []
        self.m = plan.num_micro_batches
        experts = "experts" in {w.component for part, _ in self.graph.parts for w in part.weights}
        self.experts_apart = experts and (plan.ep > 1 or plan.tp > 1)
        self.units: list[Unit] = stage_units(
            self.stage, [graph for _, graph in self.layers], self.layout, plan.pp, self.experts_apart
        )
        self.actions: tuple[Action, ...] = ()
        if plan.pp > 1:
            self.actions = schedule_actions(plan.schedule, plan.pp, self.m, plan.vpp).actions(self.pp_rank)

    def _layers(self) -> Iterator[tuple[int, Graph]]:
        """Layers of this rank with their place in the model, chunk by chunk."""
        from simllm.validation.execution.runner import chunks_of

        for first, last in chunks_of(self.case, self.pp_rank):
            for index in range(first, last):
                yield index, self.graph.layers[index]

    def run(self) -> Prediction:
        plan = self.plan
        saved, persistent = self._saved(), self._persistent()
        return Prediction(
            rank=self.rank,
            parameters=self._parameters(),
            flops=self._flops(),
            traffic=self._traffic(),
            saved=saved,
            persistent=persistent,
            peak_bytes=self._peak(saved, persistent),
            actions=self.actions,
            in_flight=in_flight_chunks(plan.schedule, plan.pp, self.m, self.pp_rank, plan.vpp) if plan.pp > 1 else 0,
            terms=self.terms,
        )

    def term(self, quantity: str, amount: float, why: str) -> int:
        """Note a named difference, and return it."""
        if amount:
            self.terms.append(Term(quantity, amount, why))
        return round(amount)

    # -- parameters and persistent memory ------------------------------------------------------------------------

    def _shard_ranks(self, unit: Unit) -> int:
        """Ranks over which FSDP2 shards a unit."""
        if self.plan.zero not in ("2", "3", "hsdp"):
            return 1
        if unit.experts:
            return len(self.groups.expert_dp)
        if self.plan.zero == "hsdp":
            return self.case.hsdp_shard
        return self.plan.dp

    def _shard_rank(self, unit: Unit) -> int:
        group = self.groups.expert_dp if unit.experts else self.groups.dp
        return group.index(self.rank) % self._shard_ranks(unit)

    def _parameters(self) -> int:
        return sum(
            p.shard_of(self._shard_ranks(unit), self._shard_rank(unit)) for unit in self.units for p in unit.parameters
        )

    def _persistent(self) -> dict[str, int]:
        plan, states = self.plan, self.case.states
        memory = stage_memory(
            self.stage, plan, self.layout, self.impl, states, "adam", 0.0, self.case.hsdp_shard
        ).by_kind
        kept = {kind: memory[kind] for kind in ("parameters", "gradients", "optimizer")}
        padded = sum(p.shard(self._shard_ranks(u)) for u in self.units for p in u.parameters)
        own = self._parameters()
        if plan.zero == "2" and plan.dp > 1:
            whole = sum(p.elements for u in self.units for p in u.parameters)
            kept["parameters"] += self.term(
                "memory: parameters",
                -(whole - whole / plan.dp) * states.parameter,
                "FSDP2 frees gathered parameters after the backward pass: between steps they are sharded as in stage 3",
            )
        if self.case.fully_sharded:
            for kind, bytes_each in (("parameters", states.parameter), ("gradients", states.gradient)):
                kept[kind] += self.term(
                    f"memory: {kind}",
                    padded * bytes_each - kept[kind],
                    "FSDP2 pads the rows of a parameter to a multiple of the ranks",
                )
            kept["optimizer"] += self.term(
                "memory: optimizer",
                own * 8 - kept["optimizer"],
                "the rows of a parameter do not divide: this rank's share of the moments is not the mean",
            )
        if plan.zero == "1" and plan.dp > 1:
            sizes = [p.elements for u in self.units for p in u.parameters]
            share = whole_parameter_shares(sizes, plan.dp)[self.groups.dp.index(self.rank)]
            kept["optimizer"] += self.term(
                "memory: optimizer",
                share * 8 - kept["optimizer"],
                "ZeroRedundancyOptimizer deals out whole parameters, the largest first",
            )
        return {kind: round(size) for kind, size in kept.items()}

    # -- FLOPs -------------------------------------------------------------------------------------------------

    def _blocks(self) -> list[tuple[Graph, Recompute]]:
        """Every block of this rank with what is recomputed in it."""
        policy, none = self.plan.recompute, Recompute()
        blocks = [(graph, none) for graph in self.stage.extras]
        for index, graph in self.layers:
            applies = policy.kind != "full" or index % policy.every == 0
            blocks.append((graph, policy if applies else none))
        return blocks

    def _flops(self) -> int:
        layout, impl = self.layout, self.impl
        total = again = scores = 0
        for graph, policy in self._blocks():
            rerun, skipped = self._rerun(graph, policy)
            for operator in graph.operators:
                forward = sum(work.flops for work in operator.forward(layout, impl))
                backward = operator.backward_input(layout, impl) + operator.backward_weight(layout, impl)
                total += forward + sum(work.flops for work in backward)
                if operator.name in rerun:
                    total += forward
                elif operator.name in skipped:
                    again += forward
                if isinstance(operator, Attention):
                    work = operator.forward(layout, impl)[0]
                    assert isinstance(work, AttentionWork)
                    product = work.flops * work.head_dim // (work.head_dim + work.v_head_dim)
                    if impl.attention == "flash":
                        scores += product
                    elif policy.kind == "selective":
                        # The explicit core runs again up to the softmax; its last product only needs what that keeps.
                        total += product
                        again += forward - product
        self.term(
            "FLOPs",
            -again * self.m if again else 0,
            "torch.utils.checkpoint stops before what nobody keeps: the last product of a layer does not run again",
        )
        if scores:
            why = "the fused kernel's formula counts the scores that it computes again in its backward pass"
            total += self.term("FLOPs", scores * self.m, why) // self.m
        return total * self.m

    def _rerun(self, graph: Graph, policy: Recompute) -> tuple[set[str], set[str]]:
        """Operators that run again, and those that the policy names but early stopping spares."""
        from simllm.models.activations import recomputed_operators

        named = [operator.name for operator in recomputed_operators(graph, policy, self.impl)]
        if policy.kind == "selective":
            return set(), set()
        keeping = [op.name for op in graph.operators if op.name in named and self._keeps(op)]
        if not keeping:
            return set(), set(named)
        last = named.index(keeping[-1])
        stop = last if isinstance(_operator(graph, keeping[-1]), Projection) else last + 1
        return set(named[:stop]), set(named[stop:])

    def _keeps(self, operator: Operator) -> bool:
        return bool(operator.saved(self.impl))

    # -- collectives ---------------------------------------------------------------------------------------------

    def _traffic(self) -> Traffic:
        calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
        sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()

        def add(op: str, ranks: tuple[int, ...], size: float, times: int = 1) -> None:
            if len(ranks) > 1 and times:
                calls[op, ranks] += times
                sizes[op, ranks] += round(size * times)

        self._block_traffic(add)
        self._data_parallel_traffic(add)
        self._pipeline_traffic(add)
        return {key: (calls[key], sizes[key]) for key in calls}

    def _block_traffic(self, add: Adder) -> None:
        ranks = {"tp": self.groups.tp, "ep": self.groups.ep}
        for graph, policy in self._blocks():
            rerun, _ = self._rerun(graph, policy)
            for item in block_collectives(graph, self.layout, self.impl):
                again = item.phase == "forward" and item.operator in rerun
                add(item.op, ranks[item.group], item.size_bytes, item.count * self.m * (2 if again else 1))
        for unit in self.units:
            for parameter in unit.parameters:
                if parameter.partial:
                    # In a pipeline FSDP2 adds up the micro-batches' gradients, in the precision that it reduces in.
                    once = self.case.fully_sharded and self.plan.pp > 1
                    element = 4 if once or self.plan.precision == "fp32" else 2
                    add("all_reduce", self.groups.tp, parameter.elements * element, 1 if once else self.m)

    def _data_parallel_traffic(self, add: Adder) -> None:
        plan, groups, states = self.plan, self.groups, self.case.states
        if plan.zero in ("2", "3", "hsdp"):
            for unit in self.units:
                self._unit_traffic(unit, add)
        elif plan.dp > 1 and plan.tp == 1:
            dense = self._dense_in_order()
            for size in self._buckets(dense):
                add("all_reduce", groups.dp, size)
            if plan.zero == "1":
                for parameter in dense:
                    add("broadcast", groups.dp, parameter.elements * states.parameter)
        elif plan.dp > 1:
            dense = [p for u in self.units for p in u.parameters if not (self.experts_apart and p.expert)]
            add("all_reduce", groups.dp, sum(p.elements for p in dense) * states.gradient)
        if self.experts_apart and plan.zero in ("0", "1"):
            experts = sum(p.elements for u in self.units if u.experts for p in u.parameters)
            # One buffer for each model chunk.
            add("all_reduce", groups.expert_dp, experts * states.gradient / plan.vpp, plan.vpp * (experts > 0))

    def _dense_in_order(self) -> list[Parameter]:
        """Parameters in the order of the forward pass, experts apart where other ranks share them."""
        head = [graph for graph in self.stage.extras if graph is self.graph.head]
        before = [graph for graph in self.stage.extras if graph not in head]
        keep = self.plan.pp > 1 and not self.stage.first
        blocks = [(g, keep) for g in before] + [(g, False) for _, g in self.layers] + [(g, keep) for g in head]
        found = [p for graph, tied in blocks for p in block_parameters(graph, self.layout, tied)]
        return [p for p in found if not (self.experts_apart and p.expert)]

    def _buckets(self, parameters: list[Parameter]) -> list[int]:
        """DistributedDataParallel's buckets: gradients in reverse order, a bucket closed once it is full."""
        buckets: list[int] = []
        size, limit = 0, _FIRST_BUCKET
        for parameter in reversed(parameters):
            size += parameter.elements * 4
            if size >= limit:
                buckets.append(size)
                size, limit = 0, _BUCKET
        return buckets + ([size] if size else [])

    def _unit_traffic(self, unit: Unit, add: Adder) -> None:
        plan, states, groups = self.plan, self.case.states, self.groups
        ranks = self._shard_ranks(unit)
        if ranks == 1 and plan.zero != "hsdp":
            if unit.experts and not self.case.fully_sharded:
                return
            return
        group = groups.expert_dp if unit.experts else groups.hsdp_shard if plan.zero == "hsdp" else groups.dp
        elements = unit.gathered(ranks)
        gathers, reductions = self._unit_calls(unit)
        add("all_gather", group, elements * states.gathered, gathers)
        add("reduce_scatter", group, elements * states.gradient_on_wire, reductions)
        if plan.zero == "hsdp" and not unit.experts:
            add("all_reduce", groups.hsdp_replicate, elements / ranks * states.gradient_on_wire, reductions)

    def _unit_calls(self, unit: Unit) -> tuple[int, int]:
        """How often FSDP2 gathers and reduces a unit in a step.

        Outside a pipeline it is gathered for each forward and each backward pass. In a pipeline PyTorch keeps what a
        backward pass gathered until a forward pass frees it, and reduces once at the end.
        """
        kept = self.plan.zero == "2"
        if self.plan.pp == 1:
            return (self.m if kept else 2 * self.m), self.m
        gathers, there = 0, False
        for action in self.actions:
            if action.chunk != self._chunk_of(unit):
                continue
            gathers += not there
            there = kept or action.kind == "B"
        return gathers, 1

    def _chunk_of(self, unit: Unit) -> int:
        if self.plan.vpp == 1:
            return 0
        if unit.root:
            return self.plan.vpp - 1 if self.stage.last and not self.stage.first and unit is self.units[-1] else 0
        layers = [id(u) for u in self.units if not u.root]
        return layers.index(id(unit)) * self.plan.vpp // len(layers)

    def _pipeline_traffic(self, add: Adder) -> None:
        plan = self.plan
        if plan.pp == 1:
            return
        size = self.layout.elements(self.graph.layers[-1].output) * self.impl.activation_bytes
        times = (2 * plan.vpp - self.stage.first - self.stage.last) * self.m
        for op in ("send", "recv"):
            add(op, self.groups.pp, size, times)
        if self.case.spec.head.tied and (self.stage.first or self.stage.last):
            table = next(p for u in self.units for p in u.parameters if p.tied)
            root = next(u for u in self.units if table in u.parameters)
            stage = plan.tp * plan.dp
            inside = self.rank % stage
            ends = (inside, (plan.pp - 1) * stage + inside)
            add("all_reduce", ends, table.shard_of(self._shard_ranks(root), self._shard_rank(root)) * 4)

    # -- peak memory ---------------------------------------------------------------------------------------------

    def _peak(self, saved: dict[str, int], persistent: dict[str, int]) -> float:
        """The states, what micro-batches in flight keep, and the widest moment of the backward pass."""
        plan = self.plan
        edges = {name: size for name, size in saved.items() if "layers" not in name}
        layers = [size for name, size in saved.items() if "layers" in name]
        head = edges.get("head", 0)
        kept = sum(layers) + sum(edges.values()) - head
        chunks = in_flight_chunks(plan.schedule, plan.pp, self.m, self.pp_rank, plan.vpp) if plan.pp > 1 else 1
        before = (chunks / plan.vpp - 1 / plan.vpp) * kept
        own = kept / plan.vpp if plan.vpp > 1 else kept
        if plan.pp > 1:
            before += self._pipeline_buffers(chunks)
            before += (chunks - 1) * head if plan.schedule == "gpipe" else 0
        if plan.pp > 1 and self.case.fully_sharded:
            backward = self._pipeline_buffers(chunks) + self._sharded_pipeline(saved)
        else:
            backward = before + max(self._moments(own, head, layers))
        return sum(persistent.values()) + self._always() + max(backward, *self._after())

    def _sharded_pipeline(self, saved: dict[str, int]) -> float:
        """The states of FSDP2 and the activations along the actions of a pipeline rank."""
        bytes_of_gradient = 2 if self.plan.precision == "bf16" else 4

        def whole(parameter: Parameter) -> int:
            if parameter.name != "token.weight" or not self.stage.first:
                return parameter.elements
            more = (self.plan.tp - 1) * parameter.elements
            why = "distributed tensors make the gradient of a table that is split by rows whole on every rank"
            self.term("peak memory", more * 4, why)
            return parameter.elements + more

        def block(units: Iterable[Unit], **sizes: float) -> ShardedBlock:
            own = list(units)
            gathered = [unit.gathered(self._shard_ranks(unit)) for unit in own]
            return ShardedBlock(
                units=tuple(size * self.case.states.gathered for size in gathered),
                reduced=tuple(4.0 * size for size in gathered),
                made=tuple(float(whole(p) * bytes_of_gradient) for unit in own for p in unit.parameters),
                copied=4 / bytes_of_gradient,
                **sizes,
            )

        layers: list[ShardedBlock] = []
        apart = [unit for unit in self.units if not unit.root]
        for index, graph in self.layers:
            own = [apart.pop(0), *([apart.pop(0)] if apart and apart[0].experts else [])]
            walks = [
                backward_peak(graph, self.layout, self.impl, bytes_of_gradient, keeps)
                for keeps in (True, bytes_of_gradient == 2)
            ]
            layers.append(block(own, kept=saved[f"layers.{index}"], working=walks[0], working_again=walks[1]))
        root = [unit for unit in self.units if unit.root]
        stem = block(root[: self.stage.first], kept=saved.get("stem", 0))
        loss = loss_workspace(self.graph.head, self.layout, self.plan.tp > 1) if self.stage.last else 0.0
        head = block(root[-1:] if self.stage.last else (), kept=saved.get("head", 0), working=loss)
        vpp, nothing = self.plan.vpp, ShardedBlock(copied=4 / bytes_of_gradient)
        each = len(layers) // vpp
        chunks = [
            ShardedChunk(
                layers=tuple(layers[i * each : (i + 1) * each]),
                stem=stem if i == 0 else nothing,
                head=head if i == vpp - 1 else nothing,
            )
            for i in range(vpp)
        ]
        return sharded_pipeline_peak(self.actions, chunks, frees=self.plan.zero != "2")

    def _pipeline_buffers(self, chunks: int) -> float:
        """Buffers to receive in, one for each micro-batch, which stay from step to step; what was sent and waits.

        Inputs in flight that the first layer keeps are counted there. Schedules of one chunk wait for a send before the
        next; those of several wait for all at the end of a step, and until then what was sent stays. Counted when all
        forward passes are done, the last time that so many are in flight.
        """
        vpp, size = self.plan.vpp, self.layout.elements(self.graph.layers[-1].output) * self.impl.activation_bytes
        receiving, sending = vpp - self.stage.first, vpp - self.stage.last
        first = self.layers[0][1]
        kept = first.input.name in kept_tensors(first, self.impl) or self.plan.recompute.kind == "full"
        twice = chunks * receiving / vpp if kept else 0.0
        sent = chunks * sending / vpp
        if vpp > 1:
            sent = self.m * sending + (self.m * vpp - chunks) * receiving / vpp
        return size * (self.m * (receiving + sending) - twice + sent)

    def _always(self) -> float:
        """The batch, and the tables of positions."""
        rows = self.plan.global_batch_size // self.plan.dp
        return 2 * 8.0 * rows * self.case.seq_len

    def _moments(self, own: float, head: float, layers: list[int]) -> list[float]:
        """Bytes of the micro-batch that goes backward, of each moment that could be the peak."""
        bytes_of_gradient = 2 if self.plan.precision == "bf16" else 4
        sharded = self.case.fully_sharded
        _, graph = self.layers[-1]
        walk = backward_peak(graph, self.layout, self.impl, bytes_of_gradient, sharded)
        # Everything is kept but the last layer, which is on its way back.
        moments = [own - layers[-1] + walk + self._sharding(loss=False)]
        if sharded and len(layers) > 1:
            reduced = 4.0 * sum(u.gathered(self._shard_ranks(u)) for u in self._last_units())
            made = sum(p.elements for u in self._last_units() for p in u.parameters) * bytes_of_gradient
            around = self._sharding(loss=True) + self._head_gradients(bytes_of_gradient)
            # Gradients of the last layer are copied to be reduced, and stay so while the layer before it goes backward.
            copied = reduced / self.case.hsdp_shard if self.plan.zero == "hsdp" else 0.0
            moments.append(own - layers[-1] + made + reduced + copied + around)
            if self.plan.pp == 1:
                moments.append(own - sum(layers[-2:]) + walk + self._sharding(loss=False) + reduced)
        if self.stage.last:
            loss = loss_workspace(self.graph.head, self.layout, self.plan.tp > 1)
            moments.append(own + head + loss + self._sharding(loss=True))
        return moments

    def _after(self) -> list[float]:
        """Temporaries when all micro-batches are through: gradients reduced by hand are copied into one buffer."""
        plan = self.plan
        experts = 4.0 * sum(p.elements for u in self.units if u.experts for p in u.parameters)
        dense = 4.0 * sum(p.elements for u in self.units if not u.experts for p in u.parameters)
        # Adam's denominator is made in two steps.
        found = [8.0 * max(p.shard(self._shard_ranks(u)) for u in self.units for p in u.parameters)]
        found += [experts] if self.experts_apart and plan.zero in ("0", "1") else []
        return [*found, dense] if plan.tp > 1 and plan.dp > 1 and plan.zero == "0" else found

    def _last_units(self) -> list[Unit]:
        """The units of the last layer: its own, and its experts where other ranks share them."""
        apart = [unit for unit in self.units if not unit.root]
        return apart[-2:] if apart[-1].experts else apart[-1:]

    def _head_gradients(self, element: int) -> float:
        if not self.stage.last or self.plan.pp > 1:
            return 0.0
        return float(sum(self.layout.weight_elements(w) for w in self.graph.head.weights) * element)

    def _sharding(self, loss: bool) -> float:
        """What FSDP2 holds beside the shards while the last layer, or the loss, goes backward."""
        if not self.case.fully_sharded:
            return 0.0
        element = self.case.states.gathered

        def gathered(units: Iterable[Unit]) -> float:
            return sum(unit.gathered(self._shard_ranks(unit)) for unit in units) * element

        last = self._last_units()
        own = {id(unit) for unit in last}
        # The next one is on its way: of a layer with experts apart, the part outside of them.
        held = gathered(u for u in self.units if u.root or (not loss and id(u) in own)) + gathered(last[:1])
        if self.plan.zero == "2":
            held = gathered(self.units)
        return held + (0.0 if loss else self._head_gradients(2 if self.plan.precision == "bf16" else 4))

    # -- saved tensors ---------------------------------------------------------------------------------------------

    def _saved(self) -> dict[str, int]:
        result = {}
        encoder = len(self.case.spec.encoder.layers) if self.case.spec.encoder else 0
        applied = [policy for _, policy in self._blocks()[len(self.stage.extras) :]]
        policies = {index: policy for (index, _), policy in zip(self.layers, applied, strict=True)}
        for index, graph in self.layers:
            name = f"encoder.layers.{index}" if index < encoder else f"layers.{index - encoder}"
            result[name] = round(saved_bytes(graph, self.layout, self.impl, policies[index])) + self._layer_terms(
                graph, policies[index]
            )
        for graph in self.stage.extras:
            if graph is self.graph.head:
                result["head"] = self._edge(graph, "head")
            elif graph is self.graph.stem:
                result["encoder.stem" if encoder else "stem"] = self._edge(graph, "stem")
            else:
                result["stem"] = self._edge(graph, "stem")
        return result

    def _layer_terms(self, graph: Graph, policy: Recompute) -> int:
        if policy.kind == "full":
            return 0
        extra = self._statistics(graph)
        for operator in graph.operators:
            if isinstance(operator, Combine):
                extra += self._routing(graph, operator)
        return extra

    def _routing(self, graph: Graph, operator: Operator) -> int:
        rows = self.layout.elements(operator.inputs[0]) // self.layout.width(operator.inputs[0].axes)
        tokens = self.layout.tokens(operator.outputs[0])
        why = "the permutation back to token order (int64); weights before their division, and the sum (float32)"
        return self.term("saved bytes", rows * 8 + rows * 4 + tokens * 4, why)

    def _statistics(self, graph: Graph) -> int:
        """A CPU keeps the mean and deviation of LayerNorm in the dtype of its weight, CUDA in float32."""
        if self.plan.precision == "fp32" or self.device == "cuda":
            return 0
        norms = [op for op in graph.operators if isinstance(op, Norm) and op.kind == "layernorm"]
        found = [tensor for norm in norms for tensor in norm.saved(self.impl)]
        halved = sum(self.layout.elements(t) * 2 for t in found if t.name.endswith((".rstd", ".mean")))
        return self.term("saved bytes", -halved, "on a CPU LayerNorm keeps its statistics in the dtype of its weight")

    def _edge(self, graph: Graph, name: str) -> int:
        layout, impl = self.layout, self.impl
        kept = kept_tensors(graph, impl)
        size = saved_bytes(graph, layout, impl)
        given = sum(layout.elements(t) * impl.bytes_of(t) for t, _ in kept.values() if t.name in ("ids", "loss.labels"))
        if "encoder_norm" in {op.name for op in graph.operators}:
            norm = _operator(graph, "encoder_norm")
            outside = {t.name for t in (*graph.lends, *norm.saved(impl), *norm.outputs)}
            size -= sum(layout.elements(t) * impl.bytes_of(t) for t, _ in kept.values() if t.name in outside)
        size += self.term("saved bytes", -given, "token ids and labels are views of the batch, which stays anyway")
        size += self._statistics(graph)
        for operator in graph.operators:
            if isinstance(operator, Embedding) and any(w.name == "position.weight" for w in operator.weights):
                own = self.case.seq_len // (layout.tp if layout.sequence_parallel else 1)
                size += self.term("saved bytes", own * 8, "positions are looked up by int64 numbers")
            if isinstance(operator, Loss):
                size += self.term("saved bytes", 4, "the mean of the losses keeps the number of labels")
        return round(size)


def _operator(graph: Graph, name: str) -> Operator:
    return next(operator for operator in graph.operators if operator.name == name)
