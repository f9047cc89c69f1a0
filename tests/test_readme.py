"""What the README shows is what the commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from simllm.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SESSIONS = re.findall(r"```console\n\$ (simllm (?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", README, re.DOTALL)


def steady(text: str) -> str:
    """Without what differs from run to run: the speed of a search, and trailing blanks."""
    text = re.sub(r"[\d,]+ priced a second", "N priced a second", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def test_there_are_sessions() -> None:
    assert len(SESSIONS) >= 3


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command[:60] for command, _ in SESSIONS])
def test_session(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(command.replace("\\\n", " "))[1:]
    status = main(arguments)
    assert status in (0, None)
    printed = steady(capsys.readouterr().out)
    for part in re.split(r"^\.\.\.$", steady(shown), flags=re.MULTILINE):
        assert part.strip() in printed
