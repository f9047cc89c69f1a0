"""Time of a dense, batched or grouped matmul on one accelerator.

The output is cut into tiles; a compute unit works on one tile at a time, so tiles run in waves. For a tile of
:math:`t_m \\times t_n` outputs and a split of *k* into *s* parts

.. math::
    T &= \\sum_g \\lceil m_g/t_m\\rceil\\lceil n/t_n\\rceil \\\\
    W &= (1-w)\\max(T s/U, 1) + w\\lceil T s/U\\rceil \\\\
    t_c &= W \\cdot 2 t_m t_n (k/s + k_0) \\,/\\, (e\\, p_{t}\\, P/U) \\\\
    t_b &= (\\text{operands} + \\text{results} + [s>1]\\, 8 s m n) / (\\beta B) \\\\
    t &= \\min_{tile, s} (t_c^4 + t_b^4)^{1/4} \\cdot (1 + d \\cdot \\text{decades of FLOP above } 10^{11}) + t_0

with peak *P*, memory bandwidth *B*, *U* compute units. Fitted per device and precision: *e* (rate), *w* (wave),
*k0* (overhead_k), *beta* (memory), *d* (droop), *t0* (launch). Every term of the minimum grows with m, n, k and falls
with P and B, so the time does too. Tiles and waves as in NVIDIA's Matrix Multiplication Background User's Guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log10

from simllm.errors import InputError

__all__ = ["MatmulModel", "MatmulTime", "even_groups", "matmul_parts", "matmul_time"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulModel:
    """A matmul curve bound to one device and precision, in plain SI numbers.

    Parameters
    ----------
    peak : float
        Peak rate times the sustained fraction, FLOP/s.
    bandwidth : float
        Memory bandwidth, bytes/s.
    units : int
        Compute units (SMs, CUs) that work on tiles; 1 where the device states none.
    rate, wave, memory, droop : float
        Fractions of the fitted curve.
    overhead_k : float
        Prologue and epilogue of a tile, in elements of k.
    launch_s : float
        Fixed cost of a launch, seconds.
    element_bytes, output_bytes : float
        Bytes of one operand and one result element.
    dynamic_bytes, dynamic_launch_s : float
        Traffic per element and launches of quantising an operand by separate kernels (maximum, then cast).
    cast_bytes : float
        Traffic per element of quantising an operand by one fused kernel.
    tiles : tuple of (int, int, float)
        Rows, columns and relative rate of each tile.
    splits : tuple of int
        Ways to split k.
    split_bytes : float
        Traffic per result element and split.
    join, droop_start, droop_decades : float
        Exponent that joins compute and memory; FLOP where the droop starts; decades it lasts.
    """

    peak: float
    bandwidth: float
    units: int
    rate: float
    wave: float
    overhead_k: float
    memory: float
    droop: float
    launch_s: float
    element_bytes: float
    output_bytes: float
    dynamic_bytes: float = 0.0
    dynamic_launch_s: float = 0.0
    cast_bytes: float = 0.0
    tiles: tuple[tuple[int, int, float], ...]
    splits: tuple[int, ...]
    split_bytes: float
    join: float
    droop_start: float
    droop_decades: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulTime:
    """A matmul's time and what it is made of, in seconds.

    ``total_s = kernel_s + launch_s + quantise_s``; ``compute_s`` and ``memory_s`` are what the kernel would take if
    only arithmetic or only memory mattered, for the tile it chose.
    """

    kernel_s: float
    launch_s: float
    quantise_s: float
    compute_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        """Time of the matmul with its launch and its quantisation."""
        return self.kernel_s + self.launch_s + self.quantise_s


def even_groups(tokens: int, groups: int) -> tuple[tuple[int, int], ...]:
    """Tokens spread as evenly as they go: pairs of (how many groups, rows of each).

    >>> even_groups(10, 4)
    ((2, 3), (2, 2))
    """
    rows, more = divmod(tokens, groups)
    return tuple((count, size) for count, size in ((more, rows + 1), (groups - more, rows)) if count and size)


def matmul_parts(
    model: MatmulModel, rows: Sequence[tuple[int, int]], n: int, k: int, quantise: str = "none"
) -> MatmulTime:
    """Time of one kernel that multiplies groups of ``m_g x k`` by ``k x n``.

    Parameters
    ----------
    model : MatmulModel
        The device and precision.
    rows : sequence of (int, int)
        Pairs of how many groups and their rows m; one pair ``(1, m)`` is a plain matmul, ``(count, m)`` a batched one.
    n, k : int
        Columns of the result and length of the dot products.
    quantise : {"none", "cast", "dynamic"}
        How the left operand is quantised: before, by one fused kernel, or by separate kernels as inference libraries
        do.
    """
    m = groups = 0
    for count, size in rows:
        if size > 0 and count > 0:
            m += count * size
            groups += count
    if m == 0 or n <= 0 or k <= 0:
        return MatmulTime(kernel_s=0.0, launch_s=0.0, quantise_s=0.0, compute_s=0.0, memory_s=0.0)
    units, wave, join = model.units, model.wave, model.join
    per_bandwidth = 1.0 / (model.bandwidth * model.memory)
    seconds_per_flop = units / (model.peak * model.rate)
    outputs = m * n
    base = (model.element_bytes * k * (m + groups * n) + model.output_bytes * outputs) * per_bandwidth
    best = compute = memory = float("inf")
    counted: dict[int, int] = {}
    for tile_m, tile_n, share in model.tiles:
        down = counted.get(tile_m)
        if down is None:
            down = counted[tile_m] = sum(count * -(-size // tile_m) for count, size in rows)
        tiles = down * -(-n // tile_n)
        step = 2.0 * tile_m * tile_n * seconds_per_flop / share
        for split in model.splits:
            if split > 1 and tiles >= units:  # Enough tiles to fill the device: splitting only adds traffic.
                break
            ratio = tiles * split / units
            waves = wave * ceil(ratio) + (1.0 - wave) * (ratio if ratio > 1.0 else 1.0)
            at_peak = waves * step * (k / split + model.overhead_k)
            moved = base if split == 1 else base + model.split_bytes * split * outputs * per_bandwidth
            # The larger of the two bounds the joined time from below: most tiles need no powers.
            if at_peak >= best or moved >= best:
                continue
            joined: float = (at_peak**join + moved**join) ** (1.0 / join)
            if joined < best:
                best, compute, memory = joined, at_peak, moved
    if model.droop:
        decades = log10(2.0 * outputs * k / model.droop_start)
        if decades > 0.0:
            slower = 1.0 + model.droop * min(decades, model.droop_decades)
            best *= slower
            compute *= slower
    quantise_s = 0.0
    if quantise == "cast":
        quantise_s = model.cast_bytes * m * k * per_bandwidth
    elif quantise == "dynamic":
        quantise_s = model.dynamic_bytes * m * k * per_bandwidth + model.dynamic_launch_s
    elif quantise != "none":
        raise InputError(f"quantise={quantise!r} is not known; use none, cast or dynamic")
    return MatmulTime(kernel_s=best, launch_s=model.launch_s, quantise_s=quantise_s, compute_s=compute, memory_s=memory)


def matmul_time(model: MatmulModel, m: int, n: int, k: int, count: int = 1, quantise: str = "none") -> float:
    """Seconds for ``count`` matmuls of ``m x k`` by ``k x n`` in one batched kernel; 0 if any size is 0.

    Parameters
    ----------
    model : MatmulModel
        The device and precision.
    m, n, k : int
        Rows and columns of the result, and length of the dot products.
    count : int
        Matmuls in the batch; their tiles fill the device together.
    quantise : {"none", "cast", "dynamic"}
        See `matmul_parts`.
    """
    return matmul_parts(model, ((count, m),), n, k, quantise).total_s
