"""The table of strategies: kept, continued, judged."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from simllm.cli.app import run
from simllm.errors import InputError
from simllm.validation.execution.matrix import MODELS, STRATEGIES, MatrixRow, run_matrix

pytest.importorskip("torch", reason="the table names the torch that executed it")

PUBLISHED = Path(__file__).parents[2] / "published" / "torch_matrix.csv"


def test_the_published_table_is_whole_and_as_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    before = PUBLISHED.read_bytes()

    assert run(["validate", "torch", "--matrix", "--table", str(PUBLISHED)]) == 0

    assert PUBLISHED.read_bytes() == before  # nothing was missing, so nothing was executed
    out = capsys.readouterr().out
    assert "385 executed, 385 as predicted" in out
    with PUBLISHED.open(encoding="utf-8") as file:
        there = [MatrixRow.from_dict(record) for record in csv.DictReader(file)]
    assert {(row.model, row.strategy) for row in there} == {(model, name) for model in MODELS for name in STRATEGIES}
    assert max(abs(row.peak_error) for row in there) < 0.03


def test_a_table_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, executed = tmp_path / "matrix.csv", []

    def fake_run(pool: object, name: str, spec: object, strategy: str) -> MatrixRow:
        executed.append(strategy)
        if len(executed) == 2:
            raise KeyboardInterrupt
        return MatrixRow(
            model=name, strategy=strategy, plan="p", status="executed", compared=3, off=("peak memory", "FLOPs")
        )

    monkeypatch.setattr("simllm.validation.execution.matrix._run", fake_run)
    monkeypatch.setattr("simllm.validation.execution.pool.Pool", lambda *a, **k: SimpleNamespace(close=lambda: None))
    names = ("one rank", "DDP 2", "ZeRO-3 2")
    with pytest.raises(KeyboardInterrupt):
        run_matrix(["gpt3-175b"], names, path=kept)
    told: list[tuple[int, int]] = []
    rows = run_matrix(["gpt3-175b"], names, path=kept, progress=lambda done, of: told.append((done, of)))

    assert executed == ["one rank", "DDP 2", "DDP 2", "ZeRO-3 2"]
    assert told == [(2, 3), (3, 3)]
    assert [row.strategy for row in rows] == list(names)
    assert rows[0].off == ("peak memory", "FLOPs")
    assert not rows[0].ok


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,b\n1,2\n", "is not a table of executed strategies; its columns are model"), (None, "cannot be")],
)
def test_another_file_is_refused_as_it_is(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "other.csv" if text else tmp_path / "no" / "such.csv"
    if text:
        path.write_text(text)

    with pytest.raises(InputError, match=said):
        run_matrix(["gpt3-175b"], ["one rank"], path=path)

    assert not text or path.read_text() == text
    assert os.listdir(tmp_path) == (["other.csv"] if text else [])


def test_a_row_that_is_off_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [MatrixRow(model="gpt2", strategy="DDP 2", plan="p", status="executed", compared=3, off=("FLOPs",))]
    monkeypatch.setattr("simllm.validation.execution.matrix.run_matrix", lambda **k: rows)

    assert run(["validate", "torch", "--matrix"]) == 1
    assert run(["validate", "torch", "gpt2", "--table", "x.csv"]) == 2
