"""A plan that goes out to a framework's file comes back the same."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from simllm.errors import UnsupportedError
from simllm.export import (
    FRAMEWORKS,
    Job,
    accelerate,
    deepspeed,
    export,
    megatron_reading,
    torchtitan,
    torchtitan_reading,
)
from simllm.models.catalog import catalog_names
from simllm.training.setup import same_model
from tests.export.jobs import job, jobs, meaning, model, plan_of, settings_of

READ = {
    "megatron": megatron_reading.read,
    "deepspeed": deepspeed.read,
    "torchtitan": torchtitan_reading.read,
    "accelerate": accelerate.read,
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_comes_back_as_it_went(framework: str, data: st.DataObject) -> None:
    chosen: Job = data.draw(jobs(framework))
    try:
        exported = export(chosen, framework)
    except UnsupportedError:
        assume(False)
    gpus = chosen.plan.num_gpus
    imported = READ[framework](exported.text, gpus)
    found = settings_of(exported, imported)
    layers = chosen.model.spec.num_hidden_layers
    assert meaning(plan_of(found, gpus), layers) == meaning(chosen.plan, layers)
    assert found["seq_len"] == chosen.training.seq_len
    assert found.get("optimizer", "adam") == chosen.training.optimizer
    assert found.get("master_weights") == chosen.training.master_weights
    assert found.get("gradient_precision") == chosen.training.gradient_precision
    clipping = chosen.training.gradient_clipping
    assert found.get("gradient_clipping", True) == (("off", "on")[clipping] if framework == "accelerate" else clipping)
    assert found.get("capacity_factor") == chosen.training.capacity_factor
    if chosen.plan.zero != "0" or framework != "accelerate":  # plain replicas look the same with both FSDPs
        assert imported.settings["stack"] == chosen.training.stack
    if imported.model is not None:
        assert same_model(imported.model.spec, chosen.model.spec)


def test_models_of_the_catalog_come_back_from_megatrons_arguments() -> None:
    outcome: Counter[str] = Counter()
    for name in catalog_names():
        try:
            exported = export(job(name, training={"seq_len": 512}), "megatron")
        except UnsupportedError:
            outcome["refused"] += 1
            continue
        outcome["expressed"] += 1
        imported = megatron_reading.read(exported.text)
        assert imported.model is not None
        assert same_model(imported.model.spec, model(name).spec), name
        assert imported.model.parameters.total == model(name).parameters.total
    assert outcome["expressed"] >= 44


@pytest.mark.parametrize(("name", "flavor"), sorted(torchtitan.flavors()))
def test_models_of_torchtitan_come_back_by_name(name: str, flavor: str) -> None:
    loaded, pipelines = torchtitan.flavors()[name, flavor]
    chosen = job("llama-3-8b", zero="3", training={"stack": "torchtitan"})
    exported = export(Job(model=loaded, plan=chosen.plan, training=chosen.training, gpus_per_node=8), "torchtitan")
    assert f'name = "{name}"\nflavor = "{flavor}"' in exported.text
    found = torchtitan_reading.read(exported.text).model
    assert found is not None
    assert same_model(found.spec, loaded.spec)
    assert pipelines is (name != "qwen3")
