"""``simllm estimate``: time, memory and money of one plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast

import typer

from simllm.cli.from_file import needed, notes_of, the_model, with_file
from simllm.cli.options import (
    CapacityFactor,
    CheckpointInterval,
    ClusterName,
    ExpertImbalance,
    FlopConvention,
    Gpus,
    GradientClipping,
    GradientPrecision,
    GridIntensity,
    Headroom,
    Json,
    MasterWeights,
    MaybeGlobalBatchSize,
    MaybeModelName,
    Mtbf,
    NodePower,
    OptimizerName,
    Output,
    Overwrite,
    Plot,
    Precision,
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
    load_cluster,
    make_training,
    optional_operation,
    optional_tokens,
)
from simllm.cli.output import check_output, check_plot, command_line, emit, write_file
from simllm.errors import InputError

if TYPE_CHECKING:
    from simllm.hardware import Cluster
    from simllm.models import Model
    from simllm.models.context import CpCommType
    from simllm.parallel.plan import Zero

__all__ = ["estimate"]


def estimate(
    ctx: typer.Context,
    *,
    model: MaybeModelName = None,
    cluster: ClusterName,
    gpus: Gpus,
    global_batch_size: MaybeGlobalBatchSize = None,
    from_file: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Take what is not given from a framework's file: DeepSpeed's .json, torchtitan's .toml, accelerate's "
            ".yaml, Megatron-LM's arguments in a .txt or .sh. Options given here win.",
        ),
    ] = None,
    micro_batch_size: Annotated[
        str, typer.Option("--micro-batch-size", metavar="N", help="Sequences per data-parallel rank and micro-step.")
    ] = "1",
    seq_len: SeqLen = None,
    tp: Annotated[str, typer.Option("--tp", metavar="N", help="Tensor parallelism.")] = "1",
    pp: Annotated[str, typer.Option("--pp", metavar="N", help="Pipeline parallelism.")] = "1",
    vpp: Annotated[str, typer.Option("--vpp", metavar="N", help="Model chunks per pipeline rank.")] = "1",
    cp: Annotated[str, typer.Option("--cp", metavar="N", help="Context parallelism.")] = "1",
    cp_comm_type: Annotated[
        str | None,
        typer.Option(
            "--cp-comm-type",
            metavar="KIND",
            help="Context parallelism by p2p, all_gather, a2a (Ulysses) or a2a+p2p. Default: what the stack does.",
        ),
    ] = None,
    cp_a2a: Annotated[
        str | None,
        typer.Option(
            "--cp-a2a",
            metavar="N",
            help="Ranks that trade tokens for heads with a2a+p2p. Default: the most that divide the heads in a domain.",
        ),
    ] = None,
    ep: Annotated[str, typer.Option("--ep", metavar="N", help="Expert parallelism.")] = "1",
    etp: Annotated[
        str | None,
        typer.Option("--etp", metavar="N", help="Tensor parallelism in an expert. Default: what the stack does."),
    ] = None,
    dp: Annotated[
        str | None,
        typer.Option("--dp", metavar="N", help="Data parallelism. Default: the GPUs over tp x pp x cp."),
    ] = None,
    zero: Annotated[
        str, typer.Option("--zero", metavar="STAGE", help="What data parallelism shards: 0, 1, 2, 3 or hsdp.")
    ] = "1",
    hsdp_shard: Annotated[
        str | None,
        typer.Option("--hsdp-shard", metavar="N", help="Ranks that share a copy in hsdp. Default: the domain's."),
    ] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Split activations outside tensor parallelism too. Default: with tp above 1.",
            show_default=False,
        ),
    ] = None,
    precision: Precision = "bf16",
    recompute: Annotated[
        str,
        typer.Option("--recompute", metavar="POLICY", help="none, selective, full, every:N or list:OPERATOR,OPERATOR."),
    ] = "none",
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, zb-1p, zb-2p, zb-v, interleaved-zb, dualpipe "
            "or dualpipe-v. Default: 1f1b, interleaved with vpp.",
        ),
    ] = None,
    uneven_layers: Annotated[
        bool,
        typer.Option("--uneven-layers", help="Deal out layers that the pipeline does not divide all the same."),
    ] = False,
    offload: Annotated[
        str,
        typer.Option(
            "--offload",
            metavar="STATES",
            help="Kept on the host: optimizer, gradients, parameters, activations, joined by commas; with :nvme on its "
            "drives.",
        ),
    ] = "none",
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Run the pipeline event by event, exact for uneven stages; schedules without a "
            "closed form always are.",
        ),
    ] = False,
    stack: StackName = "megatron-core",
    memory_headroom: Headroom = "0.05",
    optimizer: OptimizerName = "adam",
    master_weights: MasterWeights = None,
    gradient_precision: GradientPrecision = None,
    gradient_clipping: GradientClipping = True,
    expert_imbalance: ExpertImbalance = "1",
    capacity_factor: CapacityFactor = None,
    flop_convention: FlopConvention = "full-attention",
    tokens: Tokens = None,
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
    """Estimate the time and memory of one plan.

    \b
    Examples:
      simllm estimate llama-3-70b --cluster dgx-h100 --gpus 512 --tp 8 --pp 4 \\
        --global-batch-size 1024 --seq-len 8k --tokens 15T
      simllm estimate --from megatron-args.txt --cluster dgx-h100 --gpus 512
      simllm estimate llama-3-8b --from ds_config.json --cluster dgx-h100 --gpus 64
    """
    from simllm import training
    from simllm.models.activations import Recompute
    from simllm.parallel.offload import Offload
    from simllm.parallel.plan import Plan
    from simllm.planner.sensitivity import sensitivity as what_would_help
    from simllm.report.estimates import estimate_dict, estimate_report
    from simllm.report.runs import run_report
    from simllm.report.sensitivities import sensitivity_report
    from simllm.training.budget import budget

    if from_file is not None:
        estimate(ctx, **with_file(ctx, from_file))
        return
    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    check_output(report, "--report", overwrite, ".html")
    check_output(trace, "--trace", overwrite, ".json")
    run_tokens = optional_tokens(tokens)
    operation = optional_operation(
        run_tokens, price, mtbf, restart, storage_bandwidth, checkpoint_interval, node_power, pue, grid_intensity
    )
    tensor, pipeline, chunks, context = count(tp, "--tp"), count(pp, "--pp"), count(vpp, "--vpp"), count(cp, "--cp")
    loaded = the_model(ctx, model)
    where = load_cluster(cluster, gpus)
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
    default_etp = run.expert_tensor_parallel(tensor) if "experts" in loaded.parameters.by_component else 1
    kind = run.context_kind(context) if cp_comm_type is None else cast("CpCommType", cp_comm_type)
    split = Plan(
        tp=tensor,
        pp=pipeline,
        vpp=chunks,
        cp=context,
        cp_comm_type=kind,
        cp_a2a=_heads_exchanged(loaded, where, kind, tensor, context) if cp_a2a is None else count(cp_a2a, "--cp-a2a"),
        ep=count(ep, "--ep"),
        etp=default_etp if etp is None else count(etp, "--etp"),
        dp=_data_parallel(where.num_gpus, tensor, pipeline, context) if dp is None else count(dp, "--dp"),
        zero=cast("Zero", zero),
        hsdp_shard=0 if hsdp_shard is None else count(hsdp_shard, "--hsdp-shard"),
        sequence_parallel=tensor > 1 if sequence_parallel is None else sequence_parallel,
        micro_batch_size=count(micro_batch_size, "--micro-batch-size"),
        global_batch_size=count(needed(ctx, global_batch_size, "option", "--global-batch-size"), "--global-batch-size"),
        recompute=Recompute.parse(recompute),
        precision=precision,
        schedule=schedule or ("interleaved" if chunks > 1 else "1f1b"),
        uneven_layers=uneven_layers,
        offload=Offload.parse(offload),
    )
    answer = replace(training.estimate(loaded, where, split, run, simulate=simulate), notes=notes_of(ctx))
    cost = None if run_tokens is None else budget(answer, run_tokens, operation=operation)
    changes = what_would_help(answer) if sensitivity else ()
    if plot is not None:
        from simllm.report.plots import plot_estimate

        write_file(plot, plot_estimate(answer, picture), "--plot")
    if report is not None:
        from simllm.report.html import estimate_page

        write_file(report, estimate_page(answer, cost, changes, command_line()), "--report")
    if trace is not None:
        from simllm.report.trace import trace_json
        from simllm.training.timeline import step_timeline

        write_file(trace, trace_json(answer, step_timeline(answer)), "--trace")
    emit(
        lambda: estimate_dict(answer, cost, changes),
        lambda: [
            *estimate_report(answer, cost),
            *(run_report(cost) if cost else []),
            *(sensitivity_report(changes) if changes else []),
        ],
        as_json,
        output,
    )


def _heads_exchanged(model: Model, cluster: Cluster, kind: str, tp: int, cp: int) -> int:
    """The ranks of the inner level where context parallelism has two."""
    from simllm.parallel.plan import inner_degree

    return inner_degree(model.spec.attentions, tp, cp, cluster.gpus_per_domain) if kind == "a2a+p2p" else 0


def _data_parallel(gpus: int, tp: int, pp: int, cp: int) -> int:
    """What the other degrees leave of the GPUs."""
    replica = tp * pp * cp
    if gpus % replica:
        raise InputError(
            f"tp={tp} x pp={pp} x cp={cp} = {replica} does not divide the {gpus} GPUs; "
            f"give degrees whose product divides {gpus}"
        )
    return gpus // replica
