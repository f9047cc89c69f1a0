"""The plan that torchtitan's TOML describes.

Names, meanings and defaults are those of ``torchtitan/config/job_config.py`` and ``torchtitan/distributed`` of
torchtitan 0.2, the last with TOML files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.export.job import ROTATE_METHODS, Imported
from simllm.export.torchtitan import SCHEDULES, flavors
from simllm.export.torchtitan_keys import RULES
from simllm.models import Model
from simllm.models.activations import second_products
from simllm.parallel.plan import even_split, split_layers

__all__ = ["read"]


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
    if degrees["ep"] == 1:
        # Without expert parallelism experts are split like the dense layers, whatever the file says.
        degrees["etp"] = degrees["tp"] if model is not None and "experts" in model.parameters.by_component else 1
    settings: dict[str, Any] = {"stack": stack, "sequence_parallel": degrees["tp"] > 1, **degrees}
    if degrees["cp"] > 1:
        method = flat.get("parallelism.context_parallel_rotate_method", "allgather")
        kinds = {name: kind for kind, name in ROTATE_METHODS.items()}
        if method not in kinds:
            raise unknown_name("parallelism.context_parallel_rotate_method", str(method), kinds)
        settings["cp_comm_type"] = kinds[method]
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
    names = {name.lower(): schedule for schedule, name in SCHEDULES.items()}
    if given.lower() not in names:
        raise UnsupportedError(
            f"parallelism.pipeline_parallel_schedule={given} is not modelled; {', '.join(SCHEDULES.values())} are"
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
