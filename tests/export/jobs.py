"""Jobs that tests export, and the plan that an import makes of a file."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

from hypothesis import assume
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.export import Exported, Imported, Job
from simllm.models import Model
from simllm.models.activations import Recompute, second_products
from simllm.models.context import CP_COMM_TYPES
from simllm.parallel.plan import Plan, Zero, check_plan
from simllm.training import Training

MODELS = ("llama-3-8b", "llama-3.1-405b", "qwen3-8b", "qwen3-30b-a3b", "deepseek-v3", "gpt3-13b", "mixtral-8x7b")

#: What each framework can say, so that most of the plans drawn can be exported to it.
RANGES: dict[str, dict[str, Any]] = {
    "megatron": {
        "clipping": (True, True, False),
        "capacity": (None, None, 1.0, 1.25),
        "cp": (1, 1, 2, 4),
        "kinds": CP_COMM_TYPES,
        "models": MODELS,
        "sequence": (True, False),
        "recompute": ("none", "selective", "full", "every:2", "every:4", "list:mixer_norm,mlp_norm"),
        "pp": (1, 2, 3, 4, 8),
        "vpp": (1, 2, 3),
        "zero": ("0", "1", "2", "3", "hsdp"),
        "precision": ("bf16", "fp16", "fp32", "fp8", "mxfp8", "nvfp4"),
        "optimizer": ("adam", "sgd", "sgd-momentum", "muon"),
        "gradient": (None, "fp32", "bf16"),
        "stack": ("megatron-core",),
    },
    "deepspeed": {
        "clipping": (True, False),
        "capacity": (None,),
        "cp": (1, 1, 2, 4),
        "kinds": ("a2a",),
        "models": MODELS[:3],
        "sequence": (False,),
        "recompute": ("none", "selective", "full", "every:2"),
        "pp": (1,),
        "vpp": (1,),
        "zero": ("0", "1", "2", "3"),
        "precision": ("bf16", "fp16", "fp32"),
        "optimizer": ("adam", "sgd", "sgd-momentum", "muon", "adafactor"),
        "gradient": (None, "fp32", "bf16"),
        "stack": ("megatron-deepspeed",),
    },
    "torchtitan": {
        "clipping": (True,),
        "capacity": (None,),
        "cp": (1, 1, 2),
        "kinds": ("all_gather", "p2p"),
        "models": MODELS[:5],
        "sequence": (True,),
        "recompute": ("none", "full", "every:2", "every:4", "op"),
        "pp": (1, 2, 4, 8),
        "vpp": (1, 2, 3),
        "zero": ("0", "2", "3", "hsdp"),
        "precision": ("bf16", "fp32", "fp8", "mxfp8"),
        "optimizer": ("adam",),
        "gradient": (None,),
        "stack": ("torchtitan", "torchtitan-eager"),
    },
    "accelerate": {
        "clipping": (True, False),
        "capacity": (None,),
        "cp": (1, 1, 2),
        "kinds": ("all_gather", "p2p"),
        "models": MODELS[:3],
        "sequence": (False,),
        "recompute": ("none", "selective", "full", "every:2"),
        "pp": (1,),
        "vpp": (1,),
        "zero": ("0", "2", "3", "hsdp"),
        "precision": ("bf16", "fp16", "fp32"),
        "optimizer": ("adam", "sgd"),
        "gradient": (None,),
        "stack": ("torchtitan-eager", "torchtitan", "fsdp1", "fsdp1-compiled"),
    },
}


@cache
def model(name: str) -> Model:
    """A model of the catalog."""
    return Model.load(name)


@st.composite
def jobs(draw: st.DrawFn, framework: str) -> Job:
    """Jobs whose plans simllm accepts, of the kinds that a framework may know."""
    some = RANGES[framework]
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    chosen = model(pick(*some["models"]))
    moe = "experts" in chosen.parameters.by_component
    tp, pp, vpp = pick(1, 2, 4), pick(*some["pp"]), pick(*some["vpp"])
    cp, dp = pick(*some["cp"]), pick(1, 2, 4, 8)
    kind = pick(*some["kinds"]) if cp > 1 else "p2p"
    micro = pick(1, 2)
    ep = pick(1, 1, 2, 4, 8) if moe else 1
    recompute = pick(*some["recompute"])
    policy = second_products(chosen.graph.layers) if recompute == "op" else Recompute.parse(recompute)
    zero = pick(*some["zero"])
    shards = [n for n in range(1, dp * cp + 1) if (dp * cp) % n == 0]
    training = Training(
        seq_len=pick(2048, 4096, 8192),
        stack=pick(*some["stack"]),
        optimizer=pick(*some["optimizer"]),
        master_weights=pick(None, None, False),
        gradient_precision=pick(*some["gradient"]),
        gradient_clipping=pick(*some["clipping"]),
        capacity_factor=pick(*some["capacity"]) if moe else None,
    )
    try:
        plan = Plan(
            tp=tp,
            pp=pp,
            vpp=vpp if pp > 1 else 1,
            cp=cp,
            cp_comm_type=kind,
            cp_a2a=2 if kind == "a2a+p2p" else 0,
            ep=ep,
            etp=pick(1, tp) if moe else 1,
            dp=dp,
            zero=cast("Zero", zero),
            hsdp_shard=pick(*shards) if zero == "hsdp" or (zero == "1" and pick(True, False)) else 0,
            sequence_parallel=tp > 1 and pick(*some["sequence"]),
            micro_batch_size=micro,
            global_batch_size=dp * micro * pp * pick(1, 4),
            recompute=policy,
            precision=pick(*some["precision"]),
            schedule=("interleaved" if vpp > 1 else pick("1f1b", "1f1b", "gpipe")) if pp > 1 else "1f1b",
            uneven_layers=pp > 1 and pick(True, False),
        )
        check_plan(chosen, plan, training.seq_len)
    except InputError:
        assume(False)
    return Job(
        model=chosen,
        plan=plan,
        training=training,
        gpus_per_node=min(8, plan.num_gpus),
        config=chosen.config or {},
    )


def job(
    name: str = "llama-3-8b", gpus_per_node: int = 8, *, training: dict[str, Any] | None = None, **plan: Any
) -> Job:
    """A job with a few settings."""
    loaded = model(name)
    values: dict[str, Any] = {"dp": 8, "global_batch_size": 64} | plan
    run = Training(**({"seq_len": 4096} | (training or {})))
    return Job(model=loaded, plan=Plan(**values), training=run, gpus_per_node=gpus_per_node, config=loaded.config or {})


def settings_of(exported: Exported, imported: Imported) -> dict[str, Any]:
    """The settings of a file, completed by those that the export said are set elsewhere."""
    texts = {one.option.removeprefix("--").replace("-", "_"): one.value for one in exported.elsewhere}
    whole = ("seq_len", "micro_batch_size", "global_batch_size", "gpus")
    return dict(imported.settings) | {name: int(text) if name in whole else text for name, text in texts.items()}


def plan_of(settings: dict[str, Any], gpus: int) -> Plan:
    """The plan of settings, with the defaults of ``simllm estimate``."""
    names = set(Plan.__dataclass_fields__)
    values = {name: value for name, value in settings.items() if name in names}
    values.setdefault("dp", gpus // (values.get("tp", 1) * values.get("pp", 1) * values.get("cp", 1)))
    values["recompute"] = Recompute.parse(values.get("recompute", "none"))
    return Plan(**values)


def meaning(plan: Plan, layers: int) -> Plan:
    """A plan without what says nothing: unevenness of layers that divide, the order of recomputed operators."""
    from simllm.parallel.plan import even_split

    uneven = plan.uneven_layers and even_split(layers, plan.pp * plan.vpp) is None
    again = replace(plan.recompute, operators=tuple(sorted(plan.recompute.operators)))
    return replace(plan, uneven_layers=uneven, recompute=again)
