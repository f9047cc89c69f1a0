"""A plan as torchtitan's TOML.

Names and meanings are those of ``torchtitan/config/job_config.py`` and ``torchtitan/distributed`` of torchtitan 0.2,
the last with TOML files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from simllm.export.job import ROTATE_METHODS, Elsewhere, Exported, Job, refuse
from simllm.models import Model
from simllm.models.activations import second_products
from simllm.parallel.plan import even_split, split_layers
from simllm.training.setup import same_model

__all__ = ["SCHEDULES", "flavors", "write"]

_NAME = "torchtitan"
_STACKS = ("torchtitan", "torchtitan-eager")
SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B"}


@cache
def flavors() -> dict[tuple[str, str], tuple[Model, bool]]:
    """The models that torchtitan has by name and flavor, and whether it can pipeline them.

    >>> flavors()["llama3", "70B"][0].parameters.total
    70553706496
    """
    raw = json.loads((Path(__file__).parent / "torchtitan_flavors.json").read_text(encoding="utf-8"))
    return {
        (name, flavor): (Model.from_config(config, f"{name}-{flavor}"), entry["pipeline"])
        for name, entry in raw["models"].items()
        for flavor, config in entry["flavors"].items()
    }


def write(job: Job) -> Exported:
    """A plan as a torchtitan job.

    Raises
    ------
    UnsupportedError
        Naming what of the plan or model torchtitan does not have.
    """
    plan, training = job.plan, job.training
    job.require_known(_NAME)
    found = [(key, pipeline) for key, (model, pipeline) in flavors().items() if same_model(model.spec, job.model.spec)]
    if not found:
        names = ", ".join(f"{name} {flavor}" for name, flavor in flavors())
        refuse(_NAME, f"the model {job.model.name}", f"none of its models has this shape ({names})")
    (name, flavor), pipeline = found[0]
    if plan.pp > 1 and not pipeline:
        refuse(_NAME, f"pp={plan.pp} for {name}", "it cannot pipeline this model")
    if plan.tp > 1 and not plan.sequence_parallel:
        refuse(_NAME, f"tp={plan.tp} without sequence_parallel", "its tensor parallelism is sequence parallel")
    divisor = plan.tp * (2 * plan.cp if plan.cp > 1 else 1)
    if training.seq_len % divisor:
        refuse(_NAME, f"seq_len={training.seq_len}", f"it needs a multiple of tp x 2 cp = {divisor}")
    if plan.cp > 1 and plan.cp_comm_type not in ROTATE_METHODS:
        refuse(_NAME, f"cp_comm_type={plan.cp_comm_type}", "it has all_gather and p2p")
    if plan.etp not in (1, plan.tp):
        refuse(_NAME, f"etp={plan.etp} with tp={plan.tp}", "experts are split like the dense layers or not at all")
    if plan.ep == 1 and plan.etp != plan.tp and "experts" in job.model.parameters.by_component:
        refuse(_NAME, f"etp={plan.etp} with tp={plan.tp} and ep=1", "experts are then split like the dense layers")
    if training.optimizer != "adam":
        refuse(_NAME, f"optimizer={training.optimizer}", "it has Adam and AdamW")
    if training.gradient_precision == "bf16" and training.master_weights is not False:
        refuse(_NAME, "gradient_precision=bf16", "gradients are of the parameters' precision, and reduced in float32")
    if not training.gradient_clipping:
        refuse(_NAME, "training without gradient clipping", "it always clips to training.max_norm")
    if training.capacity_factor is not None:
        refuse(_NAME, f"capacity_factor={training.capacity_factor:g}", "its experts take every token")
    precision = _precision(job)
    parallelism: dict[str, Any] = {
        **_data_parallel(job),
        "tensor_parallel_degree": plan.tp,
        "pipeline_parallel_degree": plan.pp,
        **_pipeline(job),
        "context_parallel_degree": plan.cp,
        **({"context_parallel_rotate_method": ROTATE_METHODS[plan.cp_comm_type]} if plan.cp > 1 else {}),
        "expert_parallel_degree": plan.ep,
        "expert_tensor_parallel_degree": plan.etp,
    }
    accumulated = plan.num_micro_batches if plan.pp > 1 else 1
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": name, "flavor": flavor, **precision.get("model", {})},
        "optimizer": {"name": "AdamW"},
        "training": {
            "local_batch_size": plan.micro_batch_size * accumulated,
            "global_batch_size": plan.global_batch_size,
            "seq_len": training.seq_len,
            **precision["training"],
        },
        "parallelism": parallelism,
        "activation_checkpoint": _checkpointing(job),
        "compile": {"enable": training.software.name != "torchtitan-eager"},
        **{key: value for key, value in precision.items() if key not in ("model", "training")},
    }
    return Exported(
        framework="torchtitan",
        text="\n".join(_section(title, values) for title, values in sections.items()),
        launch=f"{job.torchrun} -m torchtitan.train --job.config_file FILE",
        elsewhere=(Elsewhere(option="--gpus", value=str(plan.num_gpus), where="the launcher"),),
        notes=(
            *job.stack_note(_STACKS),
            *job.routing_note(),
            "torchtitan 0.2 reads this; 0.3 keeps its settings in Python",
            "to be added, without effect on the cost: data set, assets of the tokenizer, learning rate, checkpoints",
        ),
    )


def _section(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([f"[{title}]", *lines, ""])


def _data_parallel(job: Job) -> dict[str, Any]:
    plan = job.plan
    if plan.zero == "1":
        refuse(_NAME, "zero=1", "it shards nothing, or parameters and gradients too; use zero=0, 2 or 3")
    if plan.zero == "0":
        if job.shards > 1 and plan.num_gpus > plan.dp:
            refuse(_NAME, "zero=0 beside other parallelism", "its replicas stand alone; use zero=2 or 3")
        return {"data_parallel_replicate_degree": plan.dp, "data_parallel_shard_degree": 1}
    if job.shards == 1:
        refuse(_NAME, f"zero={plan.zero} with dp x cp = 1", "there is nothing to shard over; use zero=0")
    replicas = job.hsdp_groups(_NAME) if plan.zero == "hsdp" else 1
    return {
        "data_parallel_replicate_degree": replicas,
        "data_parallel_shard_degree": plan.dp // replicas,
        "fsdp_reshard_after_forward": "never" if plan.zero == "2" else "always",
    }


def _pipeline(job: Job) -> dict[str, Any]:
    plan, layers = job.plan, job.model.spec.num_hidden_layers
    if plan.pp == 1:
        return {}
    if plan.schedule not in SCHEDULES:
        refuse(_NAME, f"schedule={plan.schedule}", f"known counterparts are {', '.join(SCHEDULES.values())}")
    chunks = plan.pp * plan.vpp
    split = split_layers(layers, chunks, plan.uneven_layers)
    stages: dict[str, Any] = {
        "pipeline_parallel_schedule": SCHEDULES[plan.schedule],
        "pipeline_parallel_microbatch_size": plan.micro_batch_size,
    }
    if even_split(layers, chunks) is None:
        names = iter(range(layers))
        parts = [[f"layers.{next(names)}" for _ in range(size)] for size in split]
        parts[0].insert(0, "tok_embeddings")
        parts[-1] += ["norm", "output"]
        return stages | {"module_fqns_per_model_part": parts}
    size = max(split)
    return stages | {
        "pipeline_parallel_layers_per_stage": size,
        "pipeline_parallel_first_stage_less_layers": size - split[0],
        "pipeline_parallel_last_stage_less_layers": size - split[-1],
    }


def _precision(job: Job) -> dict[str, Any]:
    precision, training = job.plan.precision, job.training
    if training.master_weights is False:
        if precision != "bf16":
            refuse(_NAME, f"training without master weights in {precision}", "it has that in bfloat16")
        return {"training": {"dtype": "bfloat16", "mixed_precision_param": "bfloat16"}}
    kinds: dict[str, dict[str, Any]] = {
        "bf16": {"training": {"mixed_precision_param": "bfloat16"}},
        "fp32": {"training": {"mixed_precision_param": "float32"}},
        "fp8": {
            "model": {"converters": ["quantize.linear.float8"]},
            "training": {"mixed_precision_param": "bfloat16"},
            "quantize.linear.float8": {"recipe_name": "rowwise", "filter_fqns": ["output"]},
        },
        "mxfp8": {
            "model": {"converters": ["quantize.linear.mx"]},
            "training": {"mixed_precision_param": "bfloat16"},
            "quantize.linear.mx": {"recipe_name": "mxfp8_cublas", "filter_fqns": ["output"]},
        },
    }
    if precision not in kinds:
        refuse(_NAME, f"precision={precision}", f"it has {', '.join(kinds)}")
    return kinds[precision]


def _checkpointing(job: Job) -> dict[str, str]:
    policy = job.plan.recompute
    if policy.kind == "none" or (policy.kind == "full" and policy.every == 1):
        return {"mode": policy.kind}
    if policy.kind == "full":
        return {"mode": "selective", "selective_ac_option": str(policy.every)}
    if policy == second_products(job.model.graph.layers):
        return {"mode": "selective", "selective_ac_option": "op"}
    again = second_products(job.model.graph.layers)
    return refuse(
        _NAME,
        f"recompute={policy}",
        f"it recomputes nothing, whole layers (full, every:N), or all but every second product ({again})",
    )
