"""Fine-tuning searched: the batch that fits, the smallest GPU, methods side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simllm import Cluster, Model, Plan, Recompute, Training
from simllm.hardware import list_profiles, load_accelerator
from simllm.models.finetuning import method_named
from simllm.planner import compare_methods, finetune, plan
from simllm.planner.align import plan_alignment
from simllm.training.step import Step

MODEL = Model.load("llama-2-7b")
CONSUMER = Cluster.load("tinybox-green", 1)
RUN = Training(seq_len=1024, stack="hf-peft")


def test_the_batch_fits_and_one_more_does_not() -> None:
    tuned = MODEL.finetuned("qlora", rank=16)
    answer = finetune(tuned, CONSUMER, RUN)
    assert answer.fits
    assert answer.best is not None
    usable = answer.best.usable_memory_bytes
    size = answer.largest_micro_batch
    for batch, fits in ((size, True), (size + 1, False)):
        larger = replace(answer.best.plan, micro_batch_size=batch, global_batch_size=batch)
        assert (Step(tuned, CONSUMER, larger, RUN).first_overflow(usable) is None) == fits


@pytest.mark.parametrize(
    ("method", "model"), [("qlora", "llama-2-7b"), ("prompt", "llama-2-7b"), ("prefix", "llama-2-7b")]
)
def test_every_plan_that_is_found_can_run(method: str, model: str) -> None:
    """Blocks of quantised weights, and learned tokens split over a sequence, do not divide by eight."""
    tuned = Model.load(model).finetuned(method)
    found = plan(tuned, Cluster.load("dgx-a100", 8), RUN, global_batch_size=8, top=10_000)
    assert len(found.plans) == found.feasible > 20
    eighths = [answer.plan for answer in found.plans if answer.plan.tp == 8]
    assert bool(eighths) == (method != "qlora")
    assert not any(each.sequence_parallel for each in eighths if method == "prompt")


def test_the_smallest_gpu_is_the_first_that_fits() -> None:
    tuned = MODEL.finetuned("lora", rank=16)
    answer = finetune(tuned, CONSUMER, RUN)
    card = answer.smallest_gpu
    assert card is not None
    alone = Plan(zero="0", recompute=Recompute(kind="full"))
    (memory,) = Step(tuned, CONSUMER, alone, RUN).memory()
    assert memory.peak_bytes <= card.memory_bytes * 0.95
    cards = [load_accelerator(name) for name in list_profiles("accelerators")]
    smaller = [c for c in cards if c.memory_bytes < card.memory_bytes and c.vendor in ("NVIDIA", "AMD")]
    assert not [c.name for c in smaller if "bf16" in c.peak_flops and memory.peak_bytes <= c.memory_bytes * 0.95]


def test_methods_side_by_side() -> None:
    answers = dict(compare_methods(MODEL, CONSUMER, RUN))
    assert answers["bitfit"].refused
    assert not answers["full"].fits
    assert answers["qlora"].fits
    assert answers["lora"].fits
    assert answers["full"].best is not None, "what comes nearest is said"
    trained = {name: answer.model.trainable_parameters for name, answer in answers.items()}
    assert trained["ia3"] == 614400
    assert trained["prompt"] == 81920


@pytest.mark.parametrize("task", ["sft", "reward", "dpo", "orpo", "ppo"])
def test_a_plan_for_every_task(task: str) -> None:
    where = Cluster.load("dgx-a100", 8)
    found = plan_alignment(task, MODEL, where, RUN, global_batch_size=16, method=method_named("lora", rank=8))
    assert found.best is not None
    assert found.best.fits
    document = found.to_dict()
    assert document["step_time_s"] == found.best.step_time_s
    assert document["memory"]["peak_bytes"] <= document["memory"]["capacity_bytes"]


def test_what_comes_nearest_when_nothing_fits() -> None:
    found = plan_alignment("ppo", Model.load("llama-2-70b"), CONSUMER, RUN, global_batch_size=4)
    assert found.best is None
    assert found.answer is not None
    assert not found.answer.fits


def test_what_cannot_be_offloaded_is_not_proposed() -> None:
    # Nothing fits 70B on one GPU; the states of GaLore stay on the device, those of LoRA may leave it.
    large, one = Model.load("llama-2-70b"), Cluster.load("dgx-h100", 1)
    words = {
        method: [change for change, _ in plan(large.finetuned(method), one, RUN, global_batch_size=1).changes]
        for method in ("galore", "lora")
    }
    assert not any("offload=optimizer" in change for change in words["galore"])
    assert any("offload=optimizer" in change for change in words["lora"])
