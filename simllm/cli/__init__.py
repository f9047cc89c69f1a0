"""The command line: one module a command, no arithmetic here."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Words after the program's name; those of the process when omitted.

    Returns
    -------
    int
        0 for an answer, 1 when no plan fits or a check failed, 2 for wrong input, 130 after an interruption.
    """
    # Typer is half of the start-up time; who only imports simllm.cli does not pay for it.
    from simllm.cli.app import run

    return run(argv)
