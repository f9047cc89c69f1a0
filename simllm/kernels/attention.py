"""Time of attention: fused (FlashAttention 1-4, cuDNN) and unfused.

Fused attention gives each compute unit a tile of queries of one head, which walks over the keys it may see. With *f*
the share of the full square that the mask keeps, a tile of *r* queries sees *f* |k| keys on average:

.. math::
    t_c &= \\max(b h \\lceil s_q/r\\rceil + w U, U)\\; r\\, \\left(\\frac{f s_k}{1 - 4(1-\\mu) f(1-f)} + s_0\\right)
        4\\, c(d)/P \\\\
    t &= t_0 + \\big[t_c^4 + (\\text{bytes}/(\\beta B))^4\\big]^{1/4}

*c(d)* = head size / fitted rate, linear between the fitted head sizes: time per score is matmul time (grows with the
head size) plus softmax time (does not). *s0* (overhead_tokens) pays for the start and end of a tile and for the
half-masked blocks on a diagonal. *w* (tail_tiles) is how much longer the last of the *U* compute units works than the
mean, in tiles: causal tiles differ in length, and not every kernel schedules the long ones first. *mu* (masked) is the
rate under a causal mask over the rate without one, on long sequences; the loss fades towards full and empty masks.
Backward does 2.5 times the matmul work (five matmuls for two) at its own fitted rate.

Unfused attention is two batched matmuls (four backward) over the full square, whatever the mask, plus the traffic of
softmax and dropout per score.
"""

from __future__ import annotations

from dataclasses import dataclass

from simllm.kernels.matmul import MatmulModel, matmul_time
from simllm.kernels.memory import memory_bound_time

__all__ = ["AttentionModel", "flash_attention_time", "unfused_attention_time"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionModel:
    """One fused attention kernel bound to one device, in plain SI numbers.

    Parameters
    ----------
    peak : float
        Peak rate of the 16-bit precision, FLOP/s.
    bandwidth, efficiency : float
        Memory bandwidth (bytes/s) and the share streaming kernels reach.
    units : int
        Compute units that work on tiles.
    costs : tuple of (float, float)
        Head size and head size / rate, by rising head size.
    overhead_tokens : float
        Keys' worth of fixed cost per tile.
    tail_tiles : float
        Tiles' worth of waiting for the last compute unit.
    masked : float
        Rate under a mask that keeps half, over the rate without a mask.
    tile_rows : int
        Queries per tile.
    launch_s : float
        Fixed cost of a launch, seconds.
    element_bytes : float
        Bytes of one element of q, k, v and the output.
    join : float
        Exponent that joins compute and memory.
    work : float
        Matmul work relative to forward: 1, or 2.5 backward.
    backward : bool
        Whether gradients are read and written too.
    padding : tuple of (int, int)
        Head sizes are padded: (largest head size it holds for, multiple).
    """

    peak: float
    bandwidth: float
    efficiency: float
    units: int
    costs: tuple[tuple[float, float], ...]
    overhead_tokens: float
    tail_tiles: float
    masked: float
    tile_rows: int
    launch_s: float
    element_bytes: float
    join: float
    work: float
    backward: bool
    padding: tuple[tuple[int, int], ...]


def flash_attention_time(
    model: AttentionModel,
    batch: int,
    heads: int,
    kv_heads: int,
    seq_q: int,
    seq_k: int,
    head_dim: int,
    v_head_dim: int,
    work_fraction: float,
) -> float:
    """Seconds of one fused attention kernel; 0 if any size is 0.

    Parameters
    ----------
    model : AttentionModel
        The kernel, with its direction.
    batch, heads, kv_heads : int
        Sequences, query heads and key-value heads on this device.
    seq_q, seq_k : int
        Queries and keys of each sequence.
    head_dim, v_head_dim : int
        Size of a query (and key) head and of a value head.
    work_fraction : float
        Share of the ``seq_q x seq_k`` square that the mask keeps: 1 full, 0.5 causal.
    """
    if min(batch, heads, kv_heads, seq_q, seq_k, head_dim, v_head_dim) <= 0 or work_fraction <= 0:
        return 0.0
    size = (_padded(head_dim, model.padding) + _padded(v_head_dim, model.padding)) / 2
    units = model.units
    tiles = max(batch * heads * -(-seq_q // model.tile_rows) + model.tail_tiles * units, units)
    rate = 1.0 - 4.0 * (1.0 - model.masked) * work_fraction * (1.0 - work_fraction)
    scores = tiles * model.tile_rows * (work_fraction * seq_k / rate + model.overhead_tokens)
    compute = scores * 4.0 * _cost(size, model.costs) * model.work / model.peak
    queries = batch * seq_q * heads * (head_dim + v_head_dim)
    keys = batch * seq_k * kv_heads * (head_dim + v_head_dim)
    # Forward reads q, k, v and writes o. Backward reads q, k, v, o and the gradient of o, writes those of q, k, v.
    elements = 2 * (queries + keys) if model.backward else queries + keys
    memory = elements * model.element_bytes / (model.bandwidth * model.efficiency)
    join = model.join
    joined: float = (compute**join + memory**join) ** (1.0 / join)
    return model.launch_s + joined


def _padded(size: int, padding: tuple[tuple[int, int], ...]) -> int:
    for largest, multiple in padding:
        if size <= largest:
            return -(-size // multiple) * multiple
    return size


def _cost(size: float, costs: tuple[tuple[float, float], ...]) -> float:
    """Head size / rate: linear between the fitted head sizes, at the rate of the nearest one beyond them."""
    low = costs[0]
    if size <= low[0]:
        return size * low[1] / low[0]
    for high in costs[1:]:
        if size <= high[0]:
            return low[1] + (high[1] - low[1]) * (size - low[0]) / (high[0] - low[0])
        low = high
    return size * low[1] / low[0]


def unfused_attention_time(
    model: MatmulModel,
    batch: int,
    heads: int,
    seq_q: int,
    seq_k: int,
    head_dim: int,
    v_head_dim: int,
    score_bytes: float,
    bandwidth: float,
    efficiency: float,
    backward: bool = False,
) -> float:
    """Seconds of unfused attention: batched matmuls plus the traffic of softmax, mask and dropout.

    Parameters
    ----------
    model : MatmulModel
        The 16- or 32-bit matmul curve.
    batch, heads, seq_q, seq_k, head_dim, v_head_dim : int
        As in `flash_attention_time`; keys and values are repeated for every query head.
    score_bytes : float
        Bytes moved per score beside the matmuls' own operands and results.
    bandwidth, efficiency : float
        Memory bandwidth (bytes/s) and the share elementwise kernels reach.
    backward : bool
        Backward: gradients of values, probabilities, queries and keys, four matmuls.
    """
    count = batch * heads
    if min(count, seq_q, seq_k, head_dim, v_head_dim) <= 0:
        return 0.0
    scores = matmul_time(model, seq_q, seq_k, head_dim, count)
    values = matmul_time(model, seq_q, v_head_dim, seq_k, count)
    if backward:
        # dV = P^T dO and dP = dO V^T; dQ = dS K and dK = dS^T Q.
        scores = matmul_time(model, seq_q, seq_k, v_head_dim, count) + matmul_time(model, seq_q, head_dim, seq_k, count)
        values = matmul_time(model, seq_k, v_head_dim, seq_q, count) + matmul_time(model, seq_k, head_dim, seq_q, count)
    traffic = memory_bound_time(count * seq_q * seq_k * score_bytes, bandwidth, efficiency, model.launch_s)
    return scores + values + traffic
