"""What an estimate was asked, as plain data from which it can be asked again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError, unknown_name
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.spec import ModelSpec
from simllm.parallel.offload import Offload
from simllm.parallel.plan import Plan

if TYPE_CHECKING:
    from simllm.training.estimate import Estimate

__all__ = ["plan_from_dict", "same_model", "setup_dict"]

#: Fields of a spec that change nothing that is computed.
_LABELS = ("name", "family", "model_type", "context_length", "tokenizer", "notes")
#: What the plain data of a plan says besides its fields.
_DERIVED = ("num_micro_batches",)


def same_model(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two specs describe the same model, whatever it is called.

    >>> same_model(Model.load("llama-2-7b").spec, Model.load("llama-7b").spec)
    True
    >>> same_model(Model.load("llama-2-7b").spec, Model.load("llama-3-8b").spec)
    False
    """
    names = [field.name for field in fields(ModelSpec) if field.name not in _LABELS]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def setup_dict(answer: Estimate) -> dict[str, Any]:
    """What besides the plan was asked: the model's config, the nodes, the options of the training."""
    training, cluster = answer.training, answer.cluster
    return {
        "model": _model_dict(answer.model),
        "accelerator": cluster.accelerator.name,
        "gpus_per_node": min(cluster.gpus_per_node, cluster.num_gpus),
        "num_nodes": cluster.num_nodes,
        "hsdp_shard": answer.hsdp_shard,
        "optimizer": training.optimizer,
        "method": answer.model.method.name if answer.model.method else None,
        "master_weights": training.master_weights,
        "gradient_precision": training.gradient_precision,
        "gradient_clipping": training.gradient_clipping,
        "expert_imbalance": training.expert_imbalance,
        "capacity_factor": training.capacity_factor,
        "memory_headroom": training.memory_headroom,
    }


def _model_dict(model: Model) -> dict[str, Any] | None:
    """The config that the model comes from, or None where it was made or changed by other means."""
    if model.config is None:
        return None
    mtp, multiple = bool(model.spec.multi_token_prediction), model.spec.vocab_multiple
    read = Model.from_config(model.config, model.name, mtp=mtp, vocab_multiple=multiple)
    if not same_model(read.spec, model.spec):
        return None
    return {"config": dict(model.config), "mtp": mtp, "vocab_multiple": multiple}


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """A plan from the plain data of `simllm.training.estimate.plan_dict`.

    >>> from simllm.training.estimate import plan_dict
    >>> plan = Plan(tp=2, dp=4, global_batch_size=8, recompute=Recompute.parse("every:2"))
    >>> plan_from_dict(plan_dict(plan)) == plan
    True
    """
    names = {field.name for field in fields(Plan)}
    for name in data:
        if name not in names and name not in _DERIVED:
            raise unknown_name("key of a plan", name, names)
    values = {name: value for name, value in data.items() if name in names}
    defaults = asdict(Plan())
    for name, value in values.items():
        expected = str if name in ("recompute", "offload") else type(defaults[name])
        if defaults[name] is not None and type(value) is not expected:
            raise InputError(f"{name}={value!r} of the plan must be of the kind of {defaults[name]!r}")
    if "recompute" in values:
        values["recompute"] = Recompute.parse(values["recompute"])
    if "offload" in values:
        values["offload"] = Offload.parse(values["offload"])
    return Plan(**values)
