"""What each part of a rank keeps for its backward pass."""

from __future__ import annotations

from simllm.models.activations import kept_tensors, saved_bytes
from simllm.models.graph import Graph, Operator
from simllm.models.operators import Combine, Embedding, Loss, Norm
from simllm.validation.execution.rank_view import RankView, operator_named

__all__ = ["saved"]


def saved(at: RankView) -> dict[str, int]:
    """Bytes by part, named as the reference model names them, of one micro-batch."""
    result = {}
    encoder = len(at.case.spec.encoder.layers) if at.case.spec.encoder else 0
    for index, graph in at.layers:
        policy = at.policy(index)
        name = f"encoder.layers.{index}" if index < encoder else f"layers.{index - encoder}"
        size = round(saved_bytes(graph, at.layout, at.impl, policy))
        result[name] = size + (0 if policy.kind == "full" else _layer_terms(at, graph))
    for graph in at.stage.extras:
        if graph is at.graph.head:
            result["head"] = _edge(at, graph)
        elif graph is at.graph.stem:
            result["encoder.stem" if encoder else "stem"] = _edge(at, graph)
        else:
            result["stem"] = _edge(at, graph)
    return result


def _layer_terms(at: RankView, graph: Graph) -> int:
    extra = _statistics(at, graph)
    for operator in graph.operators:
        if isinstance(operator, Combine):
            extra += _routing(at, operator)
    return extra


def _routing(at: RankView, operator: Operator) -> int:
    rows = at.layout.elements(operator.inputs[0]) // at.layout.width(operator.inputs[0].axes)
    tokens = at.layout.tokens(operator.outputs[0])
    why = "the permutation back to token order (int64); weights before their division, and the sum (float32)"
    return at.term("saved bytes", rows * 8 + rows * 4 + tokens * 4, why)


def _statistics(at: RankView, graph: Graph) -> int:
    """A CPU keeps the mean and deviation of LayerNorm in the dtype of its weight, CUDA in float32."""
    if at.plan.precision == "fp32" or at.backend == "nccl":
        return 0
    norms = [op for op in graph.operators if isinstance(op, Norm) and op.kind == "layernorm"]
    found = [tensor for norm in norms for tensor in norm.saved(at.impl)]
    halved = sum(at.layout.elements(t) * 2 for t in found if t.name.endswith((".rstd", ".mean")))
    return at.term("saved bytes", -halved, "on a CPU LayerNorm keeps its statistics in the dtype of its weight")


def _edge(at: RankView, graph: Graph) -> int:
    layout, impl = at.layout, at.impl
    kept = kept_tensors(graph, impl)
    size = saved_bytes(graph, layout, impl)
    given = sum(layout.elements(t) * impl.bytes_of(t) for t, _ in kept.values() if t.name in ("ids", "loss.labels"))
    if "encoder_norm" in {op.name for op in graph.operators}:
        norm = operator_named(graph, "encoder_norm")
        outside = {t.name for t in (*graph.lends, *norm.saved(impl), *norm.outputs)}
        size -= sum(layout.elements(t) * impl.bytes_of(t) for t, _ in kept.values() if t.name in outside)
    size += at.term("saved bytes", -given, "token ids and labels are views of the batch, which stays anyway")
    size += _statistics(at, graph)
    for operator in graph.operators:
        if isinstance(operator, Embedding) and any(w.name == "position.weight" for w in operator.weights):
            own = at.case.seq_len // (layout.tp if layout.sequence_parallel else 1)
            size += at.term("saved bytes", own * 8, "positions are looked up by int64 numbers")
        if isinstance(operator, Loss):
            size += at.term("saved bytes", 4, "the mean of the losses keeps the number of labels")
    return round(size)
