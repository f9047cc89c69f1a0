"""Live bytes of a rank while it works."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simllm.validation.execution.dispatch import LocalMode, is_collective, local_tensor

__all__ = ["MemoryLog", "ignore_present_threads"]

_TRANSFERS = frozenset({"c10d::send", "c10d::recv_", "c10d::recv_any_source_"})
_PATIENCE_S = 0.1
_TASKS = Path("/proc/self/task")
_OLD: set[str] = set()


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
    pause = 5e-5
    while pause < _PATIENCE_S:
        time.sleep(pause)
        if not _others_run():
            return
        pause *= 2


def _others_run() -> bool:
    """Whether any other thread of this case runs or wants to; False where the system does not say."""
    own = str(threading.get_native_id())
    for name in _threads() - _OLD - {own}:
        with suppress(OSError):
            if (_TASKS / name / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def _threads() -> set[str]:
    return {folder.name for folder in _TASKS.glob("*")}


def ignore_present_threads() -> None:
    """Threads that there are now belong to earlier cases, whose groups PyTorch has not let go of: they do nothing."""
    _OLD.clear()
    _OLD.update(_threads())


class MemoryLog(LocalMode):
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
        waits = result is not NotImplemented and is_collective(func) and func._schema.name not in _TRANSFERS
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
