"""``simllm plan``: the best plans, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from simllm.cli.options import (
    ClusterName,
    FlopConvention,
    GlobalBatchSize,
    Gpus,
    GradientPrecision,
    Headroom,
    Json,
    MasterWeights,
    ModelName,
    OptimizerName,
    Output,
    Precision,
    Price,
    SeqLen,
    StackName,
    Tokens,
    count,
    load_cluster,
    load_model,
    make_training,
    optional_price,
    optional_tokens,
)
from simllm.cli.output import check_output, emit, progress

__all__ = ["plan"]


def plan(
    model: ModelName,
    cluster: ClusterName,
    gpus: Gpus,
    global_batch_size: GlobalBatchSize,
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
    precision: Precision = "bf16",
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

    Exit status 1 when no plan fits; the answer is then the plan nearest to fitting.

    \b
    Example:
      simllm plan llama-3-70b --cluster dgx-h100 --gpus 512 --global-batch-size 1024 \\
        --seq-len 8192 --tokens 15T
    """
    from simllm import planner
    from simllm.report.plans import search_dict, search_report
    from simllm.training.budget import budget

    check_output(output)
    run_tokens, usd = optional_tokens(tokens), optional_price(price)
    loaded = load_model(model)
    where = load_cluster(cluster, gpus)
    run = make_training(
        loaded, seq_len, stack, memory_headroom, optimizer, master_weights, gradient_precision, flop_convention
    )
    with progress("plans priced") as tick:
        search = planner.plan(
            loaded,
            where,
            run,
            global_batch_size=count(global_batch_size, "--global-batch-size"),
            precision=precision,
            objective=objective,
            top=count(top, "--top", maximum=1000),
            progress=tick,
        )
    runs = [] if run_tokens is None else [budget(answer, run_tokens, usd) for answer in search.plans]
    emit(lambda: search_dict(search, runs), lambda: search_report(search, runs), as_json, output)
    if not search.plans:
        raise typer.Exit(1)
