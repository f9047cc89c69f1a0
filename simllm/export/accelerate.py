"""A plan as accelerate's YAML with FSDP, and the plan that such a file describes.

Names and meanings are those of ``accelerate/commands/config/config_args.py``, ``commands/launch.py`` and
``parallelism_config.py`` of accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.export.job import ROTATE_METHODS, Elsewhere, Exported, Imported, Job, refuse
from simllm.export.keys import KeyRules

__all__ = ["read", "write"]

_NAME = "accelerate"
_FSDP1 = ("fsdp1", "fsdp1-compiled")
_FSDP2 = ("torchtitan-eager", "torchtitan", "automodel")
_COMPILED = ("fsdp1-compiled", "torchtitan")
#: What FSDP 1 calls the ZeRO stages.
_STRATEGIES = {"2": "SHARD_GRAD_OP", "3": "FULL_SHARD", "hsdp": "HYBRID_SHARD"}


def write(job: Job) -> Exported:
    """A plan as a configuration of ``accelerate launch``.

    Raises
    ------
    UnsupportedError
        Naming what of the plan accelerate does not have.
    """
    import yaml

    plan, training = job.plan, job.training
    job.require_known(_NAME)
    _check(job)
    first = training.software.name in _FSDP1
    document: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(job),
        "num_machines": job.nodes,
        "machine_rank": 0,
        "num_processes": plan.num_gpus,
        "mixed_precision": "no" if plan.precision == "fp32" else plan.precision,
    }
    if training.software.name in _COMPILED:
        document["dynamo_config"] = {"dynamo_backend": "INDUCTOR"}
    checkpointed = plan.recompute.kind == "full" and plan.recompute.every == 1
    if plan.zero != "0":
        document["fsdp_config"] = {
            "fsdp_version": 1 if first else 2,
            **(
                {"fsdp_sharding_strategy": _STRATEGIES[plan.zero]}
                if first
                else {"fsdp_reshard_after_forward": plan.zero != "2"}
            ),
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": checkpointed,
        }
        if not first:
            replicas = job.hsdp_groups(_NAME) if plan.zero == "hsdp" else 1
            document["parallelism_config"] = {
                "parallelism_config_dp_replicate_size": replicas,
                "parallelism_config_dp_shard_size": plan.dp // replicas,
                "parallelism_config_tp_size": plan.tp,
                "parallelism_config_cp_size": plan.cp,
                **({"parallelism_config_cp_comm_strategy": ROTATE_METHODS[plan.cp_comm_type]} if plan.cp > 1 else {}),
            }
    return Exported(
        framework="accelerate",
        text=yaml.safe_dump(document, sort_keys=False),
        launch="accelerate launch --config_file FILE train.py",
        elsewhere=_elsewhere(job, in_file=checkpointed and plan.zero != "0"),
        notes=job.stack_note(_FSDP1 if first else _FSDP2),
    )


def _check(job: Job) -> None:
    plan, training = job.plan, job.training
    if plan.pp > 1:
        refuse(_NAME, f"pp={plan.pp}", "it has no pipeline for FSDP")
    if plan.ep > 1 or plan.etp > 1:
        refuse(_NAME, f"ep={plan.ep} etp={plan.etp}", "it has no expert parallelism")
    if plan.zero == "1":
        refuse(_NAME, "zero=1", "FSDP shards gradients too; use zero=0, 2 or 3")
    if plan.tp > 1 and plan.sequence_parallel:
        refuse(_NAME, f"tp={plan.tp} with sequence_parallel", "transformers' plans keep whole sequences")
    if plan.precision not in ("bf16", "fp16", "fp32"):
        refuse(_NAME, f"precision={plan.precision}", "a plan holds no recipe for what it asks beyond bf16, fp16 and no")
    if training.master_weights is False:
        refuse(_NAME, "training without master weights", "that is the type the model is loaded in")
    if training.capacity_factor is not None:
        refuse(_NAME, f"capacity_factor={training.capacity_factor:g}", "experts are those of the model's code")
    if training.gradient_precision == "bf16":
        refuse(_NAME, "gradient_precision=bf16", "gradients are of the parameters' precision")
    if plan.cp > 1 and plan.cp_comm_type not in ROTATE_METHODS:
        refuse(_NAME, f"cp_comm_type={plan.cp_comm_type}", "beside FSDP it has all_gather and p2p")
    if plan.zero == "0" and plan.tp * plan.cp > 1:
        refuse(_NAME, f"zero=0 with tp={plan.tp} cp={plan.cp}", "both go with FSDP; use zero=2 or 3")
    if plan.zero != "0" and job.shards == 1:
        refuse(_NAME, f"zero={plan.zero} with dp x cp = 1", "there is nothing to shard over; use zero=0")
    if training.software.name in _FSDP1 and plan.tp * plan.cp > 1:
        refuse(_NAME, f"tp={plan.tp} cp={plan.cp} under FSDP 1", "both go with FSDP 2; plan with --stack torchtitan")
    if plan.zero == "hsdp" and plan.hsdp_shard == plan.cp > 1:
        refuse(_NAME, f"hsdp_shard={plan.hsdp_shard} with cp={plan.cp}", "it needs dp_shard_size above 1 beside cp")
    if plan.zero == "hsdp" and training.software.name in _FSDP1 and plan.hsdp_shard != job.gpus_per_node:
        refuse(_NAME, f"hsdp_shard={plan.hsdp_shard} under FSDP 1", f"its groups are nodes of {job.gpus_per_node}")


def _distributed_type(job: Job) -> str:
    if job.plan.zero != "0":
        return "FSDP"
    return "MULTI_GPU" if job.plan.num_gpus > 1 else "NO"


def _elsewhere(job: Job, in_file: bool) -> tuple[Elsewhere, ...]:
    plan, training = job.plan, job.training
    steps = f"Accelerator(gradient_accumulation_steps={plan.num_micro_batches})"
    settings = [
        Elsewhere(option="--seq-len", value=str(training.seq_len), where="the data set"),
        Elsewhere(option="--micro-batch-size", value=str(plan.micro_batch_size), where="the DataLoader's batch_size"),
        Elsewhere(option="--global-batch-size", value=str(plan.global_batch_size), where=steps),
        Elsewhere(option="--optimizer", value=training.optimizer, where="the code"),
        Elsewhere(
            option="--gradient-clipping",
            value="on" if training.gradient_clipping else "off",
            where="the code: Accelerator.clip_grad_norm_()",
        ),
    ]
    if plan.recompute.kind != "none" and not in_file:
        where = "the model: gradient_checkpointing_enable() or torch.utils.checkpoint"
        settings.append(Elsewhere(option="--recompute", value=str(plan.recompute), where=where))
    return tuple(settings)


# -- the way back --------------------------------------------------------------------------------------------------

_RULES = KeyRules(
    _NAME,
    used=(
        "compute_environment",
        "distributed_type",
        "dynamo_backend",
        "dynamo_config.dynamo_backend",
        "fsdp_config.fsdp_activation_checkpointing",
        "fsdp_config.fsdp_offload_params",
        "fsdp_config.fsdp_reshard_after_forward",
        "fsdp_config.fsdp_sharding_strategy",
        "fsdp_config.fsdp_version",
        "mixed_precision",
        "num_machines",
        "num_processes",
        "parallelism_config.parallelism_config_cp_comm_strategy",
        "parallelism_config.parallelism_config_cp_size",
        "parallelism_config.parallelism_config_dp_replicate_size",
        "parallelism_config.parallelism_config_dp_shard_size",
        "parallelism_config.parallelism_config_sp_size",
        "parallelism_config.parallelism_config_tp_size",
        "use_cpu",
    ),
    refused={},
    software=(
        "dynamo_config.dynamo_mode",
        "dynamo_config.dynamo_use_dynamic",
        "dynamo_config.dynamo_use_fullgraph",
        "dynamo_config.dynamo_use_regional_compilation",
        "fsdp_config.fsdp_auto_wrap_policy",
        "fsdp_config.fsdp_backward_prefetch",
        "fsdp_config.fsdp_backward_prefetch_policy",
        "fsdp_config.fsdp_forward_prefetch",
        "fsdp_config.fsdp_min_num_params",
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
        "fsdp_config.fsdp_use_orig_params",
        "parallelism_config.parallelism_config_cp_backend",
        "parallelism_config.parallelism_config_sp_backend",
    ),
    harmless=(
        "debug",
        "downcast_bf16",
        "enable_cpu_affinity",
        "fsdp_config.fsdp_cpu_ram_efficient_loading",
        "fsdp_config.fsdp_state_dict_type",
        "fsdp_config.fsdp_sync_module_states",
        "gpu_ids",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "main_training_function",
        "rdzv_backend",
        "same_network",
        "tpu_*",
    ),
)


def read(text: str, gpus: int | None = None) -> Imported:
    """The plan that a configuration of ``accelerate launch`` describes.

    Parameters
    ----------
    text : str
        The YAML.
    gpus : int, optional
        GPUs of the run, instead of ``num_processes``.

    Raises
    ------
    InputError
        It is not YAML, a value is of the wrong kind, or a key changes the cost in a way that is not modelled.
    """
    flat = _load(text)
    kind = flat.get("distributed_type")
    if kind not in ("FSDP", "MULTI_GPU", "NO"):
        raise UnsupportedError(
            f"distributed_type={kind} is not modelled; FSDP, MULTI_GPU and NO are, and the own files of DeepSpeed and "
            "Megatron-LM are read"
        )
    for key, off in (("use_cpu", False), ("fsdp_config.fsdp_offload_params", False)):
        if flat.get(key, off) not in (off, None):
            raise UnsupportedError(f"{key}={flat[key]} is not modelled; take it out of the file")
    size = {
        name: _whole(flat, f"parallelism_config.parallelism_config_{name}_size")
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    if (size["sp"] or 1) > 1:
        raise UnsupportedError(
            f"parallelism_config_sp_size={size['sp']}: Ulysses goes with DeepSpeed, whose own file is read; write "
            "sequence_parallel_size there"
        )
    tp, cp = size["tp"] or 1, size["cp"] or 1
    world = gpus or _whole(flat, "num_processes")
    if world is not None and world % (tp * cp):
        raise InputError(f"tp={tp} x cp={cp} does not divide {world} GPUs")
    version = _whole(flat, "fsdp_config.fsdp_version") or 1
    compiled = any(str(flat.get(k, "NO")) != "NO" for k in ("dynamo_backend", "dynamo_config.dynamo_backend"))
    if kind == "FSDP" and version == 1:
        stack = "fsdp1-compiled" if compiled else "fsdp1"
    else:
        stack = "torchtitan" if compiled else "torchtitan-eager"
    settings: dict[str, Any] = {"stack": stack, "tp": tp, "cp": cp, "sequence_parallel": False}
    if cp > 1:
        method = flat.get("parallelism_config.parallelism_config_cp_comm_strategy", "allgather")
        kinds = {name: kind for kind, name in ROTATE_METHODS.items()}
        if method not in kinds:
            raise unknown_name("parallelism_config_cp_comm_strategy", str(method), kinds)
        settings["cp_comm_type"] = kinds[method]
    settings |= _read_precision(flat) | _read_sharding(flat, kind, version, size, world)
    if flat.get("fsdp_config.fsdp_activation_checkpointing"):
        settings["recompute"] = "full"
    notes = [
        *_RULES.notes(flat, stack),
        f"kernels and overlap are those of {stack}, the stack of this kind of FSDP; --stack names others",
    ]
    return Imported(framework="accelerate", settings=settings, notes=tuple(notes))


def _load(text: str) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}") from None
    if not isinstance(document, dict):
        raise InputError("a configuration of accelerate is one mapping of keys")
    flat: dict[str, Any] = {}
    for key, value in document.items():
        inner = value if isinstance(value, dict) else None
        flat |= {str(key): value} if inner is None else {f"{key}.{name}": given for name, given in inner.items()}
    return flat


def _whole(flat: Mapping[str, Any], key: str) -> int | None:
    value = flat.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{key}={value!r} must be a whole number above zero")
    return value


def _read_precision(flat: Mapping[str, Any]) -> dict[str, str]:
    # YAML reads an unquoted no as False.
    given = flat.get("mixed_precision") or "no"
    names = {"no": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
    if given not in names:
        raise unknown_name("mixed_precision", str(given), names)
    return {"precision": names[given]}


def _read_sharding(
    flat: Mapping[str, Any], kind: str, version: int, size: Mapping[str, int | None], world: int | None
) -> dict[str, Any]:
    replicas, shard = size["dp_replicate"] or 1, size["dp_shard"]
    if kind != "FSDP":
        return {"zero": "0"} | ({"dp": world} if world else {})
    key = "fsdp_sharding_strategy" if version == 1 else "fsdp_reshard_after_forward"
    if version == 1 and f"fsdp_config.{key}" not in flat:
        key = "fsdp_reshard_after_forward"
    stage = _stage(flat.get(f"fsdp_config.{key}", True), key, version)
    cp = size["cp"] or 1
    if stage == "hsdp":
        nodes = _whole(flat, "num_machines") or 1
        if world is None or world % nodes:
            raise InputError("HYBRID_SHARD needs num_processes, a multiple of num_machines")
        return {"zero": "hsdp", "hsdp_shard": world // nodes, "dp": world}
    settings: dict[str, Any] = {"zero": stage}
    if replicas > 1:
        if stage != "3" or shard is None:
            raise UnsupportedError("replicas of groups that do not shard everything are not modelled")
        settings = {"zero": "hsdp", "hsdp_shard": shard * cp}
    if shard is not None:
        settings["dp"] = replicas * shard
    elif world is not None:
        settings["dp"] = world // (size["tp"] or 1) // cp
    return settings


def _stage(again: Any, key: str, version: int) -> str:
    words = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
    stages = {
        "TRUE": "3",
        "FALSE": "2",
        "FULL_SHARD": "3",
        "SHARD_GRAD_OP": "2",
        "NO_SHARD": "0",
        "HYBRID_SHARD": "hsdp",
    }
    word = words.get(str(again), str(again).upper())
    if word not in stages or (version == 2 and word not in ("TRUE", "FALSE")):
        known = ("true", "false") if version == 2 else ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
        raise unknown_name(key, str(again), known)
    return stages[word]
