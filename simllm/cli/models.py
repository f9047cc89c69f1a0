"""``simllm models``: the catalog, and what can be counted without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, ModelName, Output, SeqLen, load_model, sequence_length
from simllm.cli.output import check_output, emit

__all__ = ["COMMANDS", "compare", "list_models", "show"]


def list_models(
    family: Annotated[
        str | None, typer.Option("--family", metavar="NAME", help="Only this family, such as Llama-3.1.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """List the models of the catalog.

    \b
    Example:
      simllm models list --family Qwen3
    """
    from simllm.errors import unknown_name
    from simllm.models.catalog import catalog_entries
    from simllm.report.models import catalog_rows, catalog_table

    check_output(output)
    entries = catalog_entries()
    families = {entry.family.casefold(): entry.family for entry in entries}
    if family is not None and family.casefold() not in families:
        raise unknown_name("family", family, families.values())
    wanted = None if family is None else family.casefold()
    models = [load_model(entry.name) for entry in entries if wanted in (None, entry.family.casefold())]
    emit(lambda: catalog_rows(models), lambda: catalog_table(models), as_json, output)


def show(model: ModelName, seq_len: SeqLen = None, as_json: Json = False, output: Output = None) -> None:
    """Count one model: parameters, FLOPs, key-value cache, components.

    \b
    Example:
      simllm models show llama-3-70b --seq-len 8k
    """
    from simllm.report.models import model_dict, model_report

    check_output(output)
    loaded = load_model(model)
    length = sequence_length(seq_len, loaded)
    emit(lambda: model_dict(loaded, length), lambda: model_report(loaded, length), as_json, output)


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Two or more models, as in models show.")],
    seq_len: SeqLen = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Put the counts of several models side by side, by default at the shortest of their default lengths.

    \b
    Example:
      simllm models compare llama-2-7b mistral-7b gemma-7b --seq-len 4k
    """
    from simllm.report.models import comparison, model_dict

    check_output(output)
    loaded = [load_model(name) for name in models]
    length = min(sequence_length(seq_len, model) for model in loaded)
    emit(
        lambda: [model_dict(model, length) for model in loaded],
        lambda: comparison(loaded, length),
        as_json,
        output,
    )


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_models, "show": show, "compare": compare}
