"""``simllm export``: a plan in the words of a training framework."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from simllm.cli.options import Json, count, load_model
from simllm.cli.output import check_output, emit, write_file
from simllm.errors import InputError

__all__ = ["export"]


def export(
    file: Annotated[
        str, typer.Argument(metavar="PLAN.json", help="The JSON of simllm plan or simllm estimate; - reads it.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="megatron, deepspeed, torchtitan or accelerate.")],
    number: Annotated[str, typer.Option("--plan", metavar="K", help="Which plan of a search, the best being 1.")] = "1",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The model, where the file does not hold its config."),
    ] = None,
    as_json: Json = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the framework's file to FILE.")
    ] = None,
) -> None:
    """Write a plan as the file of a training framework.

    The file goes to standard output or FILE, whole; what it cannot hold goes to standard error. A plan that the
    framework cannot run is refused with the reason.

    \b
    Example:
      simllm plan llama-3-8b --cluster dgx-h100 --gpus 64 --global-batch-size 256 \\
        --json -o plan.json
      simllm export plan.json --to megatron -o megatron-args.txt
    """
    from simllm import export as exports
    from simllm.report.exports import export_notes

    check_output(output)
    document = _read(file)
    job = exports.Job.from_document(document, count(number, "--plan"), None if model is None else load_model(model))
    exported = exports.export(job, to)
    if as_json:
        emit(exported.to_dict, tuple, True, output)
        return
    if output is None:
        sys.stdout.write(exported.text)
    else:
        write_file(output, exported.text.encode(), "--output")
    sys.stderr.write(export_notes(exported, output))


def _read(path: str) -> object:
    try:
        if path == "-":
            return json.load(sys.stdin)
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}; write it with simllm plan ... --json -o {path}") from None
