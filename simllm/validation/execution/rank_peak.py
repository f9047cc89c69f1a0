"""Peak memory of a rank: states, what micro-batches in flight keep, and the widest moment of the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simllm.models.activations import kept_tensors
from simllm.models.graph import Graph
from simllm.models.operators import Loss
from simllm.parallel.schedules import in_flight_chunks
from simllm.validation.execution.peak import backward_peak, backward_steps, input_gradient_peak, loss_workspace
from simllm.validation.execution.pipeline_peak import Chunk, pipeline_peak
from simllm.validation.execution.rank_view import RankView
from simllm.validation.execution.sharded_pipeline import ShardedBlock, ShardedChunk, sharded_pipeline_peak
from simllm.validation.execution.sharded_step import sharded_step_peak
from simllm.validation.execution.weights import Parameter, Unit

__all__ = ["rank_peak"]


def rank_peak(at: RankView, saved: Mapping[str, int], persistent: Mapping[str, int]) -> float:
    """Most bytes at once in a step.

    Parameters
    ----------
    at : RankView
    saved : mapping of str to int
        What each part keeps for its backward pass.
    persistent : mapping of str to int
        States by kind.
    """
    if at.plan.pp == 1:
        backward = _without_pipeline(at, saved)
    elif at.case.fully_sharded:
        backward = _received(at) + _in_transit(at) + _sharded_pipeline(at, saved)
    else:
        backward = _received(at) + pipeline_peak(at.actions, _chunks(at, saved), at.plan.vpp > 1)
    return sum(persistent.values()) + _always(at) + max(backward, *_after(at))


def _gradient_bytes(at: RankView) -> int:
    """Of an element of a weight's gradient as autograd makes it."""
    return 2 if at.plan.precision == "bf16" else 4


def _layer_name(at: RankView, index: int) -> str:
    encoder = len(at.case.spec.encoder.layers) if at.case.spec.encoder else 0
    return f"encoder.layers.{index}" if index < encoder else f"layers.{index - encoder}"


# -- pipelines ---------------------------------------------------------------------------------------------------


def _stream_bytes(at: RankView) -> float:
    """What stages of a pipeline pass on of a micro-batch."""
    return at.layout.elements(at.graph.layers[-1].output) * at.impl.activation_bytes


def _received(at: RankView) -> float:
    """Buffers to receive in, one for each micro-batch and direction, which stay from step to step."""
    stages, end = at.case.stages(at.pp_rank), at.plan.pp * at.plan.vpp - 1
    return _stream_bytes(at) * at.m * sum((stage > 0) + (stage < end) for stage in stages)


def _in_transit(at: RankView) -> float:
    """What was sent and waits, less received inputs that the first layer keeps: they are counted there.

    Counted when all forward passes are done, the last time that so many micro-batches are in flight.
    """
    vpp = at.plan.vpp
    chunks = in_flight_chunks(at.plan.schedule, at.plan.pp, at.m, at.pp_rank, vpp)
    receiving, sending = vpp - at.stage.first, vpp - at.stage.last
    twice = chunks * receiving / vpp if _keeps_input(at, 0) else 0.0
    sent = chunks * sending / vpp if vpp == 1 else at.m * sending + (at.m * vpp - chunks) * receiving / vpp
    return _stream_bytes(at) * (sent - twice)


def _keeps_input(at: RankView, chunk: int) -> bool:
    """Whether the first layer of a chunk keeps what it was given, which is in a buffer already."""
    index, graph = at.chunks[chunk][0]
    return graph.input.name in kept_tensors(graph, at.impl) or at.policy(index).kind == "full"


def _chunks(at: RankView, saved: Mapping[str, int]) -> list[Chunk]:
    stages, end, size = at.case.stages(at.pp_rank), at.plan.pp * at.plan.vpp - 1, _stream_bytes(at)
    found = []
    for number, stage in enumerate(stages):
        layers = at.chunks[number]
        kept = float(saved.get("stem", 0) if stage == 0 else 0)
        kept -= size * (stage > 0 and _keeps_input(at, number))
        working = kept
        for index, graph in layers:
            walk = backward_peak(graph, at.layout, at.impl, _gradient_bytes(at), False)
            working = max(working, kept + walk)
            kept += saved[_layer_name(at, index)]
        graphs = [graph for _, graph in layers]
        if stage == end:
            kept += saved["head"]
            working = max(working, kept + loss_workspace(at.graph.head, at.layout, at.plan.tp > 1))
            graphs.append(at.graph.head)
        splitting = pending = 0.0
        if stage > 0:  # the first half of stage 0 does nothing: nobody asks for the gradient of token ids
            splitting, pending = input_gradient_peak(graphs, at.layout, at.impl, _gradient_bytes(at))
            # The gradient that comes in is in a buffer, and is that of the last operator unless that gathers it.
            there = size * (stage < end)
            splitting -= there
            pending -= 0.0 if at.layout.sequence_parallel else there
        found.append(
            Chunk(
                kept=kept,
                working=working,
                output=size * (stage < end and stage + 1 not in stages),
                gradient=size * (stage > 0 and stage - 1 not in stages),
                splitting=splitting,
                pending=pending,
                weights=_weight_gradients_at_once(at, graphs),
                loosened=_loss_keeps(at) if stage == end else 0.0,
            )
        )
    return found


def _weight_gradients_at_once(at: RankView, graphs: Iterable[Graph]) -> float:
    """Those of one product, or of two less the gradient that waited for the first and is gone by then."""
    steps = [s for graph in graphs for s in backward_steps(graph, at.layout, at.impl, _gradient_bytes(at))]
    pairs = sorted((size, step.results) for step in steps for size in step.weights)[-2:]
    one, both = max(size for size, _ in pairs), sum(size for size, _ in pairs)
    return max(one, both - max(waited for _, waited in pairs))


def _loss_keeps(at: RankView) -> float:
    """What the loss keeps: behind the last operator with weights."""
    kept = {t.name: t for op in at.graph.head.operators if isinstance(op, Loss) for t in op.saved(at.impl)}
    return sum(float(at.layout.elements(t) * at.impl.bytes_of(t)) for t in kept.values() if t.dtype != "index")


def _sharded_pipeline(at: RankView, saved: Mapping[str, int]) -> float:
    """The states of FSDP2 and the activations along the actions of a pipeline rank."""
    bytes_of_gradient = _gradient_bytes(at)

    def whole(parameter: Parameter) -> int:
        if parameter.name != "token.weight" or not at.stage.first:
            return parameter.elements
        more = (at.plan.tp - 1) * parameter.elements
        why = "distributed tensors make the gradient of a table that is split by rows whole on every rank"
        at.term("peak memory", more * 4, why)
        return parameter.elements + more

    def block(units: Iterable[Unit], **sizes: float) -> ShardedBlock:
        own = list(units)
        gathered = [unit.gathered(at.shard_ranks(unit)) for unit in own]
        return ShardedBlock(
            units=tuple(size * at.case.states.gathered for size in gathered),
            reduced=tuple(4.0 * size for size in gathered),
            made=tuple(float(whole(p) * bytes_of_gradient) for unit in own for p in unit.parameters),
            copied=4 / bytes_of_gradient,
            **sizes,
        )

    layers: list[ShardedBlock] = []
    for (index, graph), own in zip(at.layers, at.layer_units, strict=True):
        walks = [
            backward_peak(graph, at.layout, at.impl, bytes_of_gradient, keeps)
            for keeps in (True, bytes_of_gradient == 2)
        ]
        layers.append(block(own, kept=saved[f"layers.{index}"], working=walks[0], working_again=walks[1]))
    root = [unit for unit in at.units if unit.root]
    stem = block(root[: at.stage.first], kept=saved.get("stem", 0))
    loss = loss_workspace(at.graph.head, at.layout, at.plan.tp > 1) if at.stage.last else 0.0
    head = block(root[-1:] if at.stage.last else (), kept=saved.get("head", 0), working=loss)
    vpp, nothing = at.plan.vpp, ShardedBlock(copied=4 / bytes_of_gradient)
    each = len(layers) // vpp
    chunks = [
        ShardedChunk(
            layers=tuple(layers[i * each : (i + 1) * each]),
            stem=stem if i == 0 else nothing,
            head=head if i == vpp - 1 else nothing,
        )
        for i in range(vpp)
    ]
    return sharded_pipeline_peak(at.actions, chunks, frees=at.plan.zero != "2")


def _always(at: RankView) -> float:
    """The batch, and the tables of positions."""
    rows = at.plan.global_batch_size // at.plan.dp
    return 2 * 8.0 * rows * at.case.seq_len


def _without_pipeline(at: RankView, saved: Mapping[str, int]) -> float:
    """Bytes of the one micro-batch that goes backward: at each layer, or at the loss."""
    kept = {index: saved[_layer_name(at, index)] for index, _ in at.layers}
    head = saved["head"]
    outside = sum(saved.values()) - sum(kept.values()) - head
    if at.case.fully_sharded:
        return sharded_step_peak(at, kept, outside, head)
    held = peak = float(outside)
    # The gradient of a tied table waits for its other half, from the tokens.
    table = sum(at.layout.weight_elements(w) for w in at.graph.head.weights if w.tied) * float(_gradient_bytes(at))
    for index, graph in at.layers:
        peak = max(peak, held + table + backward_peak(graph, at.layout, at.impl, _gradient_bytes(at), False))
        held += kept[index]
    return max(peak, held + head + loss_workspace(at.graph.head, at.layout, at.plan.tp > 1))


def _after(at: RankView) -> list[float]:
    """Temporaries when all micro-batches are through: gradients reduced by hand are copied into one buffer."""
    plan = at.plan
    experts = 4.0 * sum(p.elements for u in at.units if u.experts for p in u.parameters)
    dense = 4.0 * sum(p.elements for u in at.units if not u.experts for p in u.parameters)
    # Adam's denominator is made in two steps.
    found = [8.0 * max(p.shard(at.shard_ranks(u)) for u in at.units for p in u.parameters)]
    found += [experts] if at.experts_apart and plan.zero in ("0", "1") else []
    return [*found, dense] if plan.tp > 1 and plan.dp > 1 and plan.zero == "0" else found
