"""``simllm align``: supervised fine-tuning, reward model, PPO, DPO and ORPO on a cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import typer

from simllm.cli.options import (
    ClusterName,
    Gpus,
    Headroom,
    Json,
    ModelName,
    OptimizerName,
    Output,
    Overwrite,
    Precision,
    SeqLen,
    StackName,
    count,
    load_cluster,
    load_model,
    make_training,
)
from simllm.cli.output import check_output, emit

__all__ = ["align"]


def align(
    task: Annotated[str, typer.Argument(metavar="TASK", help="sft, reward, dpo, orpo or ppo.")],
    model: ModelName,
    cluster: ClusterName,
    gpus: Gpus = "1",
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="How the models that learn are trained, as in finetune.")
    ] = "full",
    rank: Annotated[str | None, typer.Option("--rank", metavar="N", help="Rank of LoRA and its kin.")] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", metavar="NAMES", help="Modules, such as q_proj,v_proj, or all-linear.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="MODEL", help="What reward and value model are made of. Default: MODEL."),
    ] = None,
    global_batch_size: Annotated[
        str, typer.Option("--global-batch-size", metavar="N", help="Prompts per step; a pair is two sequences.")
    ] = "64",
    seq_len: SeqLen = None,
    prompt_len: Annotated[
        str | None, typer.Option("--prompt-len", metavar="S", help="ppo: tokens of a prompt. Default: half a sequence.")
    ] = None,
    epochs: Annotated[
        str, typer.Option("--epochs", metavar="N", help="ppo: times that responses are trained on.")
    ] = "1",
    placement: Annotated[
        str, typer.Option("--placement", metavar="NAME", help="ppo: together on the GPUs, or apart on as many each.")
    ] = "together",
    precision: Precision = "bf16",
    stack: StackName = "hf-peft",
    memory_headroom: Headroom = "0.05",
    optimizer: OptimizerName = "adam",
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """What a step of alignment takes: passes, memory of every model, the best plan.

    Exit status 1 when no plan fits; the answer is then the plan nearest to fitting.

    \b
    Example:
      simllm align ppo llama-2-7b --cluster dgx-a100 --gpus 8 --method lora --rank 16 --seq-len 1k
    """
    from simllm.models.finetuning import method_named
    from simllm.planner.align import plan_alignment
    from simllm.report.alignment import alignment_report

    check_output(output, overwrite=overwrite)
    loaded, where = load_model(model), load_cluster(cluster, gpus)
    options: dict[str, Any] = {}
    if rank is not None:
        options["rank"] = count(rank, "--rank")
    if targets is not None:
        options["targets"] = targets
    chosen = method_named(method, **options)
    run = make_training(loaded, seq_len, stack, memory_headroom, optimizer, None, None, "full-attention")
    found = plan_alignment(
        task,
        loaded,
        where,
        run,
        global_batch_size=count(global_batch_size, "--global-batch-size"),
        method=None if method == "full" else chosen,
        judge=None if judge is None else load_model(judge),
        prompt_len=0 if prompt_len is None else count(prompt_len, "--prompt-len"),
        placement=cast("Literal['together', 'apart']", placement),
        epochs=count(epochs, "--epochs"),
        precision=precision,
    )
    place = f"{where.num_gpus} x {where.accelerator.name} ({where.name}), sequences of {run.seq_len}"
    emit(found.to_dict, lambda: alignment_report(loaded, found.answer, place), as_json, output)
    if found.best is None:
        raise typer.Exit(1)
