"""Attention executed in each kind of context parallelism: results of one process, and the counts to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("torch")

from simllm.models import Model
from simllm.models.context import CpCommType
from simllm.models.graph import Implementation
from simllm.parallel.communication import block_collectives
from simllm.parallel.plan import Plan
from simllm.validation.execution.context import ContextCase, predict_context
from simllm.validation.execution.context_model import ContextModelCase, predict_context_model
from simllm.validation.execution.pool import Pool
from simllm.validation.execution.sizes import shrink

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


def model_case(name: str, kind: CpCommType, cp: int = RANKS, output: str = "again") -> ContextModelCase:
    inner = 2 if kind == "a2a+p2p" else 0
    plan = Plan(cp=cp, cp_comm_type=kind, cp_a2a=inner, micro_batch_size=2, global_batch_size=2)
    spec = shrink(Model.load(name).spec, layers=2)
    return ContextModelCase(spec=spec, plan=plan, seq_len=64, output=output)  # type: ignore[arg-type]


MODELS = {
    "ring": model_case("llama-2-7b", "p2p"),
    "ring of two, one key-value head, parallel block": model_case("falcon-7b", "p2p", cp=2),
    "gathered": model_case("llama-2-7b", "all_gather"),
    "heads": model_case("llama-2-7b", "a2a"),
    "heads by autograd, repeated": model_case("llama-3-70b", "a2a", output="kept"),
    "two levels": model_case("llama-3-70b", "a2a+p2p", output="kept"),
}


@contextmanager
def one_of(ranks: int, rank: int = 0) -> Iterator[None]:
    """This process as one rank of a group whose collectives return at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_model_send_compute_and_keep_what_is_counted(name: str) -> None:
    one = MODELS[name]
    counted = predict_context_model(one)
    with one_of(one.plan.cp):
        record = one.execute()
    assert record.sent == counted.sent
    assert record.flops == counted.flops
    assert record.saved == counted.saved


@pytest.mark.parametrize("name", ["ring", "heads"])
def test_models_have_the_gradients_of_one_process(pool: Pool, name: str) -> None:
    for record in pool.run(MODELS[name]):
        assert record.error < 1e-4


@pytest.mark.parametrize("method", ["ALL_GATHER", "ALL_TO_ALL"])
def test_pytorchs_own_context_parallelism_sends_what_its_stacks_say(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collectives of `torch.distributed.tensor.experimental.context_parallel`, whose kernels a CPU lacks."""
    import torch
    import torch.distributed as dist

    from simllm.validation.execution.recorder import CommunicationLog

    own = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
    for name in ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options", "_RotateMethod"):
        if not hasattr(own, name):
            pytest.skip(f"this PyTorch has no {name}")
    q, k, v = (torch.zeros(2, heads, 16, 16, dtype=torch.bfloat16) for heads in (8, 4, 4))

    def attend(query: torch.Tensor, *_: torch.Tensor, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(query), torch.zeros(query.shape[:-1])

    def gradients(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    monkeypatch.setattr(own._cp_options, "rotate_method", own._RotateMethod[method])
    logs = {"forward": CommunicationLog(), "backward": CommunicationLog()}
    with one_of(RANKS, rank=1):
        with logs["forward"]:
            out, lse = own._templated_ring_attention(dist.group.WORLD, 2, attend, q, k, v, is_causal=True)
        with logs["backward"]:
            rest = (torch.zeros_like(q), "grad_out", q, k, v, out.to(q.dtype), lse, True)
            own._templated_ring_attention_backward(dist.group.WORLD, 2, gradients, *rest)
    one = case("all_gather" if method == "ALL_GATHER" else "p2p")
    eager = Implementation(activation_bytes=2, context_steps="eager")
    counted = block_collectives(one.graph, one.layout, eager)
    for phase, log in logs.items():
        # PyTorch turns a buffer round by an all-to-all that sends to one rank only.
        hops = [c.size_bytes for c in counted if (c.op, c.phase) == ("send_recv", phase) for _ in range(c.count)]
        assert sorted(c.size_bytes for c in log.calls if c.op == "all_to_all") == sorted(hops)
        gathered = sum(c.size_bytes for c in counted if (c.op, c.phase) == ("all_gather", phase))
        assert sum(c.size_bytes for c in log.calls if c.op == "all_gather") == gathered
