"""Every strategy once, executed by gloo processes: all quantities as predicted, gradients as of one process.

Disagreements that these comparisons found, and that the engine now has right:

- cross-entropy over a vocabulary that is split reduces three numbers of every token (maximum, sum, label's logit);
- the rotated part of a latent key is whole on every tensor-parallel rank: gathered with sequence parallelism, and its
  gradient reduced;
- an interleaved pipeline with one group of micro-batches alternates as with several.

What PyTorch does in its own way is a named term of the prediction, not a tolerance: `Comparison.terms`.
"""

from __future__ import annotations

import pytest

from simllm.models import Model
from simllm.validation.execution.compare import compare
from simllm.validation.execution.matrix import STRATEGIES, matrix_case
from simllm.validation.execution.pool import Pool
from simllm.validation.execution.sizes import shrink

CASES = (
    ("llama-3-70b", "one rank"),
    ("deepseek-v3", "one rank, recompute selective"),
    ("llama-3-70b", "one rank, recompute full"),
    ("gpt3-175b", "DDP 2"),
    ("mixtral-8x7b", "ZeRO-1 2"),
    ("bloom-176b", "ZeRO-2 2"),
    ("falcon-7b", "ZeRO-3 2"),
    ("llama-3-70b", "ZeRO-3 2, bf16"),
    ("llama-3-70b", "ZeRO-3 2, recompute full"),
    ("llama-3-70b", "ZeRO-3 2, offload"),
    ("gpt3-175b", "HSDP 2x2"),
    ("falcon-7b", "TP 2"),
    ("deepseek-v3", "TP 2, SP"),
    ("t5-base", "TP 2, SP"),
    ("t5-base", "ZeRO-3 2"),
    ("llama-3-70b", "TP 2 x DP 2"),
    ("gpt3-175b", "TP 2 x ZeRO-3 2"),
    ("llama-3-70b", "PP 2, GPipe"),
    ("gpt3-175b", "PP 2, 1F1B"),
    ("llama-3-70b", "PP 2 x 2, interleaved"),
    ("bloom-176b", "PP 2 x 2, interleaved, one group"),
    ("llama-3-70b", "PP 2 x 2, looped BFS"),
    ("llama-3-70b", "PP 2 x 2, interleaved zero bubble"),
    ("gpt3-175b", "PP 2 x 2, ZBV, 8 micro-batches"),
    ("mixtral-8x7b", "PP 2 x 2, DualPipeV"),
    ("deepseek-v3", "PP 2 x 2 x TP 2, ZBV"),
    ("bloom-176b", "PP 2 x DDP 2"),
    ("gpt3-175b", "PP 2 x 2 x DDP 2, interleaved"),
    ("llama-3-70b", "PP 2 x ZeRO-3 2"),
    ("falcon-7b", "PP 2 x TP 2, SP"),
    ("mixtral-8x7b", "EP 2 x DDP 2"),
    ("mixtral-8x7b", "EP 2 x ZeRO-3 4"),
    ("deepseek-v3", "EP 2 x TP 2 x ZeRO-3 2"),
    ("mixtral-8x7b", "TP 2 x ZeRO-3 2, recompute full"),
    ("mixtral-8x7b", "HSDP 2x2, bf16"),
)


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_execution_is_as_predicted(pool: Pool, model: str, strategy: str) -> None:
    case = matrix_case(shrink(Model.load(model).spec), STRATEGIES[strategy])
    comparison = compare(case, pool.run(case))
    off = {q.quantity: (q.rank, q.predicted, q.executed) for q in comparison.quantities if not q.ok}
    assert not off
    names = {q.quantity for q in comparison.quantities}
    assert {"parameters", "FLOPs of products and attention", "peak memory", "gradients against one process"} <= names
    if case.plan.pp > 1:
        assert {"pipeline order", "micro-batches in flight"} <= names


def test_a_peak_is_the_same_every_time(pool: Pool) -> None:
    """Gloo's threads drop a collective's tensors when they next run: the recorder waits for that."""
    case = matrix_case(shrink(Model.load("falcon-7b").spec), STRATEGIES["ZeRO-3 2, recompute selective"])
    assert len({record.peak_bytes for _ in range(4) for record in pool.run(case)}) == 1


def test_a_wrong_prediction_is_seen(pool: Pool) -> None:
    """The comparison has teeth: held against another plan, the same execution is off."""
    spec = shrink(Model.load("llama-3-70b").spec)
    executed, other = (matrix_case(spec, STRATEGIES[name]) for name in ("ZeRO-3 2", "DDP 2"))
    comparison = compare(other, pool.run(executed))
    off = {q.quantity for q in comparison.quantities if not q.ok}
    assert {"parameters", "persistent memory: optimizer", "peak memory"} <= off
    assert any("all_gather" in name for name in off)
