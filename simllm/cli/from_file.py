"""Settings of ``simllm estimate`` out of the file of a training framework; what is given on the command line wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from simllm.cli.options import count, load_model
from simllm.errors import InputError

if TYPE_CHECKING:
    from simllm.models import Model

__all__ = ["needed", "notes_of", "the_model", "with_file"]

#: Settings that are on or off, by the names of their parameters; all others are words.
_SWITCHES = ("sequence_parallel", "uneven_layers", "master_weights", "gradient_clipping")


def with_file(ctx: typer.Context, path: str) -> dict[str, Any]:
    """The parameters of the command, completed from a file.

    Parameters
    ----------
    ctx : typer.Context
        Of the command; the model and the notes of the file are kept in it.
    path : str
        The file.
    """
    from simllm.export import read_settings

    values = dict(ctx.params)
    found = read_settings(path, count(values["gpus"], "--gpus"))
    given = [name for name in values if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    won = [name for name in found.settings if name in given]
    for name, value in found.settings.items():
        if name not in given:
            values[name] = value if name in _SWITCHES or value is None else str(value)
    taken = [f"{name}={value}" for name, value in found.settings.items() if name not in won]
    notes = [f"from {path} ({found.framework}): {', '.join(taken)}", *found.notes]
    if won:
        notes.append(f"given on the command line, whatever the file says: {', '.join(sorted(won))}")
    if found.model is not None and values["model"] is not None:
        notes.append(f"the model is {values['model']}, whatever the file says")
    ctx.meta["simllm.model"], ctx.meta["simllm.notes"] = found.model, tuple(notes)
    return values | {"from_file": None}


def the_model(ctx: typer.Context, name: str | None) -> Model:
    """The model that is given, or that of the file."""
    found: Model | None = ctx.meta.get("simllm.model")
    return found if name is None and found is not None else load_model(needed(ctx, name, "argument", "MODEL"))


def needed(ctx: typer.Context, value: str | None, kind: str, name: str) -> str:
    """A value that neither the command line nor a file need have given.

    Raises
    ------
    InputError
        Neither has.
    """
    if value is None:
        where = ", which the file does not say" if "simllm.notes" in ctx.meta else ""
        raise InputError(f"missing {kind} '{name}'{where}; see {ctx.command_path} --help")
    return value


def notes_of(ctx: typer.Context) -> tuple[str, ...]:
    """What was assumed in reading the file; nothing without one."""
    return tuple(ctx.meta.get("simllm.notes", ()))
