"""Time and memory of all plans at once: what blocks cost is looked up, how it adds up is numpy arithmetic.

A quantity that few plans differ in (the price of a block, the weights of a rank, the seconds of a reduction) is
computed once for each distinct case by the same `Step`, `Engine` and memory functions that `estimate` uses. The
formulas that put them together (`simllm.training.composition`, `simllm.parallel.memory`, `simllm.parallel.schedules`)
are called with arrays instead of floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from simllm.elementwise import larger
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.graph import Graph
from simllm.parallel.memory import micro_batch_bytes
from simllm.parallel.offload import Offload
from simllm.parallel.placement import communicators
from simllm.parallel.schedules import SCHEDULES, pipeline_bubble
from simllm.parallel.stages import Stage
from simllm.planner.array_memory import activations, memory, on_hosts
from simllm.planner.frames import Evaluated, Frame, Kind, Shared, kinds_of
from simllm.planner.prices import Block, Prices
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
from simllm.training.offload import HostWork, beside_passes, offload_profile
from simllm.training.step import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Assembly"]


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
        self.shared = Shared(model, cluster, training)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def frame(self, precision: str, pp: int, cells: Ints, dp: Ints) -> Frame:
        """Gather what the blocks of these cells cost."""
        prices, columns = self.prices[precision], self.cells.columns
        prices.need(cells)
        blocks = {
            key: Block(b.forward_s[cells], b.backward_s[cells], b.kept_bytes[cells], b.peak_bytes[cells])
            for key, b in prices.blocks.items()
        }
        m = self.global_batch_size // (dp * columns["micro_batch_size"][cells])
        names = ("tp", "ep", "sequence_parallel")
        keys = np.stack([*(columns[name][cells] for name in names), self.cells.etp[cells]])
        _, first, share = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        sharing = tuple(self._fields(int(cells[i]), pp, int(dp[i])) for i in first)
        counts = m.astype(np.float64)
        tp, cp, ep = (columns[name][cells] for name in ("tp", "cp", "ep"))
        replicas = tp * cp * dp // (ep * self.cells.etp[cells])
        groups = communicators(tp, np.full_like(tp, pp), cp, self.cells.cp_a2a[cells], dp, ep, replicas, hsdp=False)
        frame = Frame(cells, counts, blocks, np.zeros_like(counts), groups, share.ravel(), sharing)
        if pp == 1:
            return frame
        plain = Structure(
            precision=precision, pp=pp, vpp=1, schedule="1f1b", uneven_layers=True, zero="0", offload=Offload()
        )
        split = columns["sequence_parallel"][cells]
        like = np.stack([prices.transfer_bytes[cells], columns["tp"][cells], split])
        _, one, inverse = np.unique(like, axis=1, return_index=True, return_inverse=True)
        steps = [self.shared.step(plain, self._fields(int(cells[i]), pp, int(dp[i]))) for i in one]
        seconds = np.array([step.exchange_s(step.p2p()) for step in steps])
        return replace(frame, transfer_s=seconds[inverse.ravel()])

    def _fields(self, cell: int, pp: int, dp: int) -> dict[str, Any]:
        """The fields of a plan that its cell and its degrees decide."""
        return self.cells.fields(cell) | {"pp": pp, "dp": dp, "global_batch_size": self.global_batch_size}

    def evaluate(self, frame: Frame, structures: list[Structure]) -> Iterator[Evaluated]:
        """Time and memory of the cells of a frame in structures that differ in their sharding only.

        Plans that are no choice are left out: sharding over one rank, and HSDP where its groups are not whole domains.
        """
        kinds = kinds_of(self.model, structures[0])
        held = activations(frame, structures[0], kinds)
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
            peak, states = memory(self.shared, frame, structure, kinds, held)
            hosts = on_hosts(self.shared, frame, structure, kinds, held)
            everyone = Evaluated(structure, frame.cells, time_s, peak, states, hosts)
            yield everyone if able.all() else everyone.where(able[frame.share])

    def _makes_sense(self, fields: dict[str, Any], zero: str, first: bool) -> bool:
        """Whether a way of sharding differs from those before it."""
        ranks = self.cluster.num_gpus // fields["tp"] // fields["pp"]
        if ranks == 1:
            return first
        inside = max(1, self.cluster.gpus_per_domain // int(fields["tp"]))
        return zero != "hsdp" or (1 < inside < ranks and ranks % inside == 0)

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def _per_micro_batch(self, frame: Frame, structure: Structure, kinds: list[Kind]) -> list[tuple[Floats, Floats]]:
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

    def _passes(self, frame: Frame, structure: Structure, graph: Graph) -> list[Floats]:
        """Forward and backward seconds of a block with what data parallelism adds to each micro-batch."""
        block, full = frame.blocks[id(graph)], structure.zero in ("3", "hsdp")
        known = ("passes", id(graph), structure.zero if full else "")
        if known in frame.dealt:
            return frame.dealt[known]
        if full:
            of = partial(Step.block_traffic_s, graph=graph)
            gather, scatter = self.shared.numbers(frame, structure, ("block", id(graph)), of)
            share = self.training.software.overlap.fully_sharded_exposed.si
            ahead, behind = sharded_exposure(gather, scatter, block.forward_s, block.backward_s, share)
            frame.dealt[known] = [block.forward_s + ahead, block.backward_s + behind]
        else:
            (stream,) = self.shared.numbers(
                frame, structure, ("stream", id(graph)), partial(_accumulation, graph=graph)
            )
            added = accumulation_s(stream, frame.num_micro_batches)
            frame.dealt[known] = [block.forward_s, block.backward_s + added]
        return frame.dealt[known]

    def _with_transfers(
        self, frame: Frame, structure: Structure, kinds: list[Kind], passes: list[tuple[Floats, Floats]]
    ) -> list[tuple[Floats, Floats]]:
        """The same with what shows of transfers to the host."""
        rates = HostWork(self.shared.step(structure, frame.sharing[0])).activation_rates()
        found = []
        for kind, (forward, backward) in zip(kinds, passes, strict=True):
            of = partial(_states_traffic, stage=kind.stage)
            parameters, gradients = self.shared.numbers(frame, structure, ("transfers", kind.key), of)
            kept = micro_batch_bytes(kind.stage, lambda graph, _: frame.blocks[id(graph)].kept_bytes)
            ahead, behind = beside_passes((parameters, gradients), rates, forward * 0 + kept, forward, backward)
            found.append((forward + ahead, backward + behind))
        return found

    # -- the step --------------------------------------------------------------------------------------------------

    def _time(
        self, frame: Frame, structure: Structure, kinds: list[Kind], passes: list[tuple[Floats, Floats]]
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
                leaving, returning, update = self.shared.numbers(frame, structure, ("host", kind.key), of_host)
                update = update + exposed(leaving, backward, offload_profile().transfer_exposed.si) + returning
            else:
                (update,) = self.shared.numbers(
                    frame, structure, ("update", kind.key), partial(_update, stage=kind.stage)
                )
            if structure.zero not in ("3", "hsdp"):
                of = partial(Step.stage_traffic_s, stage=kind.stage)
                scatter, gather = self.shared.numbers(frame, structure, ("traffic", kind.key), of)
                reductions = m if structure.zero == "2" else np.ones_like(m)
                update = update + data_parallel_s(scatter, gather, forward, backward, reductions, overlap)
            summed = partial(_summed_gradients, stage=kind.stage)
            shown, tied, every_time = self.shared.numbers(frame, structure, ("summed", kind.key), summed)
            onces.append(update + shown * np.where(every_time > 0, m, 1.0) + tied)
        slowest = reduce(larger, totals)
        everyone = reduce(add, (total * len(kind.ranks) for total, kind in zip(totals, kinds, strict=True)))
        return step_s(slowest * m, pipeline_bubble(slowest, everyone, structure.vpp), reduce(larger, onces))


def _states_traffic(step: Step, stage: Stage) -> tuple[float, float]:
    return HostWork(step).states_traffic_s(stage)


def _host_once(step: Step, stage: Stage) -> tuple[float, float, float]:
    leaving, returning, update = HostWork(step).once_s(stage)
    return leaving, returning, update + step.clipping_s(stage)


def _accumulation(step: Step, graph: Graph) -> tuple[float]:
    return (step.accumulation_stream_s(graph),)


def _update(step: Step, stage: Stage) -> tuple[float]:
    return (step.update_s(stage) + step.clipping_s(stage),)


def _summed_gradients(step: Step, stage: Stage) -> tuple[float, float, float]:
    """Seconds of summed gradients, over tp and of tied tables, and whether the former come with every micro-batch."""
    return *step.summed_gradients_s(stage), float(step.sums_every_micro_batch)


def _graphs(stage: Stage) -> tuple[Graph, ...]:
    return (*(graph for graph, _ in stage.layers), *stage.extras)
