"""The tree of commands, and what becomes of errors: one message on standard error and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from simllm.cli import align, calibrate, collective, estimate, export, finetune, hardware, models, plan, sweep, validate
from simllm.cli.output import ReaderGoneError, remember_command
from simllm.errors import InputError, unknown_name

__all__ = ["run"]

ANSWER, WRONG_INPUT, DEFECT, INTERRUPTED, PIPE_CLOSED = 0, 2, 70, 130, 141

# Typer carries its own copy of click or the package, by version; its public exception leads to the base of either.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """A group of commands that answers a mistyped name with the nearest ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise unknown_name("command", args[0], self.list_commands(ctx), f"(see {ctx.command_path} --help)")
        return super().resolve_command(ctx, args)


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(cls=_Group, help=help_text, rich_markup_mode=None, add_completion=False)


@cache
def _build() -> Any:
    app = typer.Typer(
        cls=_Group,
        rich_markup_mode=None,
        add_completion=False,
        context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name, help_text, commands in (
        ("models", "Count parameters, FLOPs and caches of models.", models.COMMANDS),
        ("hardware", "Look up and check hardware profiles.", hardware.COMMANDS),
        ("validate", "Hold predictions against measurements.", validate.COMMANDS),
        ("calibrate", "Turn measurements into the figures of profiles.", calibrate.COMMANDS),
    ):
        group = _group(help_text)
        for command, function in commands.items():
            group.command(command)(function)
        if name == "calibrate":
            group.callback(invoke_without_command=True, help=calibrate.machine.__doc__)(calibrate.machine)
        app.add_typer(group, name=name)
    app.command("collective")(collective.collective)
    app.command("estimate")(estimate.estimate)
    app.command("plan")(plan.plan)
    app.command("finetune")(finetune.finetune)
    app.command("align")(align.align)
    app.command("export")(export.export)
    app.command("sweep")(sweep.sweep)
    return get_command(app)


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What training a large language model costs on a cluster, and how to split it.

    \b
    Examples:
      simllm models show llama-3-70b
      simllm plan llama-3-70b --cluster dgx-h100 --gpus 512 --global-batch-size 1024 \\
        --seq-len 8192 --tokens 15T
      simllm estimate llama-3-8b --cluster dgx-h100 --gpus 8 --tp 2 --global-batch-size 64
      simllm collective all_reduce --size 1GiB --cluster dgx-h100 --gpus 64

    Every command takes --json and --help. Exit status: 0 an answer, 1 no plan fits or a check failed, 2 wrong input.
    """
    if version:
        from simllm import __version__

        sys.stdout.write(f"simllm {__version__}\n")
    elif ctx.invoked_subcommand is None:
        sys.stdout.write(f"{ctx.get_help()}\n")


def run(argv: Sequence[str] | None) -> int:
    """Run one command; every way out of it is an exit status."""
    try:
        status = _invoke(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except InputError as error:
        return _complain(str(error))
    except _UsageError as error:
        return _complain(_usage(error))
    except (BrokenPipeError, ReaderGoneError, SystemExit):  # typer exits when the reader of a help text has gone
        # The reader has seen enough. Standard output goes nowhere from here, or Python complains when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\n")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        sys.stderr.write("simllm: a defect of simllm, not of the input; please report it with the lines above\n")
        return DEFECT


def _invoke(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a narrow terminal encoding must not cost the answer
    remember_command(words)
    status = _build().main(words, prog_name="simllm", standalone_mode=False)
    return status if isinstance(status, int) else ANSWER


def _complain(message: str) -> int:
    sys.stderr.write(f"simllm: {' '.join(message.split())}\n")
    return WRONG_INPUT


def _usage(error: Any) -> str:
    """An error of the command line's own grammar in the words of the others."""
    ctx = error.ctx
    where = f"; see {ctx.command_path} --help" if ctx is not None else ""
    if hasattr(error, "possibilities"):
        near = get_close_matches(error.option_name, error.possibilities or (), n=2)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown option {error.option_name}{meant}{where if not near else ''}"
    if error.message == "Missing command." and ctx is not None:
        return f"{ctx.command_path} needs a command: {', '.join(ctx.command.list_commands(ctx))}{where}"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}{where}"
