"""Time and memory of all plans at once: what blocks cost is looked up, how it adds up is numpy arithmetic.

A quantity that few plans differ in (the price of a block, the weights of a rank, the seconds of a reduction) is
computed once for each distinct case by the same `Step`, `Engine` and memory functions that `estimate` uses. The
formulas that put them together (`simllm.training.composition`, `simllm.parallel.memory`, `simllm.parallel.schedules`)
are called with arrays instead of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from simllm.elementwise import larger
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import saved_bytes
from simllm.models.graph import Graph
from simllm.parallel.memory import (
    head_bytes,
    heads_in_flight,
    kept_bytes,
    layer_peak_bytes,
    loss_peak_bytes,
    micro_batch_bytes,
    resident_activations,
    state_memory,
    take_states,
    working_bytes,
)
from simllm.parallel.offload import Offload
from simllm.parallel.plan import Plan
from simllm.parallel.schedules import SCHEDULES, in_flight_chunks, pipeline_bubble
from simllm.parallel.stages import Stage, pipeline_stages
from simllm.planner.space import Cells, Structure
from simllm.training import Training
from simllm.training.composition import (
    accumulation_s,
    data_parallel_s,
    over_blocks,
    sharded_exposure,
    step_s,
    transfer_share,
    transfers_of,
)
from simllm.training.exposure import exposed
from simllm.training.offload import HostWork, beside_passes, host_of, node_stages, offload_profile
from simllm.training.step import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Assembly", "Evaluated", "Prices"]


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
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
        self.blocks: dict[int, _Block] = {
            id(block): _Block(*(np.full(cells.count, np.nan) for _ in range(4))) for block, _ in self._graphs
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
        self.transfer_bytes[cell] = step.p2p().size_bytes
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
class _Frame:
    """Cells that make a plan with one pipeline degree and schedule, and their blocks.

    ``share``: for every plan, which of ``sharing`` it is; plans of one have the same weights and the same
    data-parallel ranks, and ``sharing`` holds a plan's fields for each. ``dealt``: numbers that were dealt out already.
    """

    cells: Ints
    num_micro_batches: Floats
    blocks: dict[int, _Block]
    transfer_s: Floats
    share: Ints
    sharing: tuple[dict[str, Any], ...]
    dealt: dict[tuple[Any, ...], list[Floats]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Pipeline ranks that hold the same blocks."""

    stage: Stage
    ranks: tuple[int, ...]
    key: tuple[Any, ...]


class Assembly:
    """Evaluates all plans of a space for one number of GPUs.

    Parameters
    ----------
    model : Model
    cluster : Cluster
    training : Training
    global_batch_size : int
    cells : Cells
    prices : dict of str to Prices
        By precision; shared between numbers of GPUs.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        training: Training,
        global_batch_size: int,
        cells: Cells,
        prices: dict[str, Prices],
    ) -> None:
        self.model, self.cluster, self.training = model, cluster, training
        self.global_batch_size, self.cells, self.prices = global_batch_size, cells, prices
        self._numbers: dict[tuple[Any, ...], tuple[float, ...]] = {}
        self._steps: dict[tuple[Any, ...], Step] = {}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def frame(self, precision: str, pp: int, cells: Ints, dp: Ints) -> _Frame:
        """Gather what the blocks of these cells cost."""
        prices, columns = self.prices[precision], self.cells.columns
        prices.need(cells)
        blocks = {
            key: _Block(b.forward_s[cells], b.backward_s[cells], b.kept_bytes[cells], b.peak_bytes[cells])
            for key, b in prices.blocks.items()
        }
        m = self.global_batch_size // (dp * columns["micro_batch_size"][cells])
        keys = np.stack([columns["tp"][cells], columns["ep"][cells], self.cells.etp[cells]])
        _, first, share = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        sharing = tuple(
            self.cells.fields(int(cells[i])) | {"pp": pp, "dp": int(dp[i]), "global_batch_size": self.global_batch_size}
            for i in first
        )
        counts = m.astype(np.float64)
        frame = _Frame(cells, counts, blocks, np.zeros_like(counts), share.ravel(), sharing)
        if pp == 1:
            return frame
        plain = Structure(
            precision=precision, pp=pp, vpp=1, schedule="1f1b", uneven_layers=True, zero="0", offload=Offload()
        )
        step = self._step(plain, sharing[0])
        sizes, inverse = np.unique(prices.transfer_bytes[cells], return_inverse=True)
        transfer = step.p2p()
        seconds = np.array([step.exchange_s([replace(transfer, size_bytes=size)]) for size in sizes.tolist()])
        return replace(frame, transfer_s=seconds[inverse])

    def evaluate(self, frame: _Frame, structures: list[Structure]) -> Iterator[Evaluated]:
        """Time and memory of the cells of a frame in structures that differ in their sharding only.

        Plans that are no choice are left out: sharding over one rank, and HSDP where its groups are not whole domains.
        """
        kinds = self._kinds(structures[0])
        activations = self._activations(frame, structures[0], kinds)
        whole: list[tuple[Floats, Floats]] | None = None
        first: dict[Offload, str] = {}
        for structure in structures:
            plainest = first.setdefault(structure.offload, structure.zero) == structure.zero
            able = np.array([self._makes_sense(fields, structure.zero, plainest) for fields in frame.sharing])
            if not able.any():
                continue
            if structure.zero in ("3", "hsdp"):
                passes = self._per_micro_batch(frame, structure, kinds)
            else:
                passes = whole = whole or self._per_micro_batch(frame, structure, kinds)
            if structure.offload.anything:
                passes = self._with_transfers(frame, structure, kinds, passes)
            time_s = self._time(frame, structure, kinds, passes)
            peak, states = self._memory(frame, structure, kinds, activations)
            held = self._on_hosts(frame, structure, kinds, activations)
            everyone = Evaluated(structure, frame.cells, time_s, peak, states, held)
            yield everyone if able.all() else everyone.where(able[frame.share])

    def _makes_sense(self, fields: dict[str, Any], zero: str, first: bool) -> bool:
        """Whether a way of sharding differs from those before it."""
        ranks = self.cluster.num_gpus // fields["tp"] // fields["pp"]
        if ranks == 1:
            return first
        inside = max(1, self.cluster.gpus_per_domain // int(fields["tp"]))
        return zero != "hsdp" or (1 < inside < ranks and ranks % inside == 0)

    def _step(self, structure: Structure, fields: dict[str, Any]) -> Step:
        """The scalar step of one plan of those that share weights and data-parallel ranks."""
        return Step(self.model, self.cluster, Plan(**fields | vars(structure)), self.training)

    def _shared(
        self, frame: _Frame, structure: Structure, what: tuple[Any, ...], of: Callable[[Step], tuple[float, ...]]
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
            degrees = (structure.pp, fields["tp"], fields["ep"], fields["etp"])
            share = (structure.precision, structure.zero, offload, *degrees)
            numbers = self._numbers.get((*what, *share))
            if numbers is None:
                if share not in self._steps:
                    self._steps[share] = self._step(structure, fields)
                numbers = self._numbers[(*what, *share)] = of(self._steps[share])
            found.append(numbers)
        frame.dealt[dealt] = [np.array(column)[frame.share] for column in zip(*found, strict=True)]
        return frame.dealt[dealt]

    def _kinds(self, structure: Structure) -> list[_Kind]:
        found: dict[tuple[Any, ...], list[Stage]] = {}
        stages = pipeline_stages(self.model.graph, structure.pp, structure.vpp, structure.uneven_layers)
        for stage in stages:
            layers = tuple((id(graph), times) for graph, times in stage.layers)
            key = (layers, tuple(id(graph) for graph in stage.extras), stage.first, stage.last)
            found.setdefault(key, []).append(stage)
        return [_Kind(same[0], tuple(stage.rank for stage in same), key) for key, same in found.items()]

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def _per_micro_batch(self, frame: _Frame, structure: Structure, kinds: list[_Kind]) -> list[tuple[Floats, Floats]]:
        """Forward and backward seconds of every kind of rank."""
        blocks = {
            id(graph): self._passes(frame, structure, graph)
            for graph in {id(graph): graph for kind in kinds for graph in _graphs(kind.stage)}.values()
        }
        return [
            (
                over_blocks(kind.stage, lambda graph, _: blocks[id(graph)][0]),
                over_blocks(kind.stage, lambda graph, _: blocks[id(graph)][1]),
            )
            for kind in kinds
        ]

    def _passes(self, frame: _Frame, structure: Structure, graph: Graph) -> list[Floats]:
        """Forward and backward seconds of a block with what data parallelism adds to each micro-batch."""
        block, full = frame.blocks[id(graph)], structure.zero in ("3", "hsdp")
        known = ("passes", id(graph), structure.zero if full else "")
        if known in frame.dealt:
            return frame.dealt[known]
        if full:
            of = partial(Step.block_traffic_s, graph=graph)
            gather, scatter = self._shared(frame, structure, ("block", id(graph)), of)
            share = self.training.software.overlap.fully_sharded_exposed.si
            ahead, behind = sharded_exposure(gather, scatter, block.forward_s, block.backward_s, share)
            frame.dealt[known] = [block.forward_s + ahead, block.backward_s + behind]
        else:
            (stream,) = self._shared(frame, structure, ("stream", id(graph)), partial(_accumulation, graph=graph))
            added = accumulation_s(stream, frame.num_micro_batches)
            frame.dealt[known] = [block.forward_s, block.backward_s + added]
        return frame.dealt[known]

    def _with_transfers(
        self, frame: _Frame, structure: Structure, kinds: list[_Kind], passes: list[tuple[Floats, Floats]]
    ) -> list[tuple[Floats, Floats]]:
        """The same with what shows of transfers to the host."""
        rates = HostWork(self._step(structure, frame.sharing[0])).activation_rates()
        found = []
        for kind, (forward, backward) in zip(kinds, passes, strict=True):
            of = partial(_states_traffic, stage=kind.stage)
            parameters, gradients = self._shared(frame, structure, ("transfers", kind.key), of)
            kept = micro_batch_bytes(kind.stage, lambda graph, _: frame.blocks[id(graph)].kept_bytes)
            ahead, behind = beside_passes((parameters, gradients), rates, forward * 0 + kept, forward, backward)
            found.append((forward + ahead, backward + behind))
        return found

    # -- the step --------------------------------------------------------------------------------------------------

    def _time(
        self, frame: _Frame, structure: Structure, kinds: list[_Kind], passes: list[tuple[Floats, Floats]]
    ) -> Floats:
        overlap, m = self.training.software.overlap, frame.num_micro_batches
        schedule = SCHEDULES[structure.schedule]
        visible = transfer_share(structure.vpp, schedule, overlap)
        totals: list[Floats] = []
        onces: list[Floats] = []
        for kind, (forward, backward) in zip(kinds, passes, strict=True):
            count = transfers_of(kind.stage, structure.pp, structure.vpp, schedule)
            totals.append(forward + backward + frame.transfer_s * (count * visible))
            if structure.offload.moves("optimizer"):
                of_host = partial(_host_once, stage=kind.stage)
                leaving, returning, update = self._shared(frame, structure, ("host", kind.key), of_host)
                update = update + exposed(leaving, backward, offload_profile().transfer_exposed.si) + returning
            else:
                (update,) = self._shared(frame, structure, ("update", kind.key), partial(_update, stage=kind.stage))
            if structure.zero not in ("3", "hsdp"):
                of = partial(Step.stage_traffic_s, stage=kind.stage)
                scatter, gather = self._shared(frame, structure, ("traffic", kind.key), of)
                reductions = m if structure.zero == "2" else np.ones_like(m)
                update = update + data_parallel_s(scatter, gather, forward, backward, reductions, overlap)
            onces.append(update)
        slowest = reduce(larger, totals)
        everyone = reduce(add, (total * len(kind.ranks) for total, kind in zip(totals, kinds, strict=True)))
        return step_s(slowest * m, pipeline_bubble(slowest, everyone, structure.vpp), reduce(larger, onces))

    # -- memory ----------------------------------------------------------------------------------------------------

    def _activations(self, frame: _Frame, structure: Structure, kinds: list[_Kind]) -> list[_Activations]:
        """Bytes of activations of every kind of rank, on the rank that holds most micro-batches."""
        found = []
        for kind in kinds:
            at_work = working_bytes(
                kind.stage,
                lambda graph: frame.blocks[id(graph)].peak_bytes,
                lambda graph: frame.blocks[id(graph)].peak_bytes,
            )
            held = self._held(frame, structure, kind.stage, kind.ranks)
            found.append(_Activations(held, np.zeros_like(held) + at_work))
        return found

    def _held(self, frame: _Frame, structure: Structure, stage: Stage, ranks: tuple[int, ...]) -> Floats:
        """Bytes kept for the backward pass on the one of some equal ranks that holds most micro-batches."""
        counts, inverse = np.unique(frame.num_micro_batches, return_inverse=True)
        schedule, pp, vpp = structure.schedule, structure.pp, structure.vpp
        numbers = [int(m) for m in counts.tolist()]
        most = [max(in_flight_chunks(schedule, pp, m, rank, vpp) for rank in ranks) / vpp for m in numbers]
        heads = [float(heads_in_flight(schedule, pp, m)) for m in numbers]

        def kept(graph: Graph, _: bool) -> Floats:
            return frame.blocks[id(graph)].kept_bytes

        own = micro_batch_bytes(stage, kept) * np.array(most)[inverse]
        return own + head_bytes(stage, kept) * np.array(heads)[inverse]

    def _memory(
        self, frame: _Frame, structure: Structure, kinds: list[_Kind], activations: list[_Activations]
    ) -> tuple[Floats, Floats]:
        peaks, states = [], []
        for kind, use in zip(kinds, activations, strict=True):
            (fixed, _, _) = self._shared(frame, structure, ("states", kind.key), partial(_states, stage=kind.stage))
            held = use.held
            if structure.offload.moves("activations"):
                held = resident_activations(kind.stage, held, self._one_micro_batch(frame, kind.stage))
            states.append(fixed)
            peaks.append(fixed + held + use.at_work)
        return reduce(larger, peaks), reduce(larger, states)

    def _one_micro_batch(self, frame: _Frame, stage: Stage) -> Floats | float:
        return micro_batch_bytes(stage, lambda graph, _: frame.blocks[id(graph)].kept_bytes)

    def _on_hosts(
        self, frame: _Frame, structure: Structure, kinds: list[_Kind], activations: list[_Activations]
    ) -> NDArray[np.bool_]:
        """Whether the fullest node holds what its devices offload."""
        if not structure.offload.anything:
            return np.ones(len(frame.cells), dtype=bool)
        step = self._step(structure, frame.sharing[0])
        host = host_of(step)
        memory: dict[int, Floats] = {}
        drives: dict[int, Floats] = {}
        for kind in kinds:
            of = partial(_states, stage=kind.stage)
            _, in_memory, on_drives = self._shared(frame, structure, ("states", kind.key), of)
            for rank in kind.ranks:
                memory[rank], drives[rank] = in_memory, on_drives
                if structure.offload.moves("activations"):
                    held = self._held(frame, structure, kind.stage, (rank,))
                    stays = resident_activations(kind.stage, held, self._one_micro_batch(frame, kind.stage))
                    memory[rank] = in_memory + (held - stays)
        fits = np.ones(len(frame.cells), dtype=bool)
        for node in node_stages(self.cluster.num_gpus, structure.pp, HostWork(step).devices):
            fits &= reduce(add, (memory[rank] for rank in node)) <= host.memory.si
            fits &= reduce(add, (drives[rank] for rank in node)) <= (host.nvme.si if host.nvme else 0.0)
        return fits


@dataclass(frozen=True, eq=False, slots=True)
class _Activations:
    """Bytes of a kind of rank: kept for the backward pass, and at work at the peak."""

    held: Floats
    at_work: Floats


def _states_traffic(step: Step, stage: Stage) -> tuple[float, float]:
    return HostWork(step).states_traffic_s(stage)


def _host_once(step: Step, stage: Stage) -> tuple[float, float, float]:
    return HostWork(step).once_s(stage)


def _accumulation(step: Step, graph: Graph) -> tuple[float]:
    return (step.accumulation_stream_s(graph),)


def _update(step: Step, stage: Stage) -> tuple[float]:
    return (step.update_s(stage),)


def _states(step: Step, stage: Stage) -> tuple[float, float, float]:
    """Bytes of a rank whatever its micro-batches: on the device, in its host's memory, on its drives."""
    plan = step.plan
    kinds = state_memory(stage, plan, step.layout, step.states, step.training.optimizer, step.hsdp_shard)
    host = take_states(stage, plan, step.layout, step.states, kinds) if plan.offload.anything else {}
    drives = sum(size for name, size in host.items() if name.endswith(":nvme"))
    return sum(kinds.values()) + step.stack.costs.context.si, sum(host.values()) - drives, drives


def _graphs(stage: Stage) -> tuple[Graph, ...]:
    return (*(graph for graph, _ in stage.layers), *stage.extras)
