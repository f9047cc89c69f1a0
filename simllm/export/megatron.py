"""A plan as Megatron-LM's arguments.

Names and meanings are those of ``megatron/training/arguments.py`` of Megatron-LM with Megatron-Core 0.16.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from simllm.export.job import Exported, Job, refuse
from simllm.export.megatron_model import model_arguments
from simllm.parallel.plan import even_split, split_layers

__all__ = ["RECOMPUTE_MODULES", "write"]

_NAME = "Megatron-LM"
_STACKS = ("megatron-core", "megatron-bridge", "nemo", "megatron-lm")

_PRECISIONS: Mapping[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": True},
    "bf16": {"bf16": True},
    "fp8": {"bf16": True, "fp8-format": "hybrid"},
    "mxfp8": {"bf16": True, "fp8-format": "e4m3", "fp8-recipe": "mxfp8"},
    "nvfp4": {"bf16": True, "fp4-format": "e2m1"},
}

#: Submodules of selective recomputation whose outputs are dropped, by the operators that they stand for.
RECOMPUTE_MODULES: Mapping[str, tuple[str, ...]] = {
    "layernorm": ("mixer_norm", "mlp_norm"),
    "moe_act": ("expert_act",),
}


def write(job: Job) -> Exported:
    """A plan as arguments, one a line.

    Raises
    ------
    UnsupportedError
        Naming what of the plan or model Megatron-LM has no argument for.
    """
    plan, training = job.plan, job.training
    job.require_known(_NAME)
    if plan.schedule not in ("1f1b", "interleaved"):
        refuse(_NAME, f"schedule={plan.schedule}", "it runs 1F1B, interleaved with virtual stages")
    if plan.cp > 1 and training.seq_len % (2 * plan.cp):
        refuse(_NAME, f"cp={plan.cp} with seq_len={training.seq_len}", "it needs a multiple of 2 x cp")
    if plan.cp_heads > 1:
        _check_exchanged_heads(job)
    if plan.cp > 1 and "p2p" in plan.cp_comm_type:
        for attention in job.model.spec.attentions:
            if attention.sliding_window is not None and attention.sliding_window < training.seq_len:
                what = f"cp_comm_type={plan.cp_comm_type} with a window of {attention.sliding_window} tokens"
                refuse(_NAME, what, "TransformerEngine's ring has no windows; use all_gather or a2a")
    if plan.precision not in _PRECISIONS:
        refuse(_NAME, f"precision={plan.precision}", f"it has {', '.join(_PRECISIONS)}")
    model = model_arguments(job.model, job.config)
    model["max-position-embeddings"] = max(model.get("max-position-embeddings", 0), training.seq_len)
    if job.model.spec.decoder.positions and training.seq_len > job.model.spec.decoder.positions:
        refuse(_NAME, f"seq_len={training.seq_len}", f"the model has {job.model.spec.decoder.positions} positions")
    args = {
        **model,
        "seq-length": training.seq_len,
        "make-vocab-size-divisible-by": round(training.software.vocab_multiple.si),
        "tensor-model-parallel-size": plan.tp,
        "pipeline-model-parallel-size": plan.pp,
        "context-parallel-size": plan.cp,
        **({"cp-comm-type": plan.cp_comm_type} if plan.cp_comm_type != "p2p" else {}),
        **({"hierarchical-context-parallel-sizes": (plan.cp_a2a, plan.cp // plan.cp_a2a)} if plan.cp_a2a else {}),
        **({"sequence-parallel": True} if plan.sequence_parallel else {}),
        **_expert_arguments(job),
        **_stage_arguments(job),
        "micro-batch-size": plan.micro_batch_size,
        "global-batch-size": plan.global_batch_size,
        **_PRECISIONS[plan.precision],
        **_recompute_arguments(job),
        **_sharding_arguments(job),
        **_optimizer_arguments(job),
    }
    lines = [f"--{name}" if value is True else f"--{name} {_quoted(value)}" for name, value in args.items()]
    notes = [*job.stack_note(_STACKS), *job.routing_note()]
    left = ["data", "tokenizer", "learning rate", "checkpoints"]
    if args["position-embedding-type"] == "rope" and "rotary-base" not in args:
        left.append("--rotary-base")
    if "norm-epsilon" not in args:
        left.append("--norm-epsilon")
    notes.append(f"to be added, without effect on the cost: {', '.join(left)}")
    connections = "" if "use-megatron-fsdp" in args or plan.tp * plan.cp == 1 else "CUDA_DEVICE_MAX_CONNECTIONS=1 "
    launch = f"{connections}xargs -a FILE {job.torchrun} pretrain_gpt.py"
    return Exported(framework="megatron", text="\n".join(lines) + "\n", launch=launch, notes=tuple(notes))


def _check_exchanged_heads(job: Job) -> None:
    """TransformerEngine trades whole heads: it repeats none."""
    plan = job.plan
    for attention in job.model.spec.attentions:
        if attention.latent is None and max(1, attention.num_key_value_heads // plan.tp) % plan.cp_heads:
            heads = attention.num_key_value_heads
            what = f"cp_comm_type={plan.cp_comm_type} over {plan.cp_heads} ranks with {heads} key-value heads"
            refuse(_NAME, what, f"tp={plan.tp} x these ranks must divide the key-value heads; use a2a+p2p or p2p")


def _quoted(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_quoted, value))
    text = str(value)
    return text if re.fullmatch(r"[\w.+*\[\](),-]+", text) else shlex.quote(text)


def _expert_arguments(job: Job) -> dict[str, Any]:
    plan = job.plan
    if "experts" not in job.model.parameters.by_component:
        return {}
    if plan.ep > 1 and plan.precision == "fp16":
        refuse(_NAME, f"ep={plan.ep} in fp16", "its expert parallelism needs bf16 or fp32")
    args: dict[str, Any] = {"expert-model-parallel-size": plan.ep, "expert-tensor-parallel-size": plan.etp}
    factor = job.training.capacity_factor
    if factor is not None:
        args |= {"moe-expert-capacity-factor": factor, "moe-pad-expert-input-to-capacity": True}
    return args


def _stage_arguments(job: Job) -> dict[str, Any]:
    """How the layers are dealt out over pipeline ranks and their chunks."""
    plan, layers = job.plan, job.model.spec.num_hidden_layers
    chunks = plan.pp * plan.vpp
    if plan.pp == 1:
        return {}
    split = split_layers(layers, chunks, plan.uneven_layers)
    if plan.uneven_layers and even_split(layers, chunks) is None:
        parts = ["t" * size for size in split]
        parts[0], parts[-1] = f"E{parts[0]}", f"{parts[-1]}{'m' * _mtp(job)}L"
        return {"pipeline-model-parallel-layout": "|".join(parts)}
    args: dict[str, Any] = {}
    if layers % chunks:
        # One layer fewer in the last chunk, or in the first and the last.
        args["account-for-loss-in-pipeline-split"] = True
        if split[0] < max(split):
            args["account-for-embedding-in-pipeline-split"] = True
    if plan.vpp > 1:
        args["num-virtual-stages-per-pipeline-rank"] = plan.vpp
    return args


def _mtp(job: Job) -> int:
    return len(job.model.spec.multi_token_prediction)


def _recompute_arguments(job: Job) -> dict[str, Any]:
    policy, plan = job.plan.recompute, job.plan
    if policy.kind == "none":
        return {}
    if policy.kind == "selective":
        return {"recompute-granularity": "selective"}
    if policy.kind == "list":
        modules = _modules(policy.operators)
        if not modules:
            whole = "; ".join(f"{name}: {', '.join(operators)}" for name, operators in RECOMPUTE_MODULES.items())
            refuse(_NAME, f"recompute={policy}", f"its submodules are {whole}")
        return {"recompute-granularity": "selective", "recompute-modules": tuple(modules)}
    full = {"recompute-granularity": "full"}
    if policy.every == 1:
        return full | {"recompute-method": "uniform", "recompute-num-layers": 1}
    sizes = set(split_layers(job.model.spec.num_hidden_layers, plan.pp * plan.vpp, plan.uneven_layers))
    if len(sizes) > 1 or min(sizes) % policy.every:
        refuse(
            _NAME,
            f"recompute={policy}",
            f"it recomputes the same number of layers in every chunk, and {policy.every} does not divide the "
            f"{' and '.join(map(str, sorted(sizes)))} layers of a chunk",
        )
    return full | {"recompute-method": "block", "recompute-num-layers": min(sizes) // policy.every}


def _modules(operators: tuple[str, ...]) -> list[str]:
    """The submodules that stand for exactly these operators; none where there are no such."""
    rest, modules = set(operators), []
    for name, members in RECOMPUTE_MODULES.items():
        if rest.issuperset(members):
            rest -= set(members)
            modules.append(name)
    return [] if rest else modules


def _sharding_arguments(job: Job) -> dict[str, Any]:
    plan = job.plan
    if plan.zero == "0":
        return {"overlap-grad-reduce": True}
    overlapped = {"use-distributed-optimizer": True, "overlap-grad-reduce": True, "overlap-param-gather": True}
    if plan.zero == "1":
        groups = {"num-distributed-optimizer-instances": job.hsdp_groups(_NAME)} if plan.hsdp_shard else {}
        return overlapped | groups
    if plan.pp > 1:
        refuse(
            _NAME, f"zero={plan.zero} with pp={plan.pp}", "its FSDP goes with tensor, context and expert parallelism"
        )
    strategy = "optim_grads" if plan.zero == "2" else "optim_grads_params"
    args = overlapped | {"use-megatron-fsdp": True, "data-parallel-sharding-strategy": strategy}
    if plan.zero == "hsdp":
        args["num-distributed-optimizer-instances"] = job.hsdp_groups(_NAME)
    return args | {"no-gradient-accumulation-fusion": True, "ckpt-format": "fsdp_dtensor"}


def _optimizer_arguments(job: Job) -> dict[str, Any]:
    training, zero = job.training, job.plan.zero
    if training.master_weights is False:
        refuse(_NAME, "training without master weights", "its optimizers update parameters of more than 8 bits apart")
    args: dict[str, Any] = {}
    if training.optimizer in ("sgd", "sgd-momentum"):
        args |= {"optimizer": "sgd", "sgd-momentum": 0.0 if training.optimizer == "sgd" else 0.9}
    elif training.optimizer == "muon":
        if zero != "0":
            refuse(_NAME, f"muon with zero={zero}", "its Muon runs without the distributed optimizer")
        args |= {"optimizer": "muon", "ckpt-format": "torch"}
    elif training.optimizer == "adam":
        args["optimizer"] = "adam"
    else:
        refuse(_NAME, f"optimizer={training.optimizer}", "it has adam, sgd and muon")
    if not training.gradient_clipping:
        args["clip-grad"] = 0.0
    if training.gradient_precision is not None:
        wide = training.gradient_precision == "fp32"
        args["accumulate-allreduce-grads-in-fp32" if wide else "grad-reduce-in-bf16"] = True
    return args
