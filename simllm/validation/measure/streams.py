"""Kernels bound by memory bandwidth: one task for each kind, direction and size, with the bytes that the model counts.

Kinds go by the names of the operators of `simllm.models.operators`; bytes are those of their work, so that the fitted
efficiency is what a prediction multiplies with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simllm.hardware.stack import load_stack
from simllm.parallel.states import state_bytes
from simllm.validation.measure.device import TorchDevice

__all__ = ["STACK", "stream_tasks"]

Make = Callable[[TorchDevice], Callable[[], object]]
Operator = Callable[[Any, Any], Any]

#: The software that is measured: PyTorch as it comes.
STACK = "pytorch"
#: Calls in a row of which the launch of one follows.
_LAUNCHES = 100
#: Weights of the model whose optimizer step is timed.
_TENSORS = 16


def stream_tasks(
    device: TorchDevice, precision: str, elements: Sequence[int], width: int, vocab: int
) -> Iterator[tuple[dict[str, str], Make]]:
    """Cells and makers of all streaming kernels.

    Parameters
    ----------
    device : TorchDevice
    precision : str
        Of the activations.
    elements : sequence of int
        Sizes, in elements of an activation.
    width, vocab : int
        Hidden size and vocabulary.
    """
    size = 4 if precision in ("fp32", "tf32") else 2
    for count in elements:
        for kind, direction, passes, kernels, make in _POINTWISE:
            moved = round(passes * count * size) + (count if kind == "dropout" else 0)  # its mask has one byte each
            cells = _cells(kind, direction, precision, moved, kernels)
            # The gradients that meet at a residual are added like the branches were.
            way = "forward" if kind == "residual" else direction
            yield cells, _stream(make, (count // width, width), precision, way)
        yield from _table_tasks(precision, count // width, width, vocab, size)
    yield from _optimizer_tasks(precision, elements[-3:], size)
    yield _cells("launch", "", precision, 2 * 64 * size * _LAUNCHES, _LAUNCHES), _launches(precision)
    for count in elements[-2:]:
        yield _cells("copy", "", precision, 2 * 4 * count * size), _copy(4 * count, precision)
        if device.kind == "cuda":
            for way in ("h2d", "d2h"):
                cells = {"op": "copy", "direction": way, "dtype": precision, "bytes": str(4 * count * size)}
                yield cells, _host_copy(4 * count, precision, way)


def _table_tasks(precision: str, rows: int, width: int, vocab: int, size: int) -> Iterator[tuple[dict[str, str], Make]]:
    """The ends of a model: rows of the token table, and the loss over the vocabulary."""
    for direction, passes in (("forward", 2), ("backward", 3)):
        cells = _cells("embedding", direction, precision, passes * rows * width * size)
        yield cells, _stream(_embedding(rows), (vocab, width), precision, direction)
    some = max(16, rows // 4)
    traffic = load_stack(STACK).costs.loss_traffic.si / 2
    for direction in ("forward", "backward"):
        cells = _cells("loss", direction, precision, round(traffic * some * vocab))
        yield cells, _stream(_loss, (some, vocab), precision, direction)


def _optimizer_tasks(precision: str, elements: Sequence[int], size: int) -> Iterator[tuple[dict[str, str], Make]]:
    states = state_bytes(load_stack(STACK), "fp32") if size == 4 else state_bytes(load_stack(STACK), "bf16", False)
    clipping = states.norm_traffic + states.scaling_traffic
    per_parameter = clipping + states.update_traffic + 2 * 2 * states.moment_element
    for count in elements:
        yield _cells("optimizer", "", precision, round(per_parameter * 4 * count)), _optimizer(4 * count, precision)


def _cells(kind: str, direction: str, precision: str, size_bytes: int, kernels: int = 1) -> dict[str, str]:
    return {
        "op": "stream",
        "operator": kind,
        "direction": direction,
        "dtype": precision,
        "bytes": str(size_bytes),
        "kernels": str(kernels),
    }


def _dtype(device: TorchDevice, precision: str) -> Any:
    return {"bf16": device.torch.bfloat16, "fp16": device.torch.float16}.get(precision, device.torch.float32)


def _norm(torch: Any, x: Any) -> Any:
    weight = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype, requires_grad=True)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, torch.zeros_like(weight).requires_grad_())


def _activation(torch: Any, x: Any) -> Any:
    return torch.nn.functional.gelu(x)


def _gated(torch: Any, x: Any) -> Any:
    gate, up = (half.detach().requires_grad_() for half in x.chunk(2))
    return torch.nn.functional.silu(gate) * up


def _sum(torch: Any, x: Any) -> Any:
    return x + x.detach()


def _dropout(torch: Any, x: Any) -> Any:
    return torch.nn.functional.dropout(x, 0.1)


def _bias(torch: Any, x: Any) -> Any:
    return x.detach() + torch.zeros(x.shape[-1], device=x.device, dtype=x.dtype, requires_grad=True)


#: Kind, direction, passes over the activation, kernels, operator: as the operators of a model count them.
_POINTWISE: tuple[tuple[str, str, float, int, Operator], ...] = (
    ("norm", "forward", 2, 1, _norm),
    ("norm", "backward", 3, 1, _norm),
    ("activation", "forward", 2, 1, _activation),
    ("activation", "backward", 3, 1, _activation),
    ("gatedactivation", "forward", 2.5, 2, _gated),
    ("gatedactivation", "backward", 4.5, 3, _gated),
    ("residual", "forward", 3, 1, _sum),
    ("residual", "backward", 3, 1, _sum),
    ("dropout", "forward", 2, 1, _dropout),
    ("dropout", "backward", 2, 1, _dropout),
    ("projection", "backward", 1, 1, _bias),
)


def _embedding(rows: int) -> Operator:
    def look_up(torch: Any, table: Any) -> Any:
        return torch.nn.functional.embedding(torch.randint(0, len(table), (rows,), device=table.device), table)

    return look_up


def _loss(torch: Any, logits: Any) -> Any:
    labels = torch.randint(0, logits.shape[-1], logits.shape[:1], device=logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def _stream(operator: Operator, shape: tuple[int, int], precision: str, direction: str) -> Make:
    def make(device: TorchDevice) -> Callable[[], object]:
        torch = device.torch
        x = torch.randn(*shape, device=device.kind, dtype=_dtype(device, precision)).requires_grad_()
        if direction == "forward":
            return lambda: operator(torch, x)
        out = operator(torch, x)
        leaves, gradient = _leaves(out), torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return make


def _leaves(out: Any) -> list[Any]:
    """The tensors that a result depends on and that want a gradient."""
    found, todo, seen = [], [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def _optimizer(count: int, precision: str) -> Make:
    """A step as training takes it: gradients clipped, AdamW, one kernel for many weights where there is one."""

    def make(device: TorchDevice) -> Callable[[], object]:
        torch = device.torch
        weights = [
            torch.randn(count // _TENSORS, device=device.kind, dtype=_dtype(device, precision)).requires_grad_()
            for _ in range(_TENSORS)
        ]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

        return step

    return make


def _launches(precision: str) -> Make:
    def make(device: TorchDevice) -> Callable[[], object]:
        x = device.torch.zeros(64, device=device.kind, dtype=_dtype(device, precision))

        def calls() -> None:
            for _ in range(_LAUNCHES):
                x.add(1)

        return calls

    return make


def _copy(count: int, precision: str) -> Make:
    def make(device: TorchDevice) -> Callable[[], object]:
        source = device.torch.randn(count, device=device.kind, dtype=_dtype(device, precision))
        target = device.torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def _host_copy(count: int, precision: str, way: str) -> Make:
    def make(device: TorchDevice) -> Callable[[], object]:
        near = device.torch.randn(count, device=device.kind, dtype=_dtype(device, precision))
        far = device.torch.empty(count, dtype=_dtype(device, precision), pin_memory=True)
        source, target = (far, near) if way == "h2d" else (near, far)
        return lambda: target.copy_(source, non_blocking=True)

    return make
