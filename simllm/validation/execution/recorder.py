"""What really happened on a rank: collectives, FLOPs and saved tensors.

Everything is seen where PyTorch dispatches operators on plain tensors, below distributed tensors and autograd, so that
it is this rank's own work and memory. Sizes of collectives are what nccl-tests prints: the buffer of an all-reduce or a
broadcast, the whole of an all-gather or reduce-scatter, the send buffer of an all-to-all or a send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from simllm.validation.execution.dispatch import LocalMode, is_collective, local_tensor

__all__ = ["Call", "CommunicationLog", "FlopLog", "SavedLog", "saved_bytes_of"]


def saved_bytes_of(run: Callable[[], Any], owned: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of ``run()``: each storage once and whole, the storages of ``owned`` left out."""
    with _saving() as total:
        result = run()
        kept = total(owned)
    del result
    return kept


@contextmanager
def _saving() -> Iterator[Callable[[Iterable[Tensor]], int]]:
    """Yields a function that adds up what was kept so far, given what belongs to others."""
    storages: dict[int, torch.UntypedStorage] = {}
    alive: list[Tensor] = []  # a freed storage's address could be given to the next one

    def pack(tensor: Tensor) -> Tensor:
        inner = local_tensor(tensor)
        storage = inner.untyped_storage()
        alive.append(inner)
        storages[storage._cdata] = storage
        return tensor

    def total(owned: Iterable[Tensor]) -> int:
        outside = {local_tensor(t).untyped_storage()._cdata for t in owned}
        # Gathered parameters that were freed again have no bytes by now.
        return sum(storage.nbytes() for key, storage in storages.items() if key not in outside)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    alive.clear()


class SavedLog:
    """Bytes that each observed part keeps for its backward pass, in its first forward pass."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def observer(self, name: str, others: Callable[[], Iterable[Tensor]]) -> Callable[..., Any]:
        """An observer of the part ``name``; what ``others`` names, and what other parts lend, is not counted here."""

        @contextmanager
        def watch(part: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
            if name in self.bytes or not torch.is_grad_enabled():
                yield
                return
            lent = [t for t in inputs[1:] if isinstance(t, Tensor)]
            with _saving() as total:
                yield
                self.bytes[name] = total([*part.parameters(), *others(), *lent])

        return watch


# -- collectives -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One collective of this rank: operation, the global ranks of its group, bytes as nccl-tests prints them."""

    op: str
    ranks: tuple[int, ...]
    size_bytes: int


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


#: Operator name -> (operation, how to find its size in (args, result)).
_COLLECTIVES: dict[str, tuple[str, Callable[[Any, Any], int]]] = {
    "allreduce_": ("all_reduce", lambda a, r: _bytes(a[0])),
    "allreduce_coalesced_": ("all_reduce", lambda a, r: _bytes(a[0])),
    "allgather_": ("all_gather", lambda a, r: _bytes(a[0])),
    "_allgather_base_": ("all_gather", lambda a, r: _bytes(a[0])),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda a, r: _bytes(a[0])),
    "reduce_scatter_": ("reduce_scatter", lambda a, r: _bytes(a[1])),
    "_reduce_scatter_base_": ("reduce_scatter", lambda a, r: _bytes(a[1])),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda a, r: _bytes(a[1])),
    "alltoall_base_": ("all_to_all", lambda a, r: _bytes(a[1])),
    "alltoall_": ("all_to_all", lambda a, r: _bytes(a[1])),
    "broadcast_": ("broadcast", lambda a, r: _bytes(a[0])),
    "send": ("send", lambda a, r: _bytes(a[0])),
    "recv_": ("recv", lambda a, r: _bytes(a[0])),
    "recv_any_source_": ("recv", lambda a, r: _bytes(a[0])),
    # The functional ones of DTensor.
    "all_reduce": ("all_reduce", lambda a, r: _bytes(a[0])),
    "all_reduce_": ("all_reduce", lambda a, r: _bytes(a[0])),
    "all_reduce_coalesced": ("all_reduce", lambda a, r: _bytes(a[0])),
    "all_gather_into_tensor": ("all_gather", lambda a, r: _bytes(r)),
    "all_gather_into_tensor_out": ("all_gather", lambda a, r: _bytes(r)),
    "all_gather_into_tensor_coalesced": ("all_gather", lambda a, r: _bytes(r)),
    "reduce_scatter_tensor": ("reduce_scatter", lambda a, r: _bytes(a[0])),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", lambda a, r: _bytes(a[0])),
    "all_to_all_single": ("all_to_all", lambda a, r: _bytes(a[0])),
    "broadcast": ("broadcast", lambda a, r: _bytes(a[0])),
}
_SILENT = frozenset({"wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"})


def _ranks_of(args: Any, kwargs: Any) -> tuple[int, ...]:
    for value in (*args, *kwargs.values()):
        group = value
        if isinstance(value, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(value)
            except (RuntimeError, TypeError):
                continue
        elif isinstance(value, str):
            try:
                group = vars(dist.distributed_c10d)["_resolve_process_group"](value)
            except (RuntimeError, LookupError, ValueError):
                continue
        if isinstance(group, dist.ProcessGroup):
            return tuple(dist.get_process_group_ranks(group))
    raise RuntimeError("a collective without a process group")


class CommunicationLog(LocalMode):
    """Every collective in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not is_collective(func):
            return
        name = func._schema.name.split("::")[1]
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise RuntimeError(f"a collective that the recorder does not know: {name}")
        op, size = _COLLECTIVES[name]
        ranks = _ranks_of(args, kwargs)
        if len(ranks) > 1:
            self.calls.append(Call(op, ranks, size(args, result)))


# -- FLOPs -----------------------------------------------------------------------------------------------------

_aten = torch.ops.aten


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _cpu_attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))


_CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class FlopLog(LocalMode):
    """FLOPs of matrix products and attention by PyTorch's own formulas, on this rank's shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        formula = _CPU_FORMULAS.get(packet)
        if formula is not None:
            shaped = torch.utils._pytree.tree_map(lambda t: t.shape if isinstance(t, Tensor) else t, (args, kwargs))
            self.flops += formula(*shaped[0], **shaped[1])
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=result))
