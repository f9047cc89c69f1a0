"""What an operator asks of a machine, in shapes: matrix products, attention, and bytes to move.

The kernels price these shapes; the counts add up their FLOPs. A multiply and an add are two FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AttentionWork", "Gemm", "GroupedGemm", "Stream", "Work", "attended_pairs"]


class Gemm(NamedTuple):
    """``times`` independent products (m x k) @ (k x n)."""

    m: int
    n: int
    k: int
    times: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of the products."""
        return 2 * self.m * self.n * self.k * self.times

    @property
    def masked_flops(self) -> int:
        """The same: no mask applies."""
        return self.flops


class GroupedGemm(NamedTuple):
    """One product (tokens x k) @ (k x n) whose rows are spread evenly over ``groups`` weight matrices."""

    tokens: int
    n: int
    k: int
    groups: int

    @property
    def flops(self) -> int:
        """FLOPs of the product."""
        return 2 * self.tokens * self.n * self.k

    @property
    def masked_flops(self) -> int:
        """The same: no mask applies."""
        return self.flops


class AttentionWork(NamedTuple):
    """Scores and weighted values of one attention, or their gradients.

    ``pairs`` is the number of (query, key) pairs per sequence and head that the mask keeps, of
    ``seq_q * seq_k``; ``times`` such kernels follow each other. ``products`` counts the matrix products over the
    scores: 2 forward, 4 backward, half of them over ``head_dim`` and half over ``v_head_dim``.
    """

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    v_head_dim: int
    pairs: float
    products: int
    times: int = 1

    @property
    def flops(self) -> int:
        """FLOPs over the full square of scores."""
        width = self.head_dim + self.v_head_dim
        return self.batch * self.heads * self.seq_q * self.seq_k * width * self.products * self.times

    @property
    def masked_flops(self) -> int:
        """FLOPs over the pairs that the mask keeps."""
        width = self.head_dim + self.v_head_dim
        return round(self.batch * self.heads * self.pairs * width * self.products * self.times)


class Stream(NamedTuple):
    """Bytes read and written by a bandwidth-bound kernel; ``kernels`` launches.

    ``flops``: of a product or convolution inside the kernel; everything else counts as zero.
    """

    bytes: float
    kernels: int = 1
    flops: int = 0

    @property
    def masked_flops(self) -> int:
        """The same: no mask applies."""
        return self.flops


Work = Gemm | GroupedGemm | AttentionWork | Stream


def attended_pairs(mask: str, seq_q: int, seq_k: int, window: int | None = None, prefix: int = 0) -> int:
    """Number of (query, key) pairs that a mask keeps in one sequence.

    Parameters
    ----------
    mask : {"causal", "chunked", "prefix", "bidirectional", "cross"}
    seq_q, seq_k : int
        Queries and keys; for causal and prefix masks they are the same sequence.
    window : int, optional
        A query sees at most this many keys, itself included; with ``chunked`` those of its own chunk of this length.
    prefix : int
        Tokens that all see each other (prefix mask).

    Examples
    --------
    >>> attended_pairs("causal", 4, 4), attended_pairs("bidirectional", 4, 4)
    (10, 16)
    >>> attended_pairs("causal", 4, 4, window=2), attended_pairs("prefix", 4, 4, prefix=2)
    (7, 11)
    >>> attended_pairs("chunked", 5, 5, window=2)
    7
    """
    if mask in ("bidirectional", "cross"):
        if window is None or window >= seq_k:
            return seq_q * seq_k
        # A symmetric local window: half of it on each side, cut at the two ends.
        half = window // 2
        return sum(min(seq_k - 1, i + half) - max(0, i - half) + 1 for i in range(seq_q))
    reach = seq_k if window is None else min(window, seq_k)
    if mask == "chunked":
        whole, rest = divmod(seq_k, reach)
        return whole * reach * (reach + 1) // 2 + rest * (rest + 1) // 2
    causal = reach * (reach + 1) // 2 + (seq_k - reach) * reach
    if mask == "causal":
        return causal
    if mask == "prefix":
        prefix = min(prefix, seq_k)
        return causal + prefix * (prefix - 1) // 2
    raise ValueError(f"unknown mask {mask!r}")
