"""One transformer layer against published timings of a layer: kernels and collectives judged without a whole run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from simllm.hardware import load_cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan
from simllm.training import Training
from simllm.training.step import Step

PUBLISHED = Path(__file__).parents[1] / "published" / "layer_times.csv"
#: Experiments of Korthikanti 2022, table 4: sequence parallelism, recomputation.
EXPERIMENTS = {
    "baseline no recompute": (False, "none"),
    "sequence parallel": (True, "none"),
    "baseline full recompute": (False, "full"),
    "selective recompute": (False, "selective"),
    "selective + sequence": (True, "selective"),
}


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["source"] == "Korthikanti Table 4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The 22B model of the paper: 6144 wide, 64 heads."""
    config = {"model_type": "gpt2", "n_embd": 6144, "n_head": 64, "n_layer": 48, "n_positions": 2048}
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(config | {"vocab_size": 51200, "architectures": ["GPT2LMHeadModel"]}))
    return Model.load(str(path))


@pytest.mark.parametrize("row", published(), ids=lambda row: row["experiment"])
def test_layer_of_the_22b_model(row: dict[str, str], model: Model) -> None:
    """TP 8, 4 sequences of 2048, on A100: forward and backward within 10 %, the sum within 3 %."""
    sequence_parallel, recompute = EXPERIMENTS[row["experiment"]]
    plan = Plan(
        tp=8,
        micro_batch_size=4,
        global_batch_size=4,
        sequence_parallel=sequence_parallel,
        recompute=Recompute.parse(recompute),
        precision="fp16",
    )
    step = Step(model, load_cluster("dgx-a100", 8), plan, Training(seq_len=2048, stack="megatron-lm"))
    cost = step.engine.block(step.graph.layers[0], step.layout, step.groups, plan.recompute, True)
    forward, backward = cost.forward.total * 1e3, cost.backward.total * 1e3
    assert forward == pytest.approx(float(row["forward_ms"]), rel=0.10)
    assert backward == pytest.approx(float(row["backward_ms"]), rel=0.10)
    assert forward + backward == pytest.approx(float(row["combined_ms"]), rel=0.03)


def test_a_weight_gradient_quantises_nothing_again(model: Model) -> None:
    """In fp8 a projection casts its input forward and the output's gradient backward: two casts for three products."""
    plan = Plan(tp=8, micro_batch_size=4, global_batch_size=4, precision="fp8")
    step = Step(model, load_cluster("dgx-h100", 8), plan, Training(seq_len=2048))
    operator = next(o for o in step.graph.layers[0].operators if o.name == "up")
    kernels = step.engine.kernels
    (product,) = operator.forward(step.layout, step.engine.impl)
    (gradient,) = operator.backward_input(step.layout, step.engine.impl)
    weight = operator.backward_weight(step.layout, step.engine.impl)[0]
    casts = 0.0
    for work, quantise in ((product, None), (gradient, None), (weight, "none")):
        parts = kernels.matmul_parts(work.m, work.n, work.k, "fp8", 1, quantise)
        casts += parts.quantise_s
        assert (parts.quantise_s == 0.0) == (quantise == "none")
    per_byte = kernels.accelerator.memory_bandwidth * kernels.matmul_entry("fp8").memory.si("fraction")
    # Read 2 bytes, write the two copies of 1 byte: 4 bytes an element of the input and of the output's gradient.
    assert casts == pytest.approx(4 * product.m * (product.k + product.n) / per_byte)
    total = sum(cost.matmul for cost in step.engine.operator_backward(operator, step.layout))
    assert total == pytest.approx(
        kernels.matmul(gradient.m, gradient.n, gradient.k, "fp8")
        + kernels.matmul(weight.m, weight.n, weight.k, "fp8", 1, "none")
    )
