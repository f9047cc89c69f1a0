"""Peak memory of many plans at once, on the devices and on their hosts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from simllm.elementwise import larger
from simllm.models.graph import Graph
from simllm.parallel.memory import (
    head_bytes,
    heads_in_flight,
    micro_batch_bytes,
    resident_activations,
    state_memory,
    take_states,
    working_bytes,
)
from simllm.parallel.schedules import in_flight_chunks
from simllm.parallel.stages import Stage
from simllm.planner.frames import Frame, Kind, Shared
from simllm.planner.space import Structure
from simllm.training.offload import HostWork, host_of, node_stages
from simllm.training.step import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Activations", "activations", "memory", "on_hosts"]


@dataclass(frozen=True, eq=False, slots=True)
class Activations:
    """Bytes of a kind of rank: kept for the backward pass, and at work at the peak."""

    held: Floats
    at_work: Floats


def activations(frame: Frame, structure: Structure, kinds: list[Kind]) -> list[Activations]:
    """Bytes of activations of every kind of rank, on the rank that holds most micro-batches."""
    found = []
    for kind in kinds:
        at_work = working_bytes(
            kind.stage,
            lambda graph: frame.blocks[id(graph)].peak_bytes,
            lambda graph: frame.blocks[id(graph)].peak_bytes,
        )
        held = _held(frame, structure, kind.stage, kind.ranks)
        found.append(Activations(held, np.zeros_like(held) + at_work))
    return found


def _held(frame: Frame, structure: Structure, stage: Stage, ranks: tuple[int, ...]) -> Floats:
    """Bytes kept for the backward pass on the one of some equal ranks that holds most micro-batches."""
    counts, inverse = np.unique(frame.num_micro_batches, return_inverse=True)
    schedule, pp, vpp = structure.schedule, structure.pp, structure.vpp
    numbers = [int(m) for m in counts.tolist()]
    most = [max(in_flight_chunks(schedule, pp, m, rank, vpp) for rank in ranks) / vpp for m in numbers]
    heads = [float(heads_in_flight(schedule, m)) for m in numbers]

    def kept(graph: Graph, _: bool) -> Floats:
        return frame.blocks[id(graph)].kept_bytes

    own = micro_batch_bytes(stage, kept) * np.array(most)[inverse]
    return own + head_bytes(stage, kept) * np.array(heads)[inverse]


def memory(
    shared: Shared, frame: Frame, structure: Structure, kinds: list[Kind], activations: list[Activations]
) -> tuple[Floats, Floats]:
    costs = shared.training.software.costs
    context = costs.context.si + (frame.communicators + (structure.zero == "hsdp")) * costs.communicator.si
    peaks, states = [], []
    for kind, use in zip(kinds, activations, strict=True):
        (fixed, _, _) = shared.numbers(frame, structure, ("states", kind.key), partial(_states, stage=kind.stage))
        held = use.held
        if structure.offload.moves("activations"):
            held = resident_activations(kind.stage, held, _one_micro_batch(frame, kind.stage))
        states.append(fixed + context)
        peaks.append(fixed + context + held + use.at_work)
    return reduce(larger, peaks), reduce(larger, states)


def _one_micro_batch(frame: Frame, stage: Stage) -> Floats | float:
    return micro_batch_bytes(stage, lambda graph, _: frame.blocks[id(graph)].kept_bytes)


def on_hosts(
    shared: Shared, frame: Frame, structure: Structure, kinds: list[Kind], activations: list[Activations]
) -> NDArray[np.bool_]:
    """Whether the fullest node holds what its devices offload."""
    if not structure.offload.anything:
        return np.ones(len(frame.cells), dtype=bool)
    step = shared.step(structure, frame.sharing[0])
    host = host_of(step)
    memory: dict[int, Floats] = {}
    drives: dict[int, Floats] = {}
    for kind in kinds:
        of = partial(_states, stage=kind.stage)
        _, in_memory, on_drives = shared.numbers(frame, structure, ("states", kind.key), of)
        for rank in kind.ranks:
            memory[rank], drives[rank] = in_memory, on_drives
            if structure.offload.moves("activations"):
                held = _held(frame, structure, kind.stage, (rank,))
                stays = resident_activations(kind.stage, held, _one_micro_batch(frame, kind.stage))
                memory[rank] = in_memory + (held - stays)
    fits = np.ones(len(frame.cells), dtype=bool)
    for node in node_stages(shared.cluster.num_gpus, structure.pp, HostWork(step).devices):
        fits &= reduce(add, (memory[rank] for rank in node)) <= host.memory.si
        fits &= reduce(add, (drives[rank] for rank in node)) <= (host.nvme.si if host.nvme else 0.0)
    return fits


def _states(step: Step, stage: Stage) -> tuple[float, float, float]:
    """Bytes of a rank whatever its micro-batches: on the device, in its host's memory, on its drives."""
    plan = step.plan
    kinds = state_memory(stage, plan, step.layout, step.states, step.training.optimizer, step.hsdp_shard)
    host = take_states(stage, plan, step.layout, step.states, kinds) if plan.offload.anything else {}
    drives = sum(size for name, size in host.items() if name.endswith(":nvme"))
    return sum(kinds.values()), sum(host.values()) - drives, drives
