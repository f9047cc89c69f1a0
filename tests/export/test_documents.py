"""The JSON of an estimate holds all that an export needs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simllm import Cluster, Model, Plan, Training, estimate
from simllm.errors import InputError, UnsupportedError
from simllm.export import Job
from simllm.models.activations import Recompute

QUESTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama-3-8b", {"tp": 2, "dp": 8, "sequence_parallel": True, "recompute": Recompute.parse("every:2")}, {}),
    ("llama-3-8b", {"dp": 16, "zero": "hsdp"}, {"stack": "torchtitan", "optimizer": "adam-8bit"}),
    ("mixtral-8x7b", {"pp": 2, "dp": 8, "ep": 8, "precision": "fp8"}, {"gradient_precision": "bf16"}),
    ("deepseek-v2-lite", {"dp": 16, "ep": 4}, {"master_weights": False, "memory_headroom": 0.1}),
]


@pytest.mark.parametrize(("name", "plan", "training"), QUESTIONS)
def test_a_document_gives_the_job_back(name: str, plan: dict[str, Any], training: dict[str, Any]) -> None:
    asked = Training(seq_len=2048, **training)
    answer = estimate(Model.load(name), Cluster.load("dgx-h100", 16), Plan(global_batch_size=64, **plan), asked)
    document = json.loads(json.dumps(answer.to_dict()))
    found, expected = Job.from_document(document), Job.of(answer)
    assert (found.plan, found.training, found.gpus_per_node) == (expected.plan, expected.training, 8)
    assert found.model.parameters == expected.model.parameters
    assert found.nodes == 2
    if plan.get("zero") == "hsdp":
        assert found.plan.hsdp_shard == 8  # the GPUs of a node


def test_a_model_that_no_config_makes_is_asked_for() -> None:
    model = Model(Model.load("llama-3-8b").spec)
    answer = estimate(model, Cluster.load("dgx-h100", 8), Plan(dp=8, global_batch_size=8), Training(seq_len=2048))
    document = answer.to_dict()
    assert document["setup"]["model"] is None
    with pytest.raises(InputError, match="give --model"):
        Job.from_document(document)
    assert Job.from_document(document, model=model).model is model


def test_a_fine_tuned_model_is_refused_by_its_method() -> None:
    tuned = Model.load("llama-3-8b").finetuned("lora", rank=8)
    answer = estimate(tuned, Cluster.load("dgx-h100", 8), Plan(dp=8, global_batch_size=8), Training(seq_len=2048))
    document = json.loads(json.dumps(answer.to_dict()))
    assert document["setup"]["method"] == "lora"
    for ask in (
        lambda: Job.of(answer),
        lambda: Job.from_document(document),
        lambda: Job.from_document(document, model=Model.load("llama-3-8b")),
    ):
        with pytest.raises(UnsupportedError, match="llama-3-8b fine-tuned with lora cannot be exported"):
            ask()
