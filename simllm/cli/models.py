"""``simllm models``: the catalog, and what can be counted without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, ModelName, Output, Overwrite, Plot, SeqLen, count, load_model, sequence_length
from simllm.cli.output import check_output, check_plot, emit, write_file

__all__ = ["COMMANDS", "compare", "list_models", "show"]


def list_models(
    family: Annotated[
        str | None, typer.Option("--family", metavar="NAME", help="Only this family, such as Llama-3.1.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """List the models of the catalog.

    \b
    Example:
      simllm models list --family Qwen3
    """
    from simllm.errors import unknown_name
    from simllm.models.catalog import catalog_entries
    from simllm.report.models import catalog_rows, catalog_table

    check_output(output, overwrite=overwrite)
    entries = catalog_entries()
    families = {entry.family.casefold(): entry.family for entry in entries}
    if family is not None and family.casefold() not in families:
        raise unknown_name("family", family, families.values())
    wanted = None if family is None else family.casefold()
    models = [load_model(entry.name) for entry in entries if wanted in (None, entry.family.casefold())]
    emit(lambda: catalog_rows(models), lambda: catalog_table(models), as_json, output)


def show(
    model: ModelName,
    seq_len: SeqLen = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Count the multi-token-prediction modules that the config states.")
    ] = False,
    vocab_multiple: Annotated[
        str | None,
        typer.Option(
            "--vocab-multiple",
            metavar="N",
            help="Pad the vocabulary to a multiple of N; Megatron-LM takes 128 times the tensor-parallel degree.",
        ),
    ] = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="Also what every operator of a layer keeps for the backward pass.")
    ] = False,
    conventions: Annotated[
        bool, typer.Option("--conventions", help="Also the FLOPs of training as various sources count them.")
    ] = False,
    plot: Plot = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Count one model: parameters, FLOPs, activations, key-value cache, components.

    \b
    Example:
      simllm models show llama-3-70b --seq-len 8k --plot llama.png
    """
    from simllm.models import Model
    from simllm.report.models import model_dict, model_report

    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    multiple = 1 if vocab_multiple is None else count(vocab_multiple, "--vocab-multiple", _LARGEST_MULTIPLE)
    loaded = Model.load(model, mtp=mtp, vocab_multiple=multiple)
    length = sequence_length(seq_len, loaded)
    emit(
        lambda: model_dict(loaded, length),
        lambda: model_report(loaded, length, activations, conventions),
        as_json,
        output,
    )
    if plot is not None:
        from simllm.report.model_plots import plot_model

        write_file(plot, plot_model(loaded, length, picture), "--plot")


#: More than any padding: Megatron-LM's 128 times a tensor-parallel degree of 8192.
_LARGEST_MULTIPLE = 2**20


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Two or more models, as in models show.")],
    seq_len: SeqLen = None,
    plot: Plot = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Put the counts of several models side by side, by default at the shortest of their default lengths.

    \b
    Example:
      simllm models compare llama-2-7b mistral-7b gemma-7b --seq-len 4k --plot sizes.svg
    """
    from simllm.report.models import comparison, model_dict

    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    loaded = [load_model(name) for name in models]
    length = min(sequence_length(seq_len, model) for model in loaded)
    emit(
        lambda: [model_dict(model, length) for model in loaded],
        lambda: comparison(loaded, length),
        as_json,
        output,
    )
    if plot is not None:
        from simllm.report.model_plots import plot_comparison

        write_file(plot, plot_comparison(loaded, length, picture), "--plot")


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_models, "show": show, "compare": compare}
