"""Offload to the host: what fits where papers say it does, what moves, and what it costs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm import Cluster, Model, Plan, Training, estimate
from simllm.errors import InputError
from simllm.models.activations import Recompute
from simllm.parallel.offload import OFFLOADED, Offload
from simllm.training import Estimate

PUBLISHED = Path(__file__).resolve().parents[1] / "published" / "offload_sizes.csv"
with PUBLISHED.open(newline="") as file:
    SIZES = list(csv.DictReader(file))


def gpt(layers: int, hidden: int) -> Model:
    heads = hidden // 128
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": 1024, "vocab_size": 50304}
    return Model.from_config({"model_type": "gpt2", **sizes})


def ask(
    model: Model, gpus: int, offload: str, zero: Any = "3", tp: int = 1, cluster: str = "dgx-2", **settings: Any
) -> Estimate:
    given = {"micro_batch_size": 1, "global_batch_size": gpus // tp, "recompute": Recompute.parse("full")} | settings
    plan = Plan(tp=tp, dp=gpus // tp, zero=zero, precision="fp16", offload=Offload.parse(offload), **given)
    training = Training(seq_len=1024, stack="megatron-deepspeed", memory_headroom=0)
    return estimate(model, Cluster.load(cluster, gpus), plan, training)


@pytest.mark.parametrize("row", SIZES, ids=[f"{row['what']}-{row['offload']}" for row in SIZES])
def test_largest_models_of_the_papers(row: dict[str, str]) -> None:
    model = gpt(int(row["layers"]), int(row["hidden"]))
    answer = ask(model, int(row["gpus"]), row["offload"], row["zero"], int(row["tp"]))
    assert answer.fits == (row["fits"] == "1")


def test_update_on_the_host_takes_what_was_measured() -> None:
    # ZeRO-Offload (arXiv:2101.06840), table 4, recalled: 1, 2, 4, 8 and 10 billion parameters on a DGX-2.
    for layers, hidden, seconds in ((20, 2048, 0.22), (20, 4096, 1.03), (50, 4096, 2.57)):
        model = gpt(layers, hidden)
        answer = ask(model, 1, "optimizer,gradients", "2")
        size = {0.22: 1e9, 1.03: 4e9, 2.57: 10e9}[seconds]
        scaled = answer.time.by_cause["optimizer"] * size / model.parameters.total
        assert scaled == pytest.approx(seconds, rel=0.18)


def test_everything_that_leaves_is_on_the_host() -> None:
    model, nothing = gpt(24, 2048), "none"
    here = ask(model, 8, nothing, global_batch_size=16).peak_stage
    away = ask(model, 8, "optimizer:nvme,gradients,parameters,activations", global_batch_size=16)
    there = away.peak_stage
    assert there.host["optimizer:nvme"] == here.by_kind["optimizer"]
    assert there.host["parameters"] == here.by_kind["parameters"]
    assert there.host["gradients"] == here.by_kind["gradients"]
    assert there.host["activations"] + there.by_kind["activations"] == pytest.approx(here.by_kind["activations"])
    assert there.by_kind["optimizer"] == there.by_kind["parameters"] == 0
    memory = away.host_memory
    assert memory is not None
    assert memory.nvme_bytes == pytest.approx(8 * there.host["optimizer:nvme"])
    assert memory.memory_bytes == pytest.approx(8 * (sum(there.host.values()) - there.host["optimizer:nvme"]))


def test_transfers_take_their_bytes_over_the_link() -> None:
    # One device alone on DGX-2 has 12 GB/s; gradients and new parameters are 2 bytes a parameter each.
    model = gpt(20, 4096)
    answer = ask(model, 1, "optimizer", "1")
    copy = 2 * model.parameters.total / 12e9
    update = answer.time.by_cause["optimizer"]
    assert update > copy
    returned = 0.28 * copy  # beside the update, which takes longer
    sent = answer.time.by_cause["offload"] - returned
    others = ("matmul", "attention", "elementwise", "recompute", "host")
    passes = sum(answer.time.by_cause[cause] for cause in others)
    # Beside the backward pass, which is between half of and all of both passes.
    assert copy - 0.72 * passes <= sent <= copy - 0.72 * passes / 2


def test_accumulation_hides_the_update() -> None:
    # arXiv:2101.06840, section 6.2: a large enough batch makes up for the transfers and the update on the host.
    model = gpt(20, 4096)
    shares = []
    for batch in (4, 16, 64):
        time = ask(model, 1, "optimizer,gradients", "2", micro_batch_size=4, global_batch_size=batch).time
        shares.append((time.by_cause["offload"] + time.by_cause["optimizer"]) / time.total_s)
    assert shares[0] > 0.4 > 0.2 > shares[2]
    assert shares == sorted(shares, reverse=True)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(OFFLOADED), unique=True), st.sampled_from(OFFLOADED), st.sampled_from([1, 4]))
def test_offloading_more_never_needs_more_of_the_device(names: list[str], more: str, batches: int) -> None:
    model = gpt(4, 1024)
    try:
        less, larger = (Offload(to_cpu=tuple(dict.fromkeys(some))) for some in (names, [*names, more]))
    except InputError:
        return
    answers = [ask(model, 4, str(o), global_batch_size=4 * batches) for o in (less, larger)]
    assert answers[1].peak_memory_bytes <= answers[0].peak_memory_bytes
    for answer in answers:
        assert sum(answer.time.by_cause.values()) == pytest.approx(answer.step_time_s)


@pytest.mark.parametrize(
    ("offload", "zero", "cluster", "message"),
    [
        ("states", "3", "dgx-2", "unknown state to offload 'states'"),
        ("optimizer:disk", "3", "dgx-2", "unknown place to offload to 'disk'"),
        ("gradients", "3", "dgx-2", "needs the optimizer on the host too"),
        ("activations:nvme", "3", "dgx-2", "activations:nvme is not modelled"),
        ("optimizer,optimizer:nvme", "3", "dgx-2", "both to the host's memory and to its drives"),
        ("parameters", "1", "dgx-2", "use zero=3 or hsdp"),
        ("optimizer:nvme", "3", "dgx-1v", "states no NVMe drives"),
        ("optimizer", "3", "abci-v", "has no host section"),
    ],
)
def test_wrong_offloads(offload: str, zero: str, cluster: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(gpt(2, 1024), 4, offload, zero, cluster=cluster)
