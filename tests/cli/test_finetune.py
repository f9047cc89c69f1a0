"""``simllm finetune`` and ``simllm align``: keys, tables, wrong input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from simllm.cli.app import run

ONE = ("--cluster", "dgx-a100", "--gpus", "1", "--seq-len", "1k")


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = run(list(words))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_counts_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("finetune", "llama-7b", "--method", "lora", "--rank", "8", "--targets", "q_proj,v_proj")
    status, out, _ = ask(capsys, *words, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["trainable_parameters"] == 4194304
    assert answer["total_parameters"] == 6742609920
    assert "4,194,304 of 6,742,609,920" in ask(capsys, *words)[1]


def test_with_a_cluster_the_keys_of_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("finetune", "llama-2-7b", "--method", "qlora", "--rank", "16", *ONE, "--tokens", "1M")
    status, out, _ = ask(capsys, *words, "--json")
    answer = json.loads(out)
    assert status == 0
    keys = {"trainable_parameters", "total_parameters", "step_time_s", "step_time_interval_s", "tokens_per_s_per_gpu"}
    keys |= {"model_tflops_per_gpu", "mfu", "hfu", "fits", "memory", "time", "communication", "assumptions"}
    keys |= {"largest_micro_batch_size", "smallest_gpu", "training_run"}
    assert keys <= set(answer)
    assert max(map(len, ask(capsys, *words)[1].splitlines())) <= 100


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ask(capsys, "finetune", "llama-2-70b", "--method", "full", *ONE)
    assert status == 1
    assert "DOES NOT FIT" in out


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("finetune", "compare", "llama-2-7b", *ONE)
    status, out, _ = ask(capsys, *words, "--tokens", "10M")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    assert "qlora" in out
    assert "no biases" in out
    listed = json.loads(ask(capsys, *words, "--json")[1])
    assert {entry["method"] for entry in listed} >= {"full", "lora", "qlora", "bitfit", "prefix"}


def test_align(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "align",
        "dpo",
        "llama-2-7b",
        "--cluster",
        "dgx-a100",
        "--gpus",
        "8",
        "--method",
        "lora",
        "--seq-len",
        "1k",
    )
    status, out, _ = ask(capsys, *words, "--json")
    assert status == 0
    assert {"step_time_s", "fits", "passes", "memory", "plan"} <= set(json.loads(out))
    assert "reference" in ask(capsys, *words)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("finetune", "llama-7b"), "--method is missing"),
        (("finetune", "llama-7b", "--method", "lora", "--targets", "qq"), "its modules: self_attn.q_proj"),
        (("finetune", "llama-7b", "--method", "lora", "--targets", "q_proj,,"), "has an empty name"),
        (("finetune", "llama-7b", "--method", "lora", "--rank", "9000"), "is larger than self_attn.q_proj"),
        (("finetune", "llama-7b", "--method", "prompt", "--rank", "8"), "prompt has no option rank"),
        (("finetune", "llama-7b", "--method", "prompt", "--virtual-tokens", "2048"), "fill the whole context"),
        (("finetune", "compare", "llama-7b"), "compare needs --cluster"),
        (("finetune", "compare", "llama-7b", "--rank", "8", *ONE), "compare takes no method"),
        (("finetune", "a", "b"), "finetune takes one model"),
        (("finetune", "llama-7b", "--method", "lora", "--lora-dropout", "x"), "--lora-dropout=x must be a number"),
        (("align", "dppo", "llama-7b", *ONE), "unknown alignment task 'dppo'"),
        (("align", "ppo", "t5-base", *ONE), "alignment is modelled for decoders"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str) -> None:
    status, out, err = ask(capsys, *words)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "llama-7b", "--method", "lora", "--rank", "8"),
        ("align", "sft", "gpt2", "--method", "lora", *ONE),
    ],
)
def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: Sequence[str]
) -> None:
    place = tmp_path / "answer.json"
    place.write_text("mine")
    status, _, err = ask(capsys, *words, "--output", str(place))
    assert status == 2
    assert "exists; give another name, or --overwrite" in err
    assert place.read_text() == "mine"
    assert ask(capsys, *words, "--output", str(place), "--overwrite")[0] == 0
    assert json.loads(place.read_text())
