"""States per parameter: PyTorch's own optimizers, and the published memory tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.graph import Axis, Weight
from simllm.parallel import Plan
from simllm.parallel.states import OPTIMIZERS, optimizer_named, state_bytes
from simllm.training import Estimate, Training, estimate
from tests.strategies import gpt_spec

TABLE = Path(__file__).parents[1] / "published" / "zero_memory.csv"


def rows(source: str) -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["source"].startswith(source)]


def weight(*shape: int) -> Weight:
    return Weight("w", tuple(Axis("fixed", size) for size in shape), "mlp")


TORCH: list[tuple[str, str, dict[str, Any]]] = [
    ("sgd", "SGD", {"lr": 0.1}),
    ("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    ("adam", "AdamW", {}),
    ("adafactor", "Adafactor", {}),
    ("muon", "Muon", {}),
]


@pytest.mark.parametrize(("name", "kind", "arguments"), TORCH)
@pytest.mark.parametrize("shape", [(64, 32), (8, 300), (32,)])
def test_moments_equal_those_of_torch(name: str, kind: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    import torch

    if kind == "Muon" and len(shape) == 1:
        kind, arguments = "AdamW", {}  # torch's Muon refuses vectors; they go to Adam
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.ones(shape)
    optimizer = getattr(torch.optim, kind)([parameter], **arguments)
    optimizer.step()
    state = optimizer.state[parameter]
    # The step counter is one scalar a tensor, kept on the host by fused and foreach implementations.
    kept = sum(
        value.numel() * value.element_size() for key, value in state.items() if torch.is_tensor(value) and key != "step"
    )
    assert optimizer_named(name).moments(weight(*shape), shape, 4) == kept


def test_bf16_states_equal_those_of_torch() -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    kept = [value.element_size() for key, value in optimizer.state[parameter].items() if key != "step"]
    states = Training(seq_len=1, master_weights=False).states("bf16")
    assert (states.parameter, states.gradient, states.master, states.moment_element) == (2, 2, 0, 2)
    assert OPTIMIZERS["adam"].moments(weight(64, 32), (64, 32), 2) == sum(kept) * 64 * 32


def test_8_bit_adam() -> None:
    moments = OPTIMIZERS["adam-8bit"].moments
    assert moments(weight(4095), (4095,), 4) == 8 * 4095
    assert moments(weight(64, 64), (64, 64), 4) == 2 * (4096 + 4 * 16)
    assert moments(weight(1000, 1001), (1000, 1001), 4) == 2 * (1001000 + 4 * 3911)


def run(zero: str, dp: int, tp: int = 1, training: Training | None = None) -> Estimate:
    model = Model.load("olmo-7b")  # its vocabulary needs no padding
    plan = Plan(tp=tp, dp=dp, zero=zero, global_batch_size=dp, sequence_parallel=tp > 1)  # type: ignore[arg-type]
    cluster = Cluster.load("dgx-a100", tp * dp)
    # ZeRO's table keeps fp16 gradients: 2 + 2 + 12 bytes.
    return estimate(model, cluster, plan, training or Training(seq_len=2048, gradient_precision="bf16"))


def bytes_per_parameter(zero: str, dp: int, tp: int = 1) -> float:
    answer = run(zero, dp, tp)
    kinds = answer.stages[0].by_kind
    norms = answer.model.parameters.total  # OLMo's norms have no weights: everything is split over tp
    return sum(kinds[kind] for kind in ("parameters", "gradients", "optimizer")) / (norms / tp)


STAGES = {"Pos (ZeRO-1)": "1", "Pos+g (ZeRO-2)": "2", "Pos+g+p (ZeRO-3)": "3"}
SIZES = {"7.5B": 7.5, "128B": 128.0, "1T": 1000.0}


@pytest.mark.parametrize(
    "row",
    rows("ZeRO (arXiv:1910.02054) Table 1"),
    ids=lambda r: f"{r['model']}-{r['stage_or_component'][-2]}-{r['dp']}",
)
def test_zero_table_1(row: dict[str, str]) -> None:
    """Gigabytes of model states per device, 54 cells, as printed."""
    per_parameter = bytes_per_parameter(STAGES[row["stage_or_component"]], int(row["dp"]))
    printed = row["value"]
    decimals = len(printed.partition(".")[2])
    step = 10.0**-decimals
    # The paper rounds some cells and cuts others (4046.875 is printed as 4046).
    assert -0.51 * step <= per_parameter * SIZES[row["model"]] - float(printed) < step


THEORY = [row for row in rows("ZeRO Table 2") if row["unit_scope"].startswith("max theoretical")]


@pytest.mark.parametrize("row", THEORY, ids=lambda r: f"{r['stage_or_component']}-mp{r['mp_or_layout']}")
def test_zero_table_2(row: dict[str, str]) -> None:
    """Largest model whose states fit 32 GB, with 64 data-parallel ranks."""
    zero = {"baseline": "0", "Pos": "1", "Pos+g": "2", "Pos+g+p": "3"}[row["stage_or_component"]]
    tp = int(row["mp_or_layout"])
    largest = 32e9 / bytes_per_parameter(zero, 64) * tp
    printed = float(row["value"][:-1]) * {"B": 1e9, "T": 1e12}[row["value"][-1]]
    # Printed to two or three digits ("0.5T" is 512 B).
    assert largest == pytest.approx(printed, rel=0.03)


# arXiv:2205.05198, table 3: layers, hidden, heads, tp, pp, vpp, micro-batch.
FIGURE_1 = {
    "22B": (48, 6144, 64, 8, 1, 1, 4),
    "175B": (96, 12288, 96, 8, 8, 3, 1),
    "530B": (105, 20480, 128, 8, 35, 3, 1),
    "1T": (128, 25600, 160, 8, 64, 1, 1),
}


@pytest.mark.parametrize("row", rows("Korthikanti Fig 1"), ids=lambda r: f"{r['model']}-{r['stage_or_component'][:20]}")
def test_korthikanti_figure_1(row: dict[str, str]) -> None:
    """Memory of the first stage, read off a plot by others; the text's formulas are tested exactly elsewhere."""
    layers, hidden, heads, tp, pp, vpp, batch = FIGURE_1[row["model"]]
    sequence_parallel = "seq-parallel" in row["stage_or_component"]
    plan = Plan(
        tp=tp,
        pp=pp,
        vpp=vpp,
        schedule="interleaved" if vpp > 1 else "1f1b",
        micro_batch_size=batch,
        global_batch_size=batch * 8 * pp,
        sequence_parallel=sequence_parallel,
        zero="0",
        recompute=Recompute(kind="selective" if sequence_parallel else "none"),
    )
    model = Model(gpt_spec(hidden=hidden, heads=heads, layers=layers, vocab=51200))
    training = Training(seq_len=2048, stack="megatron-lm")
    kinds = estimate(model, Cluster.load("selene", tp * pp), plan, training).stages[0].by_kind
    if row["stage_or_component"] == "params+optimizer":
        # The plot leaves out the token and position tables.
        tables = 51200 * hidden / tp
        value = kinds["parameters"] + kinds["gradients"] + kinds["optimizer"] - 18 * tables
    else:
        value = kinds["activations"]
    assert value / 2**30 == pytest.approx(float(row["value"]), rel=0.03)


def test_every_multiplier_is_explained() -> None:
    answer = run("1", 8, training=Training(seq_len=2048, optimizer="adafactor"))
    terms = {term.what: term for term in answer.state_terms}
    assert {"parameter", "gradient", "master", "moments"} == terms.keys()
    assert all(term.why for term in terms.values())
    assert terms["moments"].bytes_per_parameter < 0.01
    bare = {term.what for term in run("1", 8, training=Training(seq_len=2048, master_weights=False)).state_terms}
    assert bare == {"parameter", "gradient", "moments"}


@pytest.mark.parametrize("smaller", ["sgd", "sgd-momentum", "adafactor", "adam-8bit", "muon"])
def test_smaller_optimizers_need_less_memory_and_time(smaller: str) -> None:
    adam = run("0", 8, training=Training(seq_len=2048))
    other = run("0", 8, training=Training(seq_len=2048, optimizer=smaller))
    assert other.peak_memory_bytes < adam.peak_memory_bytes
    assert other.time.by_cause["optimizer"] < adam.time.by_cause["optimizer"]


def test_update_traffic_of_megatron_and_fsdp() -> None:
    # Zeroing and a fused Adam with a float32 master: 8 + 8 + 2 beside 16 for the moments; clipping reads the gradients
    # for their norm, reads and writes them to scale them: 4 + 8.
    from simllm.hardware.stack import load_stack

    megatron = state_bytes(load_stack("megatron-core"), "bf16")
    assert (megatron.update_traffic, megatron.norm_traffic, megatron.scaling_traffic) == (18, 4, 8)
    assert state_bytes(load_stack("torchtitan"), "bf16").update_traffic == 16


def test_wrong_optimizers() -> None:
    with pytest.raises(InputError, match="did you mean adam"):
        Training(seq_len=1, optimizer="adm")
    with pytest.raises(InputError, match="unknown gradient precision 'fp8'"):
        Training(seq_len=1, gradient_precision="fp8")  # type: ignore[arg-type]
