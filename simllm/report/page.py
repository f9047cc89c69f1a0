"""One HTML page that needs nothing else: the parts of a report and pictures, all inside the file.

The page loads nothing (its own content security policy forbids it) and runs no script, so that it can be mailed, kept
and opened anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

__all__ = ["Picture", "html_page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff;
  margin: 0 auto; padding: 1.2rem 1.6rem 3rem; max-width: 74rem; }
h1 { font-size: 1.5rem; margin: 0.4rem 0; }
h1 small, h2 small { font-weight: normal; font-size: 0.95rem; color: #4d5a6b; margin-left: 0.6em; }
h2 { font-size: 1.12rem; margin: 1.9rem 0 0.4rem; border-bottom: 1px solid #d5dce4; padding-bottom: 0.2rem; }
table { border-collapse: collapse; margin: 0.5rem 0; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 1px solid #8b98a7; }
th, td { padding: 0.16rem 0.9rem 0.16rem 0; vertical-align: top; text-align: right; }
.left { text-align: left; }
.whole { white-space: nowrap; }
tbody tr:nth-child(even) { background: #f4f6f9; }
tr.stress { font-weight: 600; }
table.facts td { text-align: left; background: #fff; }
table.facts td:first-child { color: #4d5a6b; white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3.5rem; }
.scroll { overflow-x: auto; }
.bar { color: #4c78a8; letter-spacing: -0.05em; white-space: nowrap; }
figure { margin: 0.9rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #4d5a6b; font-size: 0.9rem; }
footer { margin-top: 2.5rem; color: #4d5a6b; font-size: 0.85rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a page.

    Attributes
    ----------
    svg : bytes
    caption : str
        What there is to see, also for people who do not see it.
    """

    svg: bytes
    caption: str


def html_page(title: str, parts: Iterable[RenderableType | Picture], footer: str) -> bytes:
    """A page of report parts and pictures.

    Parameters
    ----------
    title : str
    parts : iterable
        Headings, texts and tables as `simllm.report.text` makes them, and pictures. The first heading is that of the
        page.
    footer : str

    Examples
    --------
    >>> from simllm.report.text import facts, heading
    >>> page = html_page("a < b", [heading("a < b"), facts({"speed": "3 m/s"})], "made by hand").decode()
    >>> "<h1>a &lt; b</h1>" in page, "<td>speed</td><td>3 m/s</td>" in page
    (True, True)
    """
    body: list[str] = []
    for part in parts:
        markup = _part(part)
        if markup.startswith("<h2>") and not any(text.startswith("<h1>") for text in body):
            markup = markup.replace("h2>", "h1>")
        body.append(markup)
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    text = "\n".join(markup for markup in body if markup)
    return f"{head}{text}\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n".encode()


def _part(part: RenderableType | Picture) -> str:
    if isinstance(part, Picture):
        data = base64.b64encode(part.svg).decode()
        caption = escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Text):
        return _text(part)
    return f"<p>{escape(str(part))}</p>"


def _text(text: Text) -> str:
    """A heading is bold with a plain rest; an empty line is only there for terminals."""
    if not text.plain.strip():
        return ""
    if text.style != "bold":
        return f"<p>{escape(text.plain)}</p>"
    end = min((span.start for span in text.spans), default=len(text.plain))
    rest = text.plain[end:].strip()
    small = f"<small>{escape(rest)}</small>" if rest else ""
    return f"<h2>{escape(text.plain[:end])}{small}</h2>"


def _table(table: Table) -> str:
    columns = [list(column.cells) for column in table.columns]
    rows = list(zip(*columns, strict=True))
    if any(isinstance(cell, Table) for row in rows for cell in row):
        inner = "".join(f"<div>{_part(cell)}</div>" for row in rows for cell in row)
        return f'<div class="beside">{inner}</div>'
    if not table.show_header:
        lines = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f'<table class="facts"><tbody>{lines}</tbody></table>'
    sides = [_classes(column) for column in table.columns]
    heads = [_cell(column.header) for column in table.columns]
    header = "".join(f"<th{side}>{head}</th>" for side, head in zip(sides, heads, strict=True))
    lines = ""
    for row, settings in zip(rows, table.rows, strict=True):
        cells = "".join(f"<td{side}>{_cell(cell)}</td>" for side, cell in zip(sides, row, strict=True))
        stress = ' class="stress"' if settings.style == "bold" else ""
        lines += f"<tr{stress}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'


def _classes(column: Column) -> str:
    names = ["left"] * (column.justify == "left") + ["whole"] * column.no_wrap
    return f' class="{" ".join(names)}"' if names else ""


def _cell(cell: RenderableType) -> str:
    text = cell.plain if isinstance(cell, Text) else str(cell)
    return f'<span class="bar">{text}</span>' if text and not text.strip("█▏▎▍▌▋▊▉") else escape(text)
