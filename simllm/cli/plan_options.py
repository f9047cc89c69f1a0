"""The options of ``simllm plan`` that say what a plan has to satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from simllm.cli.options import count
from simllm.errors import InputError
from simllm.units import parse_positive

if TYPE_CHECKING:
    from simllm.hardware import Cluster
    from simllm.models import Model
    from simllm.models.context import CpCommType
    from simllm.parallel import Plan
    from simllm.planner import Constraints
    from simllm.training import Training

__all__ = [
    "Compare",
    "Cp",
    "CpCommTypes",
    "Dp",
    "Ep",
    "GpuCounts",
    "MaxDays",
    "MaxGpus",
    "MaxUsd",
    "MicroBatchSizes",
    "Mtp",
    "Offloads",
    "Policies",
    "Pp",
    "Precisions",
    "Schedules",
    "SequenceParallel",
    "Tp",
    "TpWithin",
    "UnevenLayers",
    "Vpp",
    "ZeroStages",
    "cluster_sizes",
    "compared_plans",
    "make_constraints",
]

GpuCounts = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N,...", help="GPUs in use: at most one node, or whole nodes; several to try."),
]
MaxGpus = Annotated[
    str | None, typer.Option("--max-gpus", metavar="N", help="At most so many GPUs, instead of --gpus.")
]
Mtp = Annotated[bool, typer.Option("--mtp", help="Train the multi-token-prediction modules too.")]
Precisions = Annotated[
    str,
    typer.Option("--precision", metavar="NAME,...", help="bf16, fp16, fp32, tf32, fp8, mxfp8, nvfp4; several to try."),
]
Tp = Annotated[str | None, typer.Option("--tp", metavar="N,...", help="Only these tensor-parallel degrees.")]
Pp = Annotated[str | None, typer.Option("--pp", metavar="N,...", help="Only these pipeline degrees.")]
Vpp = Annotated[str | None, typer.Option("--vpp", metavar="N,...", help="Only so many model chunks per pipeline rank.")]
Cp = Annotated[str | None, typer.Option("--cp", metavar="N,...", help="Only these context-parallel degrees.")]
CpCommTypes = Annotated[
    str | None,
    typer.Option(
        "--cp-comm-type",
        metavar="KIND,...",
        help="Context parallelism by p2p, all_gather, a2a or a2a+p2p; several to try. Default: what the stack does.",
    ),
]
Ep = Annotated[str | None, typer.Option("--ep", metavar="N,...", help="Only these expert-parallel degrees.")]
Dp = Annotated[str | None, typer.Option("--dp", metavar="N,...", help="Only these data-parallel degrees.")]
ZeroStages = Annotated[
    str | None, typer.Option("--zero", metavar="STAGE,...", help="Only these ways of sharding: 0, 1, 2, 3, hsdp.")
]
MicroBatchSizes = Annotated[
    str | None, typer.Option("--micro-batch-size", metavar="N,...", help="Only these micro-batches.")
]
Policies = Annotated[
    str | None, typer.Option("--recompute", metavar="POLICY,...", help="Only these: none, selective, full, every:N.")
]
Offloads = Annotated[
    list[str] | None,
    typer.Option(
        "--offload",
        metavar="WHAT",
        help="Only this off the devices, such as none or optimizer,gradients; may be repeated. Default: none.",
    ),
]
Schedules = Annotated[str | None, typer.Option("--schedule", metavar="NAME,...", help="Only these pipeline schedules.")]
SequenceParallel = Annotated[
    bool | None,
    typer.Option(
        "--sequence-parallel/--no-sequence-parallel",
        help="Only plans with it, or without. Default: both.",
        show_default=False,
    ),
]
UnevenLayers = Annotated[
    bool, typer.Option("--uneven-layers", help="Also interleave unequal chunks where equal ones exist.")
]
TpWithin = Annotated[
    str, typer.Option("--tp-within", metavar="REACH", help="Tensor parallelism inside a node, a domain or the cluster.")
]
MaxDays = Annotated[
    str | None, typer.Option("--max-days", metavar="D", help="Only plans that train --tokens in so many days.")
]
MaxUsd = Annotated[
    str | None, typer.Option("--max-usd", metavar="USD", help="Only plans that train --tokens for so much.")
]
Compare = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="PLAN", help="Also rank this plan, such as tp=8,pp=16,vpp=4; may be repeated."),
]


def make_constraints(
    *,
    tp: str | None,
    pp: str | None,
    vpp: str | None,
    cp: str | None,
    cp_comm_type: str | None,
    ep: str | None,
    dp: str | None,
    zero: str | None,
    micro_batch_size: str | None,
    recompute: str | None,
    offload: Sequence[str] | None,
    schedule: str | None,
    precision: str,
    sequence_parallel: bool | None,
    uneven_layers: bool,
    tp_within: str,
    max_days: str | None,
    max_usd: str | None,
) -> Constraints:
    """What the options ask of a plan."""
    from simllm.models.activations import Recompute
    from simllm.parallel.offload import Offload
    from simllm.planner import Constraints

    return Constraints(
        tp=_numbers(tp, "--tp"),
        pp=_numbers(pp, "--pp"),
        vpp=_numbers(vpp, "--vpp"),
        cp=_numbers(cp, "--cp"),
        cp_comm_type=cast("tuple[CpCommType, ...]", _words(cp_comm_type, "--cp-comm-type")),
        ep=_numbers(ep, "--ep"),
        dp=_numbers(dp, "--dp"),
        micro_batch_size=_numbers(micro_batch_size, "--micro-batch-size"),
        zero=_words(zero, "--zero"),
        schedule=_words(schedule, "--schedule"),
        precision=_words(precision, "--precision"),
        recompute=tuple(Recompute.parse(word) for word in _words(recompute, "--recompute")),
        offload=tuple(Offload.parse(text) for text in offload or ("none",)),
        sequence_parallel=sequence_parallel,
        uneven_layers=uneven_layers,
        tp_within=cast("Literal['node', 'domain', 'cluster']", tp_within),
        max_days=None if max_days is None else parse_positive(max_days, "--max-days"),
        max_usd=None if max_usd is None else parse_positive(max_usd, "--max-usd"),
    )


def _words(text: str | None, option: str) -> tuple[str, ...]:
    if text is None:
        return ()
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise InputError(f"{option}={text} names nothing; leave it out or write one value or more, with commas")
    return found


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    return tuple(count(word, option) for word in _words(text, option))


def cluster_sizes(name: str, gpus: str | None, max_gpus: str | None) -> tuple[Cluster, list[Cluster] | None]:
    """The largest cluster, and the sizes to try; None: those that the objective asks for."""
    from simllm.hardware import load_cluster
    from simllm.planner.sizes import at_most, exactly

    if (gpus is None) == (max_gpus is None):
        given = "neither is" if gpus is None else "both are"
        raise InputError(f"--gpus and --max-gpus: {given} given; write one of them, such as --gpus 512")
    if max_gpus is not None:
        where = load_cluster(name, count(max_gpus, "--max-gpus"))
        return where, at_most(where)
    numbers = _numbers(gpus, "--gpus")
    where = load_cluster(name, max(numbers))
    return where, exactly(where, numbers) if len(numbers) > 1 else None


def compared_plans(
    texts: Sequence[str] | None, model: Model, cluster: Cluster, training: Training, batch: int, precision: str
) -> list[Plan]:
    """The plans of --compare."""
    from simllm.planner.compare import parse_plan

    experts = "experts" in model.parameters.by_component
    return [parse_plan(text, cluster.num_gpus, batch, training, experts, precision) for text in texts or ()]
