"""Where operators are seen: on this rank's plain tensors, below distributed tensors and autograd."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LocalMode", "is_collective", "local_tensor"]


def local_tensor(tensor: Tensor) -> Tensor:
    """The tensor that holds memory: this rank's part of a distributed one, what an unawaited collective will fill."""
    inner = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return getattr(inner, "elem", inner)


def is_collective(func: Any) -> bool:
    """Whether an operator is one of torch.distributed."""
    return func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")


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


class LocalMode(TorchDispatchMode):
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
