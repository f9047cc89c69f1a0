"""Full-size models on clusters of a thousand ranks, on fake tensors: the same quantities, without a GPU.

Peak memory within 3 % too. What its prediction had left out: a pipeline stage under FSDP2 leaves everything that a
backward pass gathered, and adds up whole gradients in float32; the gradient of a table split by rows is made whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simllm.models import Model
from simllm.parallel.plan import Plan
from simllm.validation.execution.session import execute_fake, make_case

#: Model, world size, degrees, sequence length.
CASES = (
    ("llama-3-70b", 1024, {"tp": 8, "dp": 128}, 8192),
    ("llama-3.1-405b", 2048, {"tp": 8, "pp": 16, "dp": 16}, 8192),
    ("gpt3-175b", 1024, {"tp": 8, "pp": 16, "dp": 8}, 2048),
    (str(Path(__file__).parent / "mixtral-8x22b.json"), 1024, {"tp": 4, "pp": 8, "dp": 32, "ep": 8}, 4096),
)


@pytest.mark.parametrize(("name", "world", "degrees", "seq_len"), CASES, ids=lambda value: str(value).split("/")[-1])
def test_fake_cluster(name: str, world: int, degrees: dict[str, int], seq_len: int) -> None:
    spec = replace(Model.load(name).spec, vocab_multiple=128 * degrees["tp"])
    plan = Plan(
        **degrees,
        zero="3",
        precision="bf16",
        sequence_parallel=True,
        micro_batch_size=1,
        global_batch_size=(2 if "pp" in degrees else 1) * degrees["dp"],
        schedule="gpipe",
    )
    assert plan.num_gpus == world
    comparison = execute_fake(make_case(spec, plan, seq_len))
    off = {q.quantity: (q.rank, q.predicted, q.executed) for q in comparison.quantities if not q.ok}
    assert not off
    assert "peak memory" in {q.quantity for q in comparison.quantities}
    assert 1e8 < comparison.resident_bytes < 2e9
