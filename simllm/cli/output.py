"""Where an answer goes: standard output or a file, as JSON or as text; files whole or not at all."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "ReaderGoneError",
    "check_output",
    "check_plot",
    "command_line",
    "emit",
    "progress",
    "remember_command",
    "write_file",
]

#: Rules and bars for an encoding without box drawing.
_PLAIN = str.maketrans({"─": "-", "█": "#"} | dict.fromkeys("▏▎▍▌▋▊▉", ""))

PLOT_FORMATS = ("png", "svg", "pdf")


_WORDS: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


class ReaderGoneError(Exception):
    """Whoever read standard output has closed it, as ``head`` does: no fault of anyone."""


def remember_command(words: Sequence[str]) -> None:
    """Keep the words of the command, for pages that say how they were made."""
    _WORDS.set(tuple(words))


def command_line() -> str:
    """The command as one would type it."""
    return shlex.join(("simllm", *_WORDS.get()))


def emit(
    document: Callable[[], Any],
    report: Callable[[], Iterable[RenderableType]],
    as_json: bool,
    output: str | None = None,
) -> None:
    """Print an answer, or write it to a file.

    Parameters
    ----------
    document : callable
        Makes the plain data of the JSON document.
    report : callable
        Makes the parts of the readable text.
    as_json : bool
        Which of the two.
    output : str, optional
        File to write to instead of standard output; a name ending in ``.json`` means JSON.
    """
    if as_json or (output is not None and output.lower().endswith(".json")):
        text = json.dumps(document(), indent=2, allow_nan=False) + "\n"
    else:
        from simllm.report.text import WIDTH, render

        terminal = output is None and sys.stdout.isatty()
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
        text = render(report(), width=width, colour=terminal and "NO_COLOR" not in os.environ)
    if output is None:
        _print(text)
    else:
        write_file(output, text.encode(errors="replace"), "--output")


def _print(text: str) -> None:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGoneError from None
    except OSError as error:
        raise InputError(f"cannot write to standard output: {error.strerror}") from None


def check_output(path: str | None, option: str = "--output", overwrite: bool = True, suffix: str = "") -> None:
    """Refuse a file that cannot be written before any work is done for it.

    Parameters
    ----------
    path : str, optional
        Nothing is checked without one.
    option : str
        Where it was given.
    overwrite : bool
        Whether a file that exists may be replaced.
    suffix : str
        How the name must end.
    """
    if path is None:
        return
    place = Path(path)
    if not path.lower().endswith(suffix):
        raise InputError(f"{option}={path} must end in {suffix}")
    try:
        if place.is_dir():
            raise InputError(f"{option}={path} is a folder; give the name of a file in it")
        if not place.parent.is_dir():
            raise InputError(f"{option}={path} cannot be written: there is no folder {str(place.parent)!r}")
        if place.is_file() and not overwrite:
            raise InputError(f"{option}={path} exists; give another name, or --overwrite to replace it")
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            raise InputError(f"{option}={path} cannot be written: permission denied; give another file")
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written: {error.strerror}") from None


def check_plot(path: str | None, overwrite: bool = True) -> str:
    """The format that the name of a picture asks for, after the checks of `check_output`."""
    check_output(path, "--plot", overwrite)
    suffix = Path(path or "").suffix.lower().removeprefix(".")
    if path is not None and suffix not in PLOT_FORMATS:
        raise InputError(f"--plot={path} must end in .{', .'.join(PLOT_FORMATS[:-1])} or .{PLOT_FORMATS[-1]}")
    return suffix


def write_file(path: str, content: bytes, option: str) -> None:
    """Write a file whole: beside its place first, then into it, so that nobody ever sees half of it.

    Raises
    ------
    InputError
        It cannot be written; what was there before is as it was.
    """
    place = Path(path).resolve()
    try:
        if place.exists() and not place.is_file():  # a pipe or a device: nothing to replace
            place.write_bytes(content)
            return
        handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(beside, place.stat().st_mode if place.exists() else 0o666 & ~_umask())
            os.replace(beside, place)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None] | None]:
    """Progress on standard error while that is a terminal; the line goes away at the end.

    Parameters
    ----------
    what : str
        What is counted.

    Yields
    ------
    callable or None
        To be called with the number done and, where it is known, how many there are. None without a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return

    def show(done: int, total: int | None = None) -> None:
        sys.stderr.write(f"\r\033[K{done}{f' of {total}' if total else ''} {what}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
