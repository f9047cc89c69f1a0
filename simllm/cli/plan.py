"""``simllm plan``: the best plans, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from simllm.cli.options import (
    ClusterName,
    FlopConvention,
    GlobalBatchSize,
    GradientPrecision,
    Headroom,
    Json,
    MasterWeights,
    ModelName,
    OptimizerName,
    Output,
    Price,
    SeqLen,
    StackName,
    Tokens,
    count,
    make_training,
    optional_price,
    optional_tokens,
)
from simllm.cli.output import check_output, emit, progress
from simllm.cli.plan_options import (
    Compare,
    Cp,
    Dp,
    Ep,
    GpuCounts,
    MaxDays,
    MaxGpus,
    MaxUsd,
    MicroBatchSizes,
    Mtp,
    Offloads,
    Policies,
    Pp,
    Precisions,
    Schedules,
    SequenceParallel,
    Tp,
    TpWithin,
    UnevenLayers,
    Vpp,
    ZeroStages,
    cluster_sizes,
    compared_plans,
    make_constraints,
)

__all__ = ["plan"]


def plan(
    model: ModelName,
    cluster: ClusterName,
    global_batch_size: GlobalBatchSize,
    gpus: GpuCounts = None,
    max_gpus: MaxGpus = None,
    seq_len: SeqLen = None,
    tokens: Tokens = None,
    top: Annotated[str, typer.Option("--top", metavar="K", help="How many plans to show.")] = "5",
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="time: the shortest step with all GPUs; cost: the fewest GPU-hours; gpus: the fewest GPUs.",
        ),
    ] = "time",
    precision: Precisions = "bf16",
    tp: Tp = None,
    pp: Pp = None,
    vpp: Vpp = None,
    cp: Cp = None,
    ep: Ep = None,
    dp: Dp = None,
    zero: ZeroStages = None,
    micro_batch_size: MicroBatchSizes = None,
    recompute: Policies = None,
    offload: Offloads = None,
    schedule: Schedules = None,
    sequence_parallel: SequenceParallel = None,
    uneven_layers: UnevenLayers = False,
    tp_within: TpWithin = "domain",
    max_days: MaxDays = None,
    max_usd: MaxUsd = None,
    compare: Compare = None,
    mtp: Mtp = False,
    stack: StackName = "megatron-core",
    memory_headroom: Headroom = "0.05",
    optimizer: OptimizerName = "adam",
    master_weights: MasterWeights = None,
    gradient_precision: GradientPrecision = None,
    flop_convention: FlopConvention = "full-attention",
    price: Price = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Find the best plans and say why they are.

    Exit status 1 when no plan fits; the answer is then the plan nearest to fitting, and what would have
    to change. Lists are written with commas: --tp 4,8.

    \b
    Example:
      simllm plan llama-3-70b --cluster dgx-h100 --gpus 512 --global-batch-size 1024 \\
        --seq-len 8192 --tokens 15T
    """
    from simllm import planner
    from simllm.models import Model
    from simllm.report.plans import search_dict, search_report
    from simllm.training.budget import budget

    check_output(output)
    run_tokens, usd = optional_tokens(tokens), optional_price(price)
    constraints = make_constraints(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        dp=dp,
        zero=zero,
        micro_batch_size=micro_batch_size,
        recompute=recompute,
        offload=offload,
        schedule=schedule,
        precision=precision,
        sequence_parallel=sequence_parallel,
        uneven_layers=uneven_layers,
        tp_within=tp_within,
        max_days=max_days,
        max_usd=max_usd,
    )
    loaded = Model.load(model, mtp=mtp)
    where, sizes = cluster_sizes(cluster, gpus, max_gpus)
    run = make_training(
        loaded, seq_len, stack, memory_headroom, optimizer, master_weights, gradient_precision, flop_convention
    )
    batch = count(global_batch_size, "--global-batch-size")
    with progress("plans priced") as tick:
        search = planner.plan(
            loaded,
            where,
            run,
            global_batch_size=batch,
            objective=objective,
            top=count(top, "--top", maximum=1000),
            constraints=constraints,
            sizes=sizes,
            tokens=run_tokens,
            usd_per_gpu_hour=usd,
            compare=compared_plans(compare, loaded, where, run, batch, constraints.precision[0]),
            progress=tick,
        )
    runs = [] if run_tokens is None else [budget(answer, run_tokens, usd) for answer in search.plans]
    emit(lambda: search_dict(search, runs), lambda: search_report(search, runs), as_json, output)
    if not search.plans:
        raise typer.Exit(1)
