"""``simllm finetune``: a fine-tuning method, or all of them side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from simllm.cli.options import (
    FlopConvention,
    Gpus,
    GradientPrecision,
    Headroom,
    Json,
    MasterWeights,
    OptimizerName,
    Output,
    Overwrite,
    Precision,
    Price,
    SeqLen,
    StackName,
    Tokens,
    count,
    load_cluster,
    load_model,
    make_training,
    optional_operation,
    optional_tokens,
    sequence_length,
)
from simllm.cli.output import check_output, emit, progress
from simllm.errors import InputError

if TYPE_CHECKING:
    from simllm.models import Model

__all__ = ["finetune"]

Number = str | None


def _number(name: str, text: str) -> Any:
    return typer.Option(name, metavar="N", help=text)


def finetune(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="A model as for the other commands; compare MODEL lays all methods side by side."
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="full, freeze, bitfit, prompt, p-tuning, p-tuning-v2, prefix, houlsby, pfeiffer, llama-adapter, lora, "
            "lora+, dora, adalora, vera, ia3, qlora or galore.",
        ),
    ] = None,
    rank: Annotated[Number, _number("--rank", "Rank of LoRA and its kin, of GaLore's projection.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            metavar="NAMES",
            help="Modules by the model's own Hugging Face names, such as q_proj,v_proj, or all-linear.",
        ),
    ] = None,
    dropout: Annotated[
        str | None, typer.Option("--lora-dropout", metavar="P", help="Dropout in front of the low-rank pair.")
    ] = None,
    feedforward: Annotated[
        str | None, typer.Option("--feedforward", metavar="NAMES", help="IA3: targets whose input is scaled.")
    ] = None,
    virtual_tokens: Annotated[Number, _number("--virtual-tokens", "Learned tokens of prompts and prefixes.")] = None,
    projection: Annotated[
        bool, typer.Option("--projection", help="Prefix tuning with its reparameterisation.")
    ] = False,
    encoder_hidden_size: Annotated[
        Number, _number("--encoder-hidden-size", "Width of the network of p-tuning and of a projected prefix.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="NAME", help="Network of p-tuning: mlp or lstm.")
    ] = None,
    bottleneck: Annotated[Number, _number("--bottleneck", "Width of an adapter.")] = None,
    adapter_len: Annotated[Number, _number("--adapter-len", "LLaMA-Adapter: learned tokens of a layer.")] = None,
    adapter_layers: Annotated[Number, _number("--adapter-layers", "LLaMA-Adapter: the last so many layers.")] = None,
    top: Annotated[Number, _number("--top-layers", "freeze: train the last so many layers.")] = None,
    block: Annotated[Number, _number("--block", "QLoRA: elements that share a scale.")] = None,
    paged: Annotated[
        bool, typer.Option("--paged", help="QLoRA: optimizer states in pages of the host's memory.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="NAME", help="A system of the catalog or a YAML file; without it, counts only."
        ),
    ] = None,
    gpus: Gpus = "1",
    global_batch_size: Annotated[
        str, typer.Option("--global-batch-size", metavar="N", help="Sequences per optimizer step.")
    ] = "16",
    seq_len: SeqLen = None,
    tokens: Tokens = None,
    precision: Precision = "bf16",
    stack: StackName = "hf-peft",
    memory_headroom: Headroom = "0.05",
    optimizer: OptimizerName = "adam",
    master_weights: MasterWeights = None,
    gradient_precision: GradientPrecision = None,
    flop_convention: FlopConvention = "full-attention",
    price: Price = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """What a fine-tuning method trains and takes, or all methods side by side.

    Exit status 1 when no plan fits; the answer is then the plan nearest to fitting.

    \b
    Examples:
      simllm finetune llama-2-7b --method qlora --rank 16 --cluster tinybox-green --gpus 1 --seq-len 2k
      simllm finetune compare llama-2-7b --cluster dgx-a100 --gpus 1
    """
    from simllm import planner
    from simllm.report import finetuning as report
    from simllm.training.budget import budget

    check_output(output, overwrite=overwrite)
    run_tokens = optional_tokens(tokens)
    operation = optional_operation(run_tokens, price)
    comparing, name = _question(model)
    loaded = load_model(name)
    numbers = {
        "rank": rank,
        "virtual_tokens": virtual_tokens,
        "encoder_hidden_size": encoder_hidden_size,
        "bottleneck": bottleneck,
        "adapter_len": adapter_len,
        "adapter_layers": adapter_layers,
        "top": top,
        "block": block,
    }
    options: dict[str, Any] = {key: count(text, f"--{key.replace('_', '-')}") for key, text in numbers.items() if text}
    options |= {key: text for key, text in (("targets", targets), ("encoder", encoder)) if text is not None}
    if dropout is not None:
        options["dropout"] = _probability(dropout)
    if feedforward is not None:
        from simllm.models.finetuning.targets import parse_targets

        options["feedforward"] = parse_targets(feedforward)
    options |= {key: True for key, on in (("projection", projection), ("paged", paged)) if on}
    if comparing and (options or method):
        raise InputError("compare takes no method and none of its options; it lays all methods side by side")
    if not comparing and method is None:
        raise InputError(f"--method is missing; give one, such as --method lora, or ask for: finetune compare {name}")
    tuned = loaded if comparing else loaded.finetuned(method or "", **options)
    if cluster is None:
        if comparing:
            raise InputError("compare needs --cluster, to compare memory and time on")
        emit(lambda: report.counts_dict(tuned), lambda: report.counts_report(tuned), as_json, output)
        return
    where = load_cluster(cluster, gpus)
    run = make_training(
        loaded,
        _length(seq_len, loaded, tuned),
        stack,
        memory_headroom,
        optimizer,
        master_weights,
        gradient_precision,
        flop_convention,
    )
    batch = count(global_batch_size, "--global-batch-size")
    with progress("plans priced") as tick:
        if comparing:
            answers = planner.compare_methods(
                loaded, where, run, global_batch_size=batch, precision=precision, progress=tick
            )
        else:
            answer = planner.finetune(tuned, where, run, global_batch_size=batch, precision=precision, progress=tick)
    if comparing:
        emit(
            lambda: report.comparison_dict(answers),
            lambda: report.comparison_report(loaded, answers, run_tokens),
            as_json,
            output,
        )
        return
    cost = None
    if answer.fits and answer.best and run_tokens is not None:
        cost = budget(answer.best, run_tokens, operation=operation)
    emit(lambda: report.finetune_dict(answer, cost), lambda: report.finetune_report(answer, cost), as_json, output)
    if not answer.fits:
        raise typer.Exit(1)


def _question(words: list[str]) -> tuple[bool, str]:
    """Whether methods are compared, and of which model."""
    if words[0] == "compare" and len(words) == 2:
        return True, words[1]
    if len(words) == 1 and words[0] != "compare":
        return False, words[0]
    raise InputError(f"finetune takes one model, or compare and one model; given: {' '.join(words)}")


def _probability(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--lora-dropout={text} must be a number from 0 to 1, such as 0.05") from None


def _length(text: str | None, model: Model, tuned: Model) -> str:
    """The length asked for; the default leaves room for learned tokens."""
    length = sequence_length(text, model)
    # A comparison leaves the room that its methods with learned tokens need.
    room = tuned.method.context_tokens if tuned.method else 20
    context = model.spec.context_length
    if text is None and context is not None and length + room > context:
        length = context - room
    return str(length)
