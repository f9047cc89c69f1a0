"""What context parallelism makes of attention on one rank: the kernels it runs as, and the copies around them.

Tokens of a sequence are split over the ranks of a context group. Attention needs the keys of all of them, in one of
four ways (``cp_comm_type`` of Megatron-Core):

- ``p2p``: keys and values go round a ring, and a rank attends to one part of them after the other (Liu 2023,
  arXiv:2310.01889). Under a causal mask every rank has one early and one late piece of the sequence, so that all have
  the same work: its own part under the mask, then, of every other part, half of the queries against all keys or all
  queries against half of the keys (TransformerEngine, PyTorch; Brandon 2023, arXiv:2311.09431).
- ``all_gather``: keys and values of the whole sequence are gathered before the kernel runs on the rank's own queries
  (Llama 3, arXiv:2407.21783, section 3.3.2).
- ``a2a``: an all-to-all trades tokens for heads, the kernel sees whole sequences of some heads, and another one brings
  the output back (DeepSpeed Ulysses, arXiv:2309.14509).
- ``a2a+p2p``: both, heads among near ranks and the ring over far ones (USP, Fang 2024, arXiv:2405.07719).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from simllm.models.graph import Implementation, Layout
from simllm.models.work import AttentionWork, Stream

__all__ = [
    "CP_COMM_TYPES",
    "AttentionShape",
    "ContextBytes",
    "CpCommType",
    "attention_kernels",
    "context_copies",
    "repeats",
]

CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
CP_COMM_TYPES: tuple[CpCommType, ...] = ("p2p", "all_gather", "a2a", "a2a+p2p")

# A tensor that is exchanged is brought into the order of its receivers before and into that of its tokens after: two
# copies, each a read and a write.
_EXCHANGE_PASSES = 4
# Adding what a step of attention found to what was there: two reads and a write in one kernel (TransformerEngine).
_MERGE_PASSES = 3
# As single operators in float32 (PyTorch): the output of a step widened (2 + 4 bytes), its difference to the sum (12),
# weighted (8), taken off the sum (12); in the backward pass one addition (10) to the gradient of the queries, and for
# keys and values their parts put into the buffer that is sent (4), the addition (10) and the gradients' buffer (8).
_EAGER_MERGE_BYTES, _EAGER_MERGE_KERNELS = 38, 4
_EAGER_QUERY_BYTES, _EAGER_KEY_BYTES, _EAGER_BACKWARD_KERNELS = 10, 22, 5
# Gathered keys and values are put in the order of the sequence: a read and a write. Backward too, and their gradients
# are cleared, added to and brought back into the order of the ranks.
_GATHER_PASSES = 2
_SCATTER_PASSES = 6


class AttentionShape(NamedTuple):
    """One attention, not split by context parallelism: ``pairs`` of a sequence and head that the mask keeps."""

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    v_head_dim: int
    pairs: float

    @property
    def triangle(self) -> bool:
        """Whether every query sees all keys up to its own."""
        return self.seq_q == self.seq_k and self.pairs == self.seq_q * (self.seq_q + 1) / 2

    @property
    def square(self) -> bool:
        """Whether every query sees every key."""
        return self.pairs == self.seq_q * self.seq_k


class ContextBytes(NamedTuple):
    """Bytes of queries, keys, values and output on a rank; keys and values as often as their heads are repeated."""

    q: float
    k: float
    v: float
    out: float


def repeats(kv_heads: int, cp_heads: int) -> int:
    """How often a key-value head is sent where there are fewer of them than ranks that trade tokens for heads.

    >>> repeats(8, 4), repeats(2, 8)
    (1, 4)
    """
    return max(1, cp_heads // kv_heads)


def attention_kernels(
    shape: AttentionShape, layout: Layout, products: int, in_steps: bool
) -> tuple[AttentionWork, ...]:
    """The attention kernels of one rank, one after the other; those of all ranks together see every pair once.

    In steps there is a kernel for each part of the keys. Of a step where some ranks have half of the queries and others
    half of the keys the former is taken, whose tiles fill the device less. Windows and prefixes are taken as one kernel
    over the rank's queries.

    >>> shape = AttentionShape(1, 8, 2, 8192, 8192, 128, 128, 8192 * 8193 / 2)
    >>> [(k.seq_q, k.seq_k, k.times) for k in attention_kernels(shape, Layout(cp=4), 2, in_steps=True)]
    [(2048, 2048, 1), (1024, 2048, 3)]
    >>> [(k.heads, k.kv_heads, k.seq_q) for k in attention_kernels(shape, Layout(cp=4, cp_heads=4), 2, in_steps=False)]
    [(2, 1, 8192)]
    """
    heads, kv_heads = shape.heads // layout.cp_heads, max(1, shape.kv_heads // layout.cp_heads)
    parts = layout.cp_parts
    queries, keys = shape.seq_q // parts, shape.seq_k // parts

    def kernel(seq_q: int, seq_k: int, pairs: float, times: int = 1) -> AttentionWork:
        sizes = (seq_q, seq_k, shape.head_dim, shape.v_head_dim)
        return AttentionWork(shape.batch, heads, kv_heads, *sizes, pairs, products, times)

    if in_steps and shape.square:
        return (kernel(queries, keys, queries * keys, parts),)
    if in_steps and shape.triangle:
        own = kernel(queries, keys, queries * (queries + 1) / 2)
        return own, kernel(-(-queries // 2), keys, queries * keys / 2, parts - 1)
    return (kernel(queries, shape.seq_k, shape.pairs / parts),)


def context_copies(
    sizes: ContextBytes, shape: AttentionShape, layout: Layout, impl: Implementation, backward: bool, in_steps: bool
) -> tuple[Stream, ...]:
    """What is copied and added around the attention kernels of one rank."""
    found, keys, steps = [], sizes.k + sizes.v, layout.cp_parts - 1
    if layout.cp_heads > 1:
        twice = backward and impl.context_output == "again"
        moved = sizes.q + keys + sizes.out * (2 if twice else 1)
        found.append(Stream(_EXCHANGE_PASSES * moved, 2 * (5 if twice else 4)))
    if steps and not in_steps:
        passes = _GATHER_PASSES + (_SCATTER_PASSES if backward else 0)
        found.append(Stream(passes * layout.cp_parts * keys, passes))
    elif steps and impl.context_steps == "fused":
        share = 0.5 if shape.triangle else 1.0
        merged = share * sizes.q + keys if backward else share * sizes.out
        found.append(Stream(_MERGE_PASSES * steps * merged, steps * (2 if backward else 1)))
    elif steps:
        element = impl.activation_bytes
        ahead = _EAGER_MERGE_BYTES * sizes.out / element
        behind = (_EAGER_QUERY_BYTES * sizes.q + _EAGER_KEY_BYTES * keys) / element
        kernels = _EAGER_BACKWARD_KERNELS if backward else _EAGER_MERGE_KERNELS
        found.append(Stream(steps * (behind if backward else ahead), steps * kernels))
    return tuple(found)
