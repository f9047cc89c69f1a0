"""Running the command line in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from simllm.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on standard output; NaN and Infinity are not JSON."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command given as one line or as words."""

    def run(*words: str) -> Result:
        status = main(words[0].split() if len(words) == 1 else list(words))
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return run
