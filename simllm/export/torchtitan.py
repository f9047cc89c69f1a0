"""A plan as torchtitan's TOML, and the plan that such a file describes.

Names and meanings are those of ``torchtitan/config/job_config.py`` and ``torchtitan/distributed`` of torchtitan 0.2,
the last with TOML files.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.export.job import Elsewhere, Exported, Imported, Job, refuse
from simllm.export.torchtitan_keys import RULES
from simllm.models import Model
from simllm.models.activations import second_products
from simllm.parallel.plan import even_split, split_layers
from simllm.training.setup import same_model

__all__ = ["flavors", "read", "write"]

_NAME = "torchtitan"
_STACKS = ("torchtitan", "torchtitan-eager")
_SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B"}


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
    if plan.etp not in (1, plan.tp):
        refuse(_NAME, f"etp={plan.etp} with tp={plan.tp}", "experts are split like the dense layers or not at all")
    if training.optimizer != "adam":
        refuse(_NAME, f"optimizer={training.optimizer}", "it has Adam and AdamW")
    if training.gradient_precision == "bf16" and training.master_weights is not False:
        refuse(_NAME, "gradient_precision=bf16", "gradients are of the parameters' precision, and reduced in float32")
    precision = _precision(job)
    parallelism: dict[str, Any] = {
        **_data_parallel(job),
        "tensor_parallel_degree": plan.tp,
        "pipeline_parallel_degree": plan.pp,
        **_pipeline(job),
        "context_parallel_degree": plan.cp,
        **({"context_parallel_rotate_method": "alltoall"} if plan.cp > 1 else {}),
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
    if plan.schedule not in _SCHEDULES:
        refuse(_NAME, f"schedule={plan.schedule}", f"known counterparts are {', '.join(_SCHEDULES.values())}")
    chunks = plan.pp * plan.vpp
    split = split_layers(layers, chunks, plan.uneven_layers)
    stages: dict[str, Any] = {
        "pipeline_parallel_schedule": _SCHEDULES[plan.schedule],
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


# -- the way back --------------------------------------------------------------------------------------------------


#: Names of torchtitan 0.1 and what they are called in 0.2.
_RENAMED = {
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.enable_compiled_autograd": "compile.components",
    "float8.filter_fqns": "quantize.linear.float8.filter_fqns",
    "float8.enable_fsdp_float8_all_gather": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "float8.precompute_float8_dynamic_scale_for_fsdp": (
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
}


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read(text: str, gpus: int | None = None) -> Imported:
    """The plan that a torchtitan job describes.

    Parameters
    ----------
    text : str
        The TOML.
    gpus : int, optional
        GPUs of the run, from which a degree of -1 follows.

    Raises
    ------
    InputError
        It is not TOML, a value is of the wrong kind, or a key changes the cost in a way that is not modelled.
    """
    try:
        flat = _flat(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not TOML: {error}") from None
    for key, name in _RENAMED.items():
        if key in flat:
            raise InputError(f"{key} is a name of torchtitan 0.1; write {name}, as 0.2 calls it")
    stack = "torchtitan" if flat.get("compile.enable") else "torchtitan-eager"
    notes = RULES.notes(flat, stack)
    for key in ("training.enable_cpu_offload", "experimental.custom_import", "fault_tolerance.enable"):
        if flat.get(key):
            raise UnsupportedError(f"{key}={flat[key]!r} is not modelled; take it out of the file")
    name, flavor = flat.get("model.name", "llama3"), flat.get("model.flavor", "debugmodel")
    if (name, flavor) not in flavors() and flavor != "debugmodel":
        known = [f"{n} {f}" for n, f in flavors()]
        raise unknown_name("model and flavor of torchtitan", f"{name} {flavor}", known)
    model = flavors()[name, flavor][0] if flavor != "debugmodel" else None
    degrees = {
        option: _whole(flat, f"parallelism.{key}", 1)
        for option, key in (
            ("tp", "tensor_parallel_degree"),
            ("pp", "pipeline_parallel_degree"),
            ("cp", "context_parallel_degree"),
            ("ep", "expert_parallel_degree"),
            ("etp", "expert_tensor_parallel_degree"),
        )
    }
    settings: dict[str, Any] = {"stack": stack, "sequence_parallel": degrees["tp"] > 1, **degrees}
    settings["seq_len"] = _whole(flat, "training.seq_len", 2048)
    settings |= _read_sharding(flat, degrees, gpus)
    settings |= _read_batch(flat, degrees["pp"], settings["dp"])
    settings |= _read_pipeline(flat, degrees["pp"], model)
    settings |= _read_precision(flat)
    settings["recompute"] = _read_checkpointing(flat, model)
    if flat.get("optimizer.name", "AdamW") not in ("Adam", "AdamW"):
        raise unknown_name("optimizer.name", str(flat["optimizer.name"]), ("Adam", "AdamW"))
    settings["optimizer"] = "adam"
    return Imported(framework="torchtitan", settings=settings, model=model, notes=notes)


def _whole(flat: Mapping[str, Any], key: str, default: int, lowest: int = 1) -> int:
    value = flat.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < lowest and value != default):
        raise InputError(f"{key}={value!r} must be a whole number of at least {lowest}")
    return value


def _read_sharding(flat: Mapping[str, Any], degrees: Mapping[str, int], gpus: int | None) -> dict[str, Any]:
    replicas = _whole(flat, "parallelism.data_parallel_replicate_degree", 1)
    shard = _whole(flat, "parallelism.data_parallel_shard_degree", -1)
    others = replicas * degrees["tp"] * degrees["pp"] * degrees["cp"]
    if shard == -1:
        if gpus is None:
            raise InputError("parallelism.data_parallel_shard_degree=-1 means the GPUs that are left; give --gpus")
        if gpus % others:
            raise InputError(f"the other degrees make {others}, which does not divide {gpus} GPUs")
        shard = gpus // others
    cp = degrees["cp"]
    settings: dict[str, Any] = {"dp": replicas * shard}
    if shard * cp == 1:
        return settings | {"zero": "0"}
    again = flat.get("parallelism.fsdp_reshard_after_forward", "default")
    if again not in ("default", "always", "never"):
        raise unknown_name("parallelism.fsdp_reshard_after_forward", str(again), ("default", "always", "never"))
    kept = again == "never" or (again == "default" and degrees["pp"] > 1)
    if replicas > 1:
        if kept:
            raise UnsupportedError("hybrid sharding that keeps parameters gathered after the forward is not modelled")
        return settings | {"zero": "hsdp", "hsdp_shard": shard * cp}
    return settings | {"zero": "2" if kept else "3"}


def _read_batch(flat: Mapping[str, Any], pp: int, dp: int) -> dict[str, int]:
    local = _whole(flat, "training.local_batch_size", 8)
    batch = _whole(flat, "training.global_batch_size", -1)
    batch = local * dp if batch == -1 else batch
    if pp == 1:
        return {"micro_batch_size": local, "global_batch_size": batch}
    micro = _whole(flat, "parallelism.pipeline_parallel_microbatch_size", 1)
    if batch != local * dp:
        raise UnsupportedError(
            f"training.global_batch_size={batch} fills the pipeline {batch / (local * dp):g} times a step; "
            f"simllm fills it once: training.local_batch_size={batch // dp}"
        )
    return {"micro_batch_size": micro, "global_batch_size": batch}


def _read_pipeline(flat: Mapping[str, Any], pp: int, model: Model | None) -> dict[str, Any]:
    if pp == 1:
        return {"vpp": 1, "schedule": "1f1b"}
    given = str(flat.get("parallelism.pipeline_parallel_schedule", "1F1B"))
    names = {name.lower(): schedule for schedule, name in _SCHEDULES.items()}
    if given.lower() not in names:
        raise UnsupportedError(
            f"parallelism.pipeline_parallel_schedule={given} is not modelled; {', '.join(_SCHEDULES.values())} are"
        )
    schedule = names[given.lower()]
    if model is None:
        raise InputError("a pipeline needs the model's number of layers; set model.flavor")
    layers = model.spec.num_hidden_layers
    parts = flat.get("parallelism.module_fqns_per_model_part")
    if parts is not None:
        sizes = [sum(str(name).startswith("layers.") for name in part) for part in parts]
    else:
        sizes = _stage_sizes(flat, layers, pp, 2 if schedule == "interleaved" else 1)
    if len(sizes) % pp:
        raise InputError(f"pipeline_parallel_degree={pp} does not divide the {len(sizes)} stages of the file")
    settings = {"vpp": len(sizes) // pp, "schedule": schedule}
    if even_split(layers, len(sizes)) == tuple(sizes):
        return settings | {"uneven_layers": False}
    if even_split(layers, len(sizes)) is None and split_layers(layers, len(sizes), True) == tuple(sizes):
        return settings | {"uneven_layers": True}
    raise UnsupportedError(f"stages of {', '.join(map(str, sizes))} layers are not modelled")


def _stage_sizes(flat: Mapping[str, Any], layers: int, pp: int, usual: int) -> list[int]:
    """Layers of each stage: as many as fit, the first stages one more, with room left for embedding and head."""
    first = _whole(flat, "parallelism.pipeline_parallel_first_stage_less_layers", 1, lowest=0)
    last = _whole(flat, "parallelism.pipeline_parallel_last_stage_less_layers", 1, lowest=0)
    size = _whole(flat, "parallelism.pipeline_parallel_layers_per_stage", 0)
    stages = -(-(layers + first + last) // size) if size else pp * usual
    each, longer = divmod(layers + first + last, stages)
    sizes = [each + (stage < longer) for stage in range(stages)]
    sizes[0] -= first
    sizes[-1] -= last
    return sizes


def _read_precision(flat: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if flat.get("training.dtype", "float32") == "bfloat16":
        settings["master_weights"] = False
    given = flat.get("model.converters", [])
    converters = set(given.split(",") if isinstance(given, str) else given)
    names = {"quantize.linear.float8": "fp8", "float8": "fp8", "quantize.linear.mx": "mxfp8", "mx": "mxfp8"}
    for name in converters - set(names):
        raise UnsupportedError(f"the converter {name} of model.converters is not modelled; take it out of the file")
    if converters:
        return settings | {"precision": names[sorted(converters)[0]]}
    param = flat.get("training.mixed_precision_param", "bfloat16")
    if param not in ("bfloat16", "float32"):
        raise unknown_name("training.mixed_precision_param", str(param), ("bfloat16", "float32"))
    return settings | {"precision": "bf16" if param == "bfloat16" else "fp32"}


def _read_checkpointing(flat: Mapping[str, Any], model: Model | None) -> str:
    mode = flat.get("activation_checkpoint.mode", "selective")
    if mode in ("none", "full"):
        return str(mode)
    if mode != "selective":
        raise UnsupportedError(f"activation_checkpoint.mode={mode} is not modelled; none, full and selective are")
    option = str(flat.get("activation_checkpoint.selective_ac_option", "2"))
    if option.isdigit() and int(option) > 0:
        return "full" if option == "1" else f"every:{option}"
    if option != "op":
        raise unknown_name("activation_checkpoint.selective_ac_option", option, ("op", "1", "2"))
    if model is None:
        raise InputError("activation_checkpoint.selective_ac_option=op needs to know the model; set model.flavor")
    return str(second_products(model.graph.layers))
