"""What really happened on a rank: collectives, FLOPs, memory by kind, saved tensors, pipeline actions.

Everything is seen where PyTorch dispatches operators on plain tensors, below distributed tensors and autograd, so that
it is this rank's own work and memory. Sizes of collectives are what nccl-tests prints: the buffer of an all-reduce or a
broadcast, the whole of an all-gather or reduce-scatter, the send buffer of an all-to-all or a send.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Call", "CommunicationLog", "FlopLog", "MemoryLog", "SavedLog", "local_tensor", "saved_bytes_of"]


def local_tensor(tensor: Tensor) -> Tensor:
    """The tensor that holds memory: this rank's part of a distributed one, what an unawaited collective will fill."""
    inner = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return getattr(inner, "elem", inner)


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


class _Propagation(threading.local):
    """Whether distributed tensors are working out shapes, on tensors of global shape that are nobody's memory."""

    running = False


_PROPAGATION = _Propagation()


@contextmanager
def _marked_propagation() -> Iterator[None]:
    propagator: Any = ShardingPropagator
    original = propagator._propagate_tensor_meta_non_cached

    def marked(self: Any, schema: Any) -> Any:
        before, _PROPAGATION.running = _PROPAGATION.running, True
        try:
            return original(self, schema)
        finally:
            _PROPAGATION.running = before

    propagator._propagate_tensor_meta_non_cached = marked
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = original


class _LocalMode(TorchDispatchMode):
    """Sees operators on this rank's plain tensors, not those on distributed ones or of shape propagation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if not _PROPAGATION.running:
            self.see(func, args, kwargs or {}, result)
        return result

    def __enter__(self) -> Self:
        self._marked = _marked_propagation()
        self._marked.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._marked.__exit__(None, None, None)

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """One operator and what it returned."""
        raise NotImplementedError


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
_TRANSFERS = frozenset({"c10d::send", "c10d::recv_", "c10d::recv_any_source_"})
_PATIENCE_S = 1.0


def _is_collective(func: Any) -> bool:
    return func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")


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


class CommunicationLog(_LocalMode):
    """Every collective in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not _is_collective(func):
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


class FlopLog(_LocalMode):
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


# -- memory ----------------------------------------------------------------------------------------------------


def _wait_and_let_go(result: Any) -> None:
    """Wait for a collective, and until gloo's thread has let go of its tensors.

    That thread drops them when it next runs, after the collective counts as done: on a busy machine milliseconds
    later, and if the program has dropped them by then, they would still count as its memory.
    """
    for value in torch.utils._pytree.tree_leaves(result):
        if isinstance(value, torch.ScriptObject):
            dist.Work.unbox(value).wait()
        elif isinstance(value, Tensor):
            torch.ops._c10d_functional.wait_tensor(value)
    end = time.monotonic() + _PATIENCE_S
    while True:
        time.sleep(5e-5)
        if not _others_run() or time.monotonic() > end:
            return


def _others_run() -> bool:
    """Whether any other thread of this process runs or wants to; False where the system does not say."""
    own = str(threading.get_native_id())
    for folder in Path("/proc/self/task").glob("*"):
        with suppress(OSError):
            if folder.name != own and (folder / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


class MemoryLog(_LocalMode):
    """Live bytes of all storages, and what there is at the peak.

    ``track`` names storages that exist already; all others count as ``temporary``: activations and workspace.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, str]] = {}
        self.refs: dict[int, Any] = {}
        self.current: dict[str, int] = {}
        self.peak_bytes = 0
        self.peak: dict[str, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors under a kind."""
        for tensor in tensors:
            self._add(local_tensor(tensor).untyped_storage(), kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # Transfers between two ranks wait for the other one, and have no thread of their own.
        waits = result is not NotImplemented and _is_collective(func) and func._schema.name not in _TRANSFERS
        if waits and dist.get_backend() == "gloo":
            _wait_and_let_go(result)
        return result

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._add(local_tensor(value).untyped_storage(), "temporary")

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self.live.get(key)
        if known is not None:
            if known[0] != size:  # a storage that was resized by an operator
                self._change(known[1], size - known[0])
                self.live[key] = (size, known[1])
            return
        self.live[key] = (size, kind)
        self.refs[key] = weakref.ref(storage, lambda _: self._gone(key))
        self._change(kind, size)

    def _gone(self, key: int) -> None:
        size, kind = self.live.pop(key, (0, "temporary"))
        self.refs.pop(key, None)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.current[kind] = self.current.get(kind, 0) + size
        total = sum(self.current.values())
        if total > self.peak_bytes:
            self.peak_bytes, self.peak = total, dict(self.current)

    def __enter__(self) -> MemoryLog:
        log, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = log.live.get(storage._cdata)
            if known is not None:
                log._change(known[1], size - known[0])
                log.live[storage._cdata] = (size, known[1])
            elif size:
                log._add(storage, "gathered")
            return result

        # FSDP frees and fills its gathered parameters by resizing their storages.
        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)
