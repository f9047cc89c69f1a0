"""``simllm plan``: the best plans, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simllm.cli.options import (
    CapacityFactor,
    CheckpointInterval,
    ClusterName,
    ExpertImbalance,
    FlopConvention,
    GlobalBatchSize,
    GradientClipping,
    GradientPrecision,
    GridIntensity,
    Headroom,
    Json,
    MasterWeights,
    ModelName,
    Mtbf,
    NodePower,
    OptimizerName,
    Output,
    Overwrite,
    Plot,
    Price,
    Pue,
    Report,
    Restart,
    Sensitivity,
    SeqLen,
    StackName,
    StorageBandwidth,
    Tokens,
    Trace,
    count,
    make_training,
    optional_operation,
    optional_tokens,
)
from simllm.cli.output import check_output, check_plot, command_line, emit, progress, write_file
from simllm.cli.plan_options import (
    Compare,
    Cp,
    CpCommTypes,
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

if TYPE_CHECKING:
    from simllm.hardware import Cluster
    from simllm.training import Estimate, Training

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
    cp_comm_type: CpCommTypes = None,
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
    gradient_clipping: GradientClipping = True,
    expert_imbalance: ExpertImbalance = "1",
    capacity_factor: CapacityFactor = None,
    flop_convention: FlopConvention = "full-attention",
    price: Price = None,
    mtbf: Mtbf = None,
    restart: Restart = None,
    storage_bandwidth: StorageBandwidth = None,
    checkpoint_interval: CheckpointInterval = None,
    node_power: NodePower = None,
    pue: Pue = None,
    grid_intensity: GridIntensity = None,
    sensitivity: Sensitivity = False,
    as_json: Json = False,
    output: Output = None,
    plot: Plot = None,
    report: Report = None,
    trace: Trace = None,
    overwrite: Overwrite = False,
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
    from simllm.planner.sensitivity import sensitivity as what_would_help
    from simllm.report.plans import search_dict, search_report
    from simllm.report.runs import run_report
    from simllm.report.sensitivities import sensitivity_report
    from simllm.training.budget import budget

    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    check_output(report, "--report", overwrite, ".html")
    check_output(trace, "--trace", overwrite, ".json")
    run_tokens = optional_tokens(tokens)
    operation = optional_operation(
        run_tokens, price, mtbf, restart, storage_bandwidth, checkpoint_interval, node_power, pue, grid_intensity
    )
    constraints = make_constraints(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        cp_comm_type=cp_comm_type,
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
        loaded,
        seq_len,
        stack,
        memory_headroom,
        optimizer,
        master_weights,
        gradient_precision,
        flop_convention,
        gradient_clipping,
        expert_imbalance,
        capacity_factor,
    )
    batch, shown = count(global_batch_size, "--global-batch-size"), count(top, "--top", maximum=1000)
    with progress("plans priced") as tick:
        search = planner.plan(
            loaded,
            where,
            run,
            global_batch_size=batch,
            objective=objective,
            top=shown,
            constraints=constraints,
            sizes=sizes,
            tokens=run_tokens,
            usd_per_gpu_hour=operation.usd_per_gpu_hour,
            compare=compared_plans(compare, loaded, where, run, batch, constraints.precision[0]),
            progress=tick,
        )

        def best(cluster: Cluster, training: Training, sequences: int) -> Estimate | None:
            found = planner.plan(
                loaded,
                cluster,
                training,
                global_batch_size=sequences,
                objective=objective,
                top=1,
                constraints=constraints,
                tokens=run_tokens,
                usd_per_gpu_hour=operation.usd_per_gpu_hour,
                progress=tick,
            )
            return found.plans[0] if found.plans else None

        changes = what_would_help(search.plans[0], search=best) if sensitivity and search.plans else ()
    runs = [] if run_tokens is None else [budget(answer, run_tokens, operation=operation) for answer in search.plans]
    if plot is not None and search.plans:
        from simllm.report.plan_plots import plot_plans

        write_file(plot, plot_plans(search.plans, picture), "--plot")
    if report is not None:
        from simllm.report.html import search_page

        write_file(report, search_page(search, runs, changes, command_line()), "--report")
    if trace is not None and search.plans:
        from simllm.report.trace import trace_json
        from simllm.training.timeline import step_timeline

        write_file(trace, trace_json(search.plans[0], step_timeline(search.plans[0])), "--trace")
    emit(
        lambda: search_dict(search, runs, changes),
        lambda: [
            *search_report(search, runs),
            *(run_report(runs[0]) if runs else []),
            *(sensitivity_report(changes) if changes else []),
        ],
        as_json,
        output,
    )
    if not search.plans:
        raise typer.Exit(1)
