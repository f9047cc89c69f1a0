"""What is measured on a device: a list of kernels, each with the cells of its row in a table of kernel timings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simllm.validation.measure.device import TorchDevice
from simllm.validation.measure.streams import stream_tasks

__all__ = ["Grid", "Task", "grid_for", "tasks_for"]

#: What `sdpa` runs for a backend, as tables of kernels call it; the processor has one fused kernel.
_BACKENDS = {"cuda": {"FLASH_ATTENTION": "FA2", "CUDNN_ATTENTION": "cuDNN"}, "cpu": {"FLASH_ATTENTION": "FlashCPU"}}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kernel to time.

    Attributes
    ----------
    cells : dict of str to str
        What its row says, the time apart.
    make : callable
        Allocates what it works on and returns the call to time.
    """

    cells: dict[str, str]
    make: Callable[[TorchDevice], Callable[[], object]]

    @property
    def key(self) -> str:
        """Equal for measurements of one problem."""
        return "/".join(f"{name}={value}" for name, value in sorted(self.cells.items()) if value)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Shapes to measure; `matmul` in m, n, k, `attention` in sequences, heads, key-value heads, tokens, head size."""

    precisions: tuple[str, ...]
    attention_precision: str
    matmul: tuple[tuple[int, int, int], ...]
    attention: tuple[tuple[int, int, int, int, int], ...]
    unfused: tuple[tuple[int, int, int, int, int], ...]
    stream_elements: tuple[int, ...]
    width: int
    vocab: int


def grid_for(kind: str, quick: bool = False) -> Grid:
    """The shapes of a full measurement, or of a quick one that only shows that it works."""
    if kind == "cuda":
        sides = (1024, 2048, 4096, 8192, 16384)
        weights = tuple((n, k) for n in sides for k in sides if n * k <= 1 << 27)
        rows = (64, 1024, 4096, 16384)
        heads = ((1, 32, 32), (4, 16, 16), (2, 32, 8))
        return Grid(
            precisions=("bf16", "fp16", "tf32", "fp8") if not quick else ("bf16",),
            attention_precision="bf16",
            matmul=tuple((m, n, k) for m in rows for n, k in weights[:: 8 if quick else 1]),
            attention=tuple(
                (b, h, kv, s, d) for b, h, kv in heads for s in (512, 1024, 2048, 4096, 8192) for d in (64, 128)
            ),
            unfused=((4, 16, 16, 1024, 64), (1, 16, 16, 4096, 128)),
            stream_elements=tuple(1 << n for n in range(18, 28, 2)),
            width=4096,
            vocab=32000,
        )
    if quick:
        return Grid(
            precisions=("fp32",),
            attention_precision="fp32",
            matmul=((128, 256, 256), (256, 512, 256), (256, 256, 512)),
            attention=((2, 4, 4, 128, 64), (1, 4, 4, 256, 64)),
            unfused=((1, 4, 4, 128, 64),),
            stream_elements=(1 << 16, 1 << 18),
            width=256,
            vocab=1024,
        )
    weights = ((256, 256), (512, 512), (1024, 256), (256, 1024), (1024, 1024), (2048, 512), (512, 2048), (3072, 1024))
    weights += ((1024, 4096), (4096, 1024), (8192, 512))
    return Grid(
        precisions=("fp32", "bf16"),
        attention_precision="fp32",
        matmul=tuple((m, n, k) for m in (256, 1024, 2048) for n, k in weights if m * n * k <= 1 << 32),
        attention=(
            (8, 8, 8, 128, 64),
            (4, 8, 8, 256, 64),
            (2, 8, 8, 512, 64),
            (2, 16, 16, 512, 64),
            (1, 8, 8, 1024, 64),
            (1, 8, 2, 1024, 64),
            (1, 4, 4, 2048, 64),
            (4, 8, 8, 256, 32),
            (1, 8, 8, 1024, 32),
            (4, 4, 4, 256, 128),
            (1, 4, 4, 1024, 128),
            (1, 4, 4, 2048, 128),
        ),
        unfused=((2, 8, 8, 512, 64), (1, 4, 4, 1024, 128)),
        stream_elements=tuple(1 << n for n in range(17, 23)),
        width=512,
        vocab=8192,
    )


def tasks_for(device: TorchDevice, grid: Grid) -> list[Task]:
    """Everything to measure on a device, the order of a pass."""
    tasks = list(_matmuls(grid))
    for cells, shape in _attention_cells(device, grid):
        tasks.append(Task(cells=cells, make=_attention(cells, shape)))
    tasks += [
        Task(cells=cells, make=make)
        for cells, make in stream_tasks(device, grid.attention_precision, grid.stream_elements, grid.width, grid.vocab)
    ]
    return tasks


# -- matmuls -----------------------------------------------------------------------------------------------------


def _matmuls(grid: Grid) -> Iterator[Task]:
    for precision in grid.precisions:
        for m, n, k in grid.matmul:
            for product in ("forward",) if precision == "fp8" else ("forward", "input gradient", "weight gradient"):
                # The gradients of a layer are products of other shapes: each row says its own.
                rows, columns, length = {
                    "forward": (m, n, k),
                    "input gradient": (m, k, n),
                    "weight gradient": (n, k, m),
                }[product]
                cells = {"op": "gemm", "direction": "fwd", "dtype": precision, "notes": product}
                cells |= {"m": str(rows), "n": str(columns), "k": str(length)}
                yield Task(cells=cells, make=_matmul(precision, product, (m, n, k)))


def _matmul(precision: str, product: str, shape: tuple[int, int, int]) -> Callable[[TorchDevice], Callable[[], object]]:
    m, n, k = shape

    def make(device: TorchDevice) -> Callable[[], object]:
        torch = device.torch
        if precision == "fp8":
            return _scaled_matmul(device, m, n, k)
        if device.kind == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        x, weight, gradient = (torch.randn(*size, device=device.kind, dtype=dtype) for size in ((m, k), (n, k), (m, n)))
        return {
            "forward": lambda: torch.nn.functional.linear(x, weight),
            "input gradient": lambda: gradient @ weight,
            "weight gradient": lambda: gradient.t() @ x,
        }[product]

    return make


def _scaled_matmul(device: TorchDevice, m: int, n: int, k: int) -> Callable[[], object]:
    torch = device.torch
    x = torch.randn(m, k, device=device.kind).to(torch.float8_e4m3fn)
    weight = torch.randn(n, k, device=device.kind).to(torch.float8_e4m3fn)
    scale = torch.ones((), device=device.kind)
    return lambda: torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


# -- attention ---------------------------------------------------------------------------------------------------


def _attention_cells(device: TorchDevice, grid: Grid) -> Iterator[tuple[dict[str, str], Sequence[int]]]:
    fused = [(name, shape) for name in _BACKENDS[device.kind] for shape in grid.attention]
    for backend, shape in [*fused, *(("MATH", shape) for shape in grid.unfused)]:
        library = _BACKENDS[device.kind].get(backend, "standard")
        batch, heads, kv_heads, tokens, size = shape
        for causal in (True, False):
            for direction in ("fwd", "bwd"):
                cells = {"op": "attention", "direction": direction, "dtype": grid.attention_precision}
                cells |= {"b": str(batch), "h": str(heads), "h_kv": str(kv_heads), "s": str(tokens), "d": str(size)}
                yield cells | {"causal": str(causal), "library": library}, shape


def _attention(cells: dict[str, str], shape: Sequence[int]) -> Callable[[TorchDevice], Callable[[], object]]:
    batch, heads, kv_heads, tokens, size = shape
    causal, backward = cells["causal"] == "True", cells["direction"] == "bwd"
    names = {library: backend for of_kind in _BACKENDS.values() for backend, library in of_kind.items()}

    def make(device: TorchDevice) -> Callable[[], object]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch = device.torch
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cells["dtype"], torch.float32)

        def tensor(number: int) -> Any:
            # As projections leave them: tokens before heads in memory.
            made = torch.randn(batch, tokens, number, size, device=device.kind, dtype=dtype)
            return made.transpose(1, 2).requires_grad_()

        q, k, v = tensor(heads), tensor(kv_heads), tensor(kv_heads)
        backend = getattr(SDPBackend, names.get(cells["library"], "MATH"))

        def forward() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=heads != kv_heads
                )

        if not backward:
            return forward
        out = forward()
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    return make
