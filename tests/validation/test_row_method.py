"""The fine-tuning method of a published run, read from its task and notes."""

from __future__ import annotations

from pathlib import Path

import pytest

from simllm.validation.runs import validate_runs

TABLE = Path(__file__).parents[1] / "published" / "training_runs.csv"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    header, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if ",lora," in line]
    file = tmp_path_factory.mktemp("rows") / "lora.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return {result.id: result for result in validate_runs(file).rows}


def test_lora_runs_are_priced(lora: dict[str, object]) -> None:
    priced = [result for result in lora.values() if result.status == "ok"]  # type: ignore[attr-defined]
    assert len(lora) == 15
    assert len(priced) == 14  # one device is in no profile
    for result in priced:
        error = result.predicted_step_time_s / result.measured_step_time_s - 1  # type: ignore[attr-defined]
        # MLPerf's Llama-2-70B within a fifth; over TCP sockets, which the row's columns do not say, not at all.
        sockets = "sock" in result.id  # type: ignore[attr-defined]
        few = result.id.endswith("lora-4")  # type: ignore[attr-defined]
        assert sockets or abs(error) < (0.25 if few else 0.21), (result.id, error)  # type: ignore[attr-defined]


def test_rank_and_targets_are_those_of_the_notes(lora: dict[str, object]) -> None:
    stated = lora["cisco-h200-llama2-70b-lora-8-nv"].assumptions  # type: ignore[attr-defined]
    assert any("LoRA of rank 16 on q_proj, k_proj, v_proj, o_proj" in sentence for sentence in stated)
    mlperf = lora["R1484"].assumptions  # type: ignore[attr-defined]
    assert any("LoRA of rank 16 on q_proj" in sentence for sentence in mlperf)
