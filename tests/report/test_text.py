"""The shapes that reports are made of."""

from __future__ import annotations

import pytest

from simllm.report.text import facts, heading, notes, paragraph, render, table


def test_columns_line_up_and_numbers_stand_to_the_right() -> None:
    text = render([table(("name", "size"), [("a", "1"), ("long", "1000")], left=("name",))])
    assert text.splitlines() == ["name  size", "──────────", "a        1", "long  1000"]


def test_only_wrapped_columns_take_several_lines() -> None:
    words = "one two three four five six seven eight nine ten"
    part = table(("key", "note"), [("k" * 30, words)], left=("key", "note"), wrap=("note",))
    lines = render([part], width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[2].startswith("k" * 30)
    assert " ".join(line[32:].strip() for line in lines[2:]) == words


@pytest.mark.parametrize("text", ["[bold]name[/bold]", "[/]", ":smile:", "a [link=x] b"])
def test_text_is_not_markup(text: str) -> None:
    parts = [paragraph(text), heading(text), facts({text: text}), table((text,), [(text,)])]
    assert render(parts).count(text) == 6


def test_styles_only_where_asked() -> None:
    assert "\x1b" not in render([heading("title", "rest")])
    assert render([heading("title", "rest")], colour=True).startswith("\x1b[1mtitle")


def test_environment_does_not_reach_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = render([heading("title"), facts({"a": "b " * 60})])
    for name, value in (("COLUMNS", "30"), ("FORCE_COLOR", "1"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    assert render([heading("title"), facts({"a": "b " * 60})]) == plain


def test_notes() -> None:
    assert notes("Notes", []) == []
    assert render(notes("Notes", ["x", "y"])) == "\nNotes\n- x\n- y\n"
    assert render(notes("Notes", ["x", "y"], first=9)) == "\nNotes\n 9. x\n10. y\n"
