"""The device that is measured: PyTorch on it, a steady state, and timing."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.units import parse_bytes

__all__ = ["TorchDevice", "load_torch", "open_device"]

#: glibc's numbers of what mallopt sets: when to give memory back, and how many blocks come straight from the kernel.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_WARM_UP = {"cpu": 1, "cuda": 3}
#: How often the cache is overwritten before a call: what a step works on was last touched several kernels ago.
_FLUSH = 4
_CORE_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def load_torch() -> Any:
    """The torch module.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            "measuring needs PyTorch, which is not installed; install it with: pip install 'simllm[validate,calibrate]'"
        ) from None
    return torch


@dataclass(frozen=True, kw_only=True)
class TorchDevice:
    """One device under PyTorch.

    Attributes
    ----------
    torch : module
    kind : str
        ``cpu`` or ``cuda``.
    name : str
        What the maker calls it.
    vendor : str
    units : int
        Threads of the processor, or multiprocessors of the GPU.
    memory_bytes : int
    cache_bytes : int
        Cache that is overwritten before each timed call: the last one of a GPU, the one of a core; 0 if not known.
    """

    torch: Any
    kind: str
    name: str
    vendor: str
    units: int
    memory_bytes: int
    cache_bytes: int

    @property
    def library(self) -> str:
        """PyTorch and its version."""
        return f"torch {self.torch.__version__}"

    @property
    def disturbed(self) -> bool:
        """Whether times hold what others do meanwhile: those of several threads, read from the clock on the wall."""
        return self.kind == "cpu" and self.units > 1

    @property
    def clock(self) -> Callable[[], float]:
        """What time is read from: of a single thread the time it had the processor, which others use too."""
        return time.thread_time if self.kind == "cpu" and self.units == 1 else time.perf_counter

    def synchronise(self) -> None:
        """Wait until the device has done everything it was given."""
        if self.kind == "cuda":
            self.torch.cuda.synchronize()

    def time(self, call: Callable[[], object], samples: int) -> list[float]:
        """Seconds of single calls, after a warm-up."""
        for _ in range(_WARM_UP[self.kind]):
            call()
        self.synchronise()
        return self._events(call, samples) if self.kind == "cuda" else self._clocked(call, samples)

    def _events(self, call: Callable[[], object], samples: int) -> list[float]:
        torch = self.torch
        flush = torch.empty(_FLUSH * self.cache_bytes, dtype=torch.uint8, device="cuda")
        pairs = []
        for _ in range(samples):
            # Overwriting the cache also lets the host get ahead: the call is queued before its start is reached.
            flush.zero_()
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def _clocked(self, call: Callable[[], object], samples: int) -> list[float]:
        clock, times = self.clock, []
        flush = self.torch.empty(_FLUSH * self.cache_bytes, dtype=self.torch.uint8)
        for _ in range(samples):
            flush.fill_(0)
            start = clock()
            call()
            times.append(clock() - start)
        return times

    def typical(self, times: list[float]) -> float:
        """What a kernel or a step takes: the median, or where others disturb it the least."""
        return min(times) if self.disturbed else statistics.median(times)


def open_device(kind: str, threads: int | None = None) -> TorchDevice:
    """A device of this machine, ready to be measured.

    Parameters
    ----------
    kind : str
        ``cpu`` or ``cuda``.
    threads : int, optional
        Threads that PyTorch uses on the processor; as PyTorch chooses if left out.

    Raises
    ------
    InputError
        There is no PyTorch or no device of such a kind.
    UnsupportedError
        This machine has no GPU that PyTorch could use.
    """
    if kind not in _WARM_UP:
        raise unknown_name("device", kind, tuple(_WARM_UP))
    torch = load_torch()
    if kind == "cuda":
        if not torch.cuda.is_available():
            built = "this PyTorch is built without CUDA" if not torch.version.cuda else "no CUDA device is visible"
            raise UnsupportedError(
                f"--device=cuda: {built} ({torch.__version__}); use --device=cpu or a machine with a GPU"
            )
        found = torch.cuda.get_device_properties(0)
        return TorchDevice(
            torch=torch,
            kind=kind,
            name=found.name,
            vendor="AMD" if torch.version.hip else "NVIDIA",
            units=found.multi_processor_count,
            memory_bytes=found.total_memory,
            cache_bytes=found.L2_cache_size,
        )
    if threads is not None:
        torch.set_num_threads(threads)
    _keep_memory()
    used = torch.get_num_threads()
    return TorchDevice(
        torch=torch,
        kind=kind,
        name=f"{_processor()}, {used} thread{'s' if used > 1 else ''}",
        vendor=platform.machine(),
        units=used,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cache_bytes=_core_cache(),
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _core_cache() -> int:
    """Bytes of the cache that one core has for itself."""
    try:
        return parse_bytes(f"{_CORE_CACHE.read_text().strip()}iB", str(_CORE_CACHE))
    except (OSError, InputError):
        return 0


def _keep_memory() -> None:
    """Let the C library keep freed memory, as PyTorch's allocator on GPUs does: fresh pages would be timed with it."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
