"""A plan as DeepSpeed's JSON, and the plan that such a file describes.

Names and meanings are those of ``deepspeed/runtime/config.py``, ``runtime/zero/config.py`` and
``runtime/precision_config.py`` of DeepSpeed 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.export.job import Elsewhere, Exported, Imported, Job, refuse
from simllm.export.keys import KeyRules

__all__ = ["read", "write"]

_NAME = "DeepSpeed"
_STACKS = ("megatron-deepspeed",)
_OPTIMIZERS = {"adam": "AdamW", "sgd": "SGD", "sgd-momentum": "SGD", "muon": "Muon", "adafactor": "Adafactor"}


def write(job: Job) -> Exported:
    """A plan as a DeepSpeed configuration.

    Raises
    ------
    UnsupportedError
        Naming what of the plan the JSON cannot express.
    """
    plan, training = job.plan, job.training
    job.require_known(_NAME)
    if plan.pp > 1:
        refuse(_NAME, f"pp={plan.pp}", "its stages are those of a PipelineModule in the code, not of the JSON")
    if plan.cp > 1 and plan.cp_comm_type != "a2a":
        refuse(_NAME, f"cp_comm_type={plan.cp_comm_type} with cp={plan.cp}", "it splits sequences by Ulysses: a2a")
    if plan.cp > 1 and plan.tp > 1:
        refuse(_NAME, f"cp={plan.cp} with tp={plan.tp}", "its Ulysses does not go with AutoTP")
    if plan.ep > 1 or plan.etp > 1:
        refuse(_NAME, f"ep={plan.ep} etp={plan.etp}", "its expert groups are those of MoE layers in the code")
    if plan.tp > 1 and plan.sequence_parallel:
        refuse(_NAME, f"tp={plan.tp} with sequence_parallel", "its AutoTP keeps whole sequences; plan without it")
    if plan.tp > 1 and plan.zero not in ("0", "1", "2"):
        refuse(_NAME, f"tp={plan.tp} with zero={plan.zero}", "its AutoTP goes with ZeRO 0, 1 and 2")
    if plan.hsdp_shard and plan.zero != "hsdp":
        refuse(_NAME, f"hsdp_shard={plan.hsdp_shard} with zero={plan.zero}", "it shards over all ranks")
    if plan.zero == "hsdp":
        refuse(_NAME, "zero=hsdp", "MiCS, which sharded inside groups, was removed from it; use zero=3")
    narrow = training.gradient_precision == "bf16" and plan.precision != "bf16"
    mixed = training.gradient_precision not in (None, plan.precision) and plan.zero == "0"
    if narrow or mixed:
        what = f"gradient_precision={training.gradient_precision} in {plan.precision} with zero={plan.zero}"
        refuse(_NAME, what, "without ZeRO gradients are of the parameters' precision, with it that or float32")
    document: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.num_micro_batches,
        **_precision(job),
        "zero_optimization": {"stage": int(plan.zero)} | ({"overlap_comm": True} if plan.zero != "0" else {}),
        **_optimizer(job),
    }
    if plan.cp > 1:
        document["sequence_parallel_size"] = plan.cp
    if plan.tp > 1:
        document["tensor_parallel"] = {"autotp_size": plan.tp}
    if training.capacity_factor is not None:
        refuse(_NAME, f"capacity_factor={training.capacity_factor:g}", "that is an argument of MoE layers in the code")
    if not training.gradient_clipping:  # otherwise to a norm of 1, its default
        document["gradient_clipping"] = 0.0
    if training.gradient_precision is not None:
        document["data_types"] = {"grad_accum_dtype": training.gradient_precision}
    elsewhere = [Elsewhere(option="--seq-len", value=str(training.seq_len), where="the data set")]
    if plan.recompute.kind != "none":
        where = "the model: gradient_checkpointing_enable(), or deepspeed.checkpointing around what runs again"
        elsewhere.append(Elsewhere(option="--recompute", value=str(plan.recompute), where=where))
    return Exported(
        framework="deepspeed",
        text=json.dumps(document, indent=2) + "\n",
        launch=f"deepspeed --num_nodes {job.nodes} --num_gpus {job.gpus_per_node} train.py --deepspeed_config FILE",
        elsewhere=tuple(elsewhere),
        notes=(*job.stack_note(_STACKS), "to be added, without effect on the cost: the learning rate in optimizer"),
    )


def _precision(job: Job) -> dict[str, Any]:
    precision, training = job.plan.precision, job.training
    if precision not in ("bf16", "fp16", "fp32"):
        refuse(_NAME, f"precision={precision}", "its JSON has bf16, fp16 and fp32")
    if training.master_weights is not False:
        return {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision != "bf16" or job.plan.zero == "0":
        refuse(_NAME, "training without master weights", "it has that in bf16 with ZeRO 1, 2 or 3")
    return {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


def _optimizer(job: Job) -> dict[str, Any]:
    name = job.training.optimizer
    if name not in _OPTIMIZERS:
        refuse(_NAME, f"optimizer={name}", f"its JSON names {', '.join(_OPTIMIZERS)}; others are made in the code")
    entry: dict[str, Any] = {"type": _OPTIMIZERS[name]}
    if name in ("sgd", "sgd-momentum"):
        entry["params"] = {"momentum": 0.0 if name == "sgd" else 0.9}
    # Optimizers that DeepSpeed does not bring itself are refused with ZeRO unless one insists.
    untested = name not in ("adam", "muon") and job.plan.zero != "0"
    return {"optimizer": entry} | ({"zero_allow_untested_optimizer": True} if untested else {})


# -- the way back --------------------------------------------------------------------------------------------------

_RULES = KeyRules(
    _NAME,
    used=(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "fp16.enabled",
        "bf16.enabled",
        "bfloat16.enabled",
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_param.device",
        "optimizer.type",
        "optimizer.params.momentum",
        "sequence_parallel_size",
        "tensor_parallel.autotp_size",
        "data_types.grad_accum_dtype",
        "gradient_clipping",
        "zero_allow_untested_optimizer",
    ),
    refused={
        "activation_checkpointing.partition_activations": "splitting saved activations over ranks",
        "activation_checkpointing.cpu_checkpointing": "keeping activations in host memory",
        "fp16.fp16_master_weights_and_grads": "fp16 master weights",
        "compression_training": "compression",
        "curriculum_learning": "sequences that grow",
        "sparse_attention": "sparse attention",
        "zero_optimization.zero_hpz_partition_size": "a second copy of the parameters inside a node (ZeRO++)",
        "zero_optimization.zero_quantized_weights": "quantised parameters on the wire (ZeRO++)",
        "zero_optimization.zero_quantized_gradients": "quantised gradients on the wire (ZeRO++)",
        "zero_optimization.mics_shard_size": "MiCS",
        "zero_optimization.zenflow": "ZenFlow",
        "pipeline": "a pipeline, whose stages the JSON does not state,",
        "expert_parallel": "expert parallelism by AutoEP",
    },
    software=(
        "communication_data_type",
        "compile",
        "prescale_gradients",
        "torch_autocast",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.allgather_partitions",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.reduce_scatter",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
    ),
    harmless=(
        "activation_checkpointing.profile",
        "checkpoint*",
        "comms_logger*",
        "csv_monitor*",
        "dataloader_drop_last",
        "data_efficiency*",
        "dump_state",
        "flops_profiler*",
        "fp16.*",
        "memory_breakdown",
        "monitor*",
        "optimizer.params.*",
        "scheduler*",
        "steps_per_print",
        "tensorboard*",
        "wall_clock_breakdown",
        "wandb*",
        "zero_optimization.gather_16bit_weights_on_model_save",
        "zero_optimization.ignore_unused_parameters",
        "zero_optimization.load_from_fp32_weights",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    ),
)


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of objects inside objects, joined by dots, without those that are switched off."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        if name in _RULES.refused:
            switch = value.get("enabled", bool(value)) if isinstance(value, Mapping) else value
            if switch not in (None, False, 0, 1) or switch is True:
                flat[name] = value
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif value is not None:
            flat[name] = value
    return flat


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"the key {key} is there twice")
    return dict(pairs)


def read(text: str, gpus: int | None = None) -> Imported:
    """The plan that a DeepSpeed configuration describes.

    Parameters
    ----------
    text : str
        The JSON.
    gpus : int, optional
        GPUs of the run, from which the global batch follows where it is not stated.

    Raises
    ------
    InputError
        It is not JSON, a value is of the wrong kind, or a key changes the cost in a way that is not modelled.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError("a DeepSpeed configuration is one JSON object")
    flat = _flat(document)
    stack = _STACKS[0]
    notes = [*_RULES.notes(flat, stack)]
    auto = sorted(key for key, value in flat.items() if value == "auto")
    if auto:
        notes.append(f"auto, for the trainer to fill in, and taken as not stated: {', '.join(auto)}")
        flat = {key: value for key, value in flat.items() if value != "auto"}
    notes.append(f"layers, states and overlap are those of {stack}; --stack names others")
    settings: dict[str, Any] = {"stack": stack, "sequence_parallel": False}
    stage = _whole(flat, "zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    settings["zero"] = str(stage)
    for what in ("optimizer", "param"):
        device = flat.get(f"zero_optimization.offload_{what}.device", "none")
        if device != "none":
            raise UnsupportedError(f"zero_optimization.offload_{what}.device={device}: offload is not modelled")
    settings["tp"] = tp = _whole(flat, "tensor_parallel.autotp_size", 1) or 1
    cp = _whole(flat, "sequence_parallel_size", 1) or 1
    if gpus is not None and gpus % (tp * cp):
        raise InputError(f"autotp_size={tp} x sequence_parallel_size={cp} does not divide {gpus} GPUs")
    if cp > 1:
        settings |= {"cp": cp, "cp_comm_type": "a2a"}
    settings |= (
        _read_batch(flat, None if gpus is None else gpus // (tp * cp)) | _read_precision(flat) | _read_optimizer(flat)
    )
    gradient = flat.get("data_types.grad_accum_dtype")
    if gradient is not None:
        settings["gradient_precision"] = gradient
    if flat.get("gradient_clipping", 1.0) == 0:
        settings["gradient_clipping"] = False
    return Imported(framework="deepspeed", settings=settings, notes=tuple(notes))


def _whole(flat: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    value = flat.get(key, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"{key}={value!r} must be a whole number")
    return value


def _read_batch(flat: Mapping[str, Any], dp: int | None) -> dict[str, int]:
    """The batch sizes; DeepSpeed lets one of three follow from the other two."""
    batch = _whole(flat, "train_batch_size")
    micro = _whole(flat, "train_micro_batch_size_per_gpu")
    steps = _whole(flat, "gradient_accumulation_steps")
    if batch and steps and not micro and dp:
        if batch % (dp * steps):
            raise InputError(
                f"train_batch_size={batch} is no multiple of gradient_accumulation_steps={steps} x dp={dp}"
            )
        micro = batch // (dp * steps)
    if micro and not batch and dp:
        batch = micro * (steps or 1) * dp
    if batch and micro and steps and dp and batch != micro * steps * dp:
        raise InputError(
            f"train_batch_size={batch} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps} x dp={dp} = {micro * steps * dp}"
        )
    if batch and not micro and not steps and dp:
        micro = batch // dp
    named = {"global_batch_size": batch, "micro_batch_size": micro}
    return {name: value for name, value in named.items() if value}


def _read_precision(flat: Mapping[str, Any]) -> dict[str, Any]:
    half, brain = bool(flat.get("fp16.enabled")), bool(flat.get("bf16.enabled") or flat.get("bfloat16.enabled"))
    if half and brain:
        raise InputError("fp16 and bf16 are both enabled; DeepSpeed takes one of them")
    settings: dict[str, Any] = {"precision": "bf16" if brain else "fp16" if half else "fp32"}
    narrow = flat.get("bf16.bf16_master_weights_and_grads"), flat.get("bf16.bf16_optimizer_states")
    if any(narrow):
        if not all(narrow):
            raise UnsupportedError("bf16 master weights with float32 optimizer states, or the reverse, is not modelled")
        settings["master_weights"] = False
    return settings


def _read_optimizer(flat: Mapping[str, Any]) -> dict[str, str]:
    given = flat.get("optimizer.type")
    if given is None:
        return {}
    names = {"adam": "adam", "adamw": "adam", "sgd": "sgd", "muon": "muon", "adafactor": "adafactor"}
    name = names.get(str(given).lower())
    if name is None:
        raise unknown_name("optimizer.type", str(given), names)
    return {"optimizer": "sgd-momentum" if name == "sgd" and flat.get("optimizer.params.momentum") else name}
