"""Tables as text: the few shapes that all reports are made of, and their rendering at a fixed width."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["WIDTH", "facts", "heading", "notes", "paragraph", "render", "table"]

#: Columns of a report; a terminal is rarely narrower, and a file or a pipe has no width of its own.
WIDTH = 100


def render(parts: Iterable[RenderableType], width: int = WIDTH, colour: bool = False) -> str:
    """A report as text.

    Parameters
    ----------
    parts : iterable of rich renderables
        Printed below each other.
    width : int
        Columns; nothing is wider.
    colour : bool
        Whether to write ANSI styles.

    Examples
    --------
    >>> render([facts({"speed": "3 m/s", "mass": "2 kg"})])
    'speed  3 m/s\\nmass   2 kg\\n'
    """
    # No markup: a name with brackets in it is a name. Nothing is taken from the terminal but what the caller says.
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        markup=False,
        emoji=False,
        highlight=False,
        _environ={},
    )
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def heading(text: str, rest: str = "") -> Text:
    """A line that begins a report or a part of it."""
    line = Text(text, style="bold")
    return line.append(f"  {rest}", style="not bold") if rest else line


def paragraph(text: str) -> Text:
    """Running text."""
    return Text(text)


def facts(rows: Mapping[str, str]) -> Table:
    """What is what: a name and a value a line, without rules."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Sequence[str] = (),
    wrap: Sequence[str] = (),
    bold: int = -1,
) -> Table:
    """Rows of values under headers.

    Parameters
    ----------
    columns : sequence of str
        Headers.
    rows : iterable of sequences of str
    left : sequence of str
        Headers of the columns that are words; the others are numbers and stand to the right.
    wrap : sequence of str
        Headers of the columns that may take several lines.
    bold : int
        A row to stress; none when negative.
    """
    result = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_edge=False)
    for name in columns:
        result.add_column(name, justify="left" if name in left else "right", no_wrap=name not in wrap, overflow="fold")
    for number, row in enumerate(rows):
        result.add_row(*row, style="bold" if number == bold else None)
    return result


def notes(title: str, lines: Sequence[str], first: int | None = None) -> list[RenderableType]:
    """A list of sentences under a title, numbered from ``first`` where that is given; nothing when there are none."""
    if not lines:
        return []
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(overflow="fold")
    for number, line in enumerate(lines, start=first or 0):
        grid.add_row("-" if first is None else f"{number}.", line)
    return [Text(), heading(title), grid]
