"""Attention executed in each kind of context parallelism: results of one process, and the counts to the byte."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from simllm.models.context import CpCommType
from simllm.parallel.plan import Plan
from simllm.validation.execution.context import ContextCase, predict_context
from simllm.validation.execution.pool import Pool

RANKS = 4


def case(kind: CpCommType, kv_heads: int = 4, **more: str) -> ContextCase:
    inner = 2 if kind == "a2a+p2p" else 0
    plan = Plan(cp=RANKS, cp_comm_type=kind, cp_a2a=inner, micro_batch_size=2, global_batch_size=2)
    return ContextCase(plan=plan, heads=8, kv_heads=kv_heads, head_dim=16, seq_len=64, **more)  # type: ignore[arg-type]


CASES = {
    "p2p": case("p2p"),
    "p2p, one key-value head": case("p2p", kv_heads=1),
    "all_gather": case("all_gather"),
    "a2a": case("a2a"),
    "a2a by autograd": case("a2a", output="kept"),
    "a2a by autograd, repeated heads": case("a2a", kv_heads=2, output="kept"),
    "a2a+p2p by autograd": case("a2a+p2p", output="kept"),
}


@pytest.mark.parametrize("name", CASES)
def test_executed_attention_is_as_counted(pool: Pool, name: str) -> None:
    counted = predict_context(CASES[name])
    for rank, record in enumerate(pool.run(CASES[name])):
        assert record.error < 1e-5, rank
        assert record.sent == counted.sent, rank
        assert record.flops == counted.flops, rank
        assert record.saved == counted.saved, rank


def test_counts_by_hand() -> None:
    # 16 tokens a rank of two sequences, 8 heads of 16, 4 for keys and values, 4 bytes: 16,384 bytes of queries.
    q, kv = 2 * 16 * 8 * 16 * 4, 2 * 16 * 4 * 16 * 4
    ring, gathered, traded = (predict_context(CASES[name]) for name in ("p2p", "all_gather", "a2a"))
    assert ring.sent == {("send", "forward"): 3 * 2 * kv, ("send", "backward"): 3 * 4 * kv}
    assert gathered.sent == {
        ("all_gather", "forward"): 4 * 2 * kv,
        ("all_gather", "backward"): 4 * 2 * kv,
        ("reduce_scatter", "backward"): 4 * 2 * kv,
    }
    assert traded.sent == {("all_to_all", "forward"): 2 * q + 2 * kv, ("all_to_all", "backward"): 3 * q + 2 * kv}
    # Two products of 2 x 16 FLOPs for a pair, 16 x 64 pairs, 8 heads, two sequences; a ring leaves out three eighths.
    assert gathered.flops["forward"] == traded.flops["forward"] == 2 * 2 * 16 * 16 * 64 * 8 * 2
    assert ring.flops["forward"] == gathered.flops["forward"] * 5 / 8
