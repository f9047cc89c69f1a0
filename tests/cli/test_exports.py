"""Exporting plans and estimating the files of frameworks on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

ESTIMATE = "estimate llama-3-8b --cluster dgx-h100 --gpus 16 --tp 2 --global-batch-size 64 --seq-len 4096"
SAME = ("step_time_s", "memory", "plan", "seq_len", "stack", "mfu")


@pytest.fixture
def plan_json(cli: Cli, tmp_path: Path) -> Path:
    """An estimate, as a file."""
    file = tmp_path / "plan.json"
    assert cli(f"{ESTIMATE} --recompute full --json -o {file}").status == 0
    return file


def test_what_goes_out_comes_back_with_the_same_estimate(cli: Cli, tmp_path: Path, plan_json: Path) -> None:
    args = tmp_path / "args.txt"
    exported = cli(f"export {plan_json} --to megatron -o {args}")
    assert exported.status == 0
    assert f"xargs -a {args} torchrun --nnodes 2 --nproc-per-node 8 pretrain_gpt.py" in exported.err
    assert "--tensor-model-parallel-size 2\n" in args.read_text()
    answer = cli(f"estimate --from {args} --cluster dgx-h100 --gpus 16 --json").json
    before = json.loads(plan_json.read_text())
    assert {name: answer[name] for name in SAME} == {name: before[name] for name in SAME}
    assert any(note.startswith(f"from {args} (megatron): ") for note in answer["assumptions"])


def test_options_given_win(cli: Cli, tmp_path: Path, plan_json: Path) -> None:
    args = tmp_path / "args.txt"
    cli(f"export {plan_json} --to megatron -o {args}")
    answer = cli(f"estimate llama-2-7b --from {args} --cluster dgx-h100 --gpus 16 --tp 4 --zero 0 --json").json
    assert (answer["model"], answer["plan"]["tp"], answer["plan"]["zero"]) == ("llama-2-7b", 4, "0")
    assert answer["plan"]["recompute"] == "full"
    assert "given on the command line, whatever the file says: tp, zero" in answer["assumptions"]
    assert "the model is llama-2-7b, whatever the file says" in answer["assumptions"]


def test_what_a_file_cannot_hold_is_said_and_asked_for(cli: Cli, tmp_path: Path) -> None:
    plan, config = tmp_path / "plan.json", tmp_path / "ds_config.json"
    command = "estimate llama-3-8b --cluster dgx-h100 --gpus 16 --zero 3 --recompute full --global-batch-size 64"
    cli(f"{command} --stack megatron-deepspeed --json -o {plan}")
    exported = cli(f"export {plan} --to deepspeed -o {config}")
    assert "not in the file: --seq-len 8192, set in the data set" in exported.err
    assert "not in the file: --recompute full, set in the model" in exported.err
    missing = cli(f"estimate --from {config} --cluster dgx-h100 --gpus 16")
    assert missing.status == 2
    assert "missing argument 'MODEL', which the file does not say" in missing.err
    answer = cli(f"estimate llama-3-8b --from {config} --cluster dgx-h100 --gpus 16 --recompute full --json").json
    before = json.loads(plan.read_text())
    assert {name: answer[name] for name in SAME} == {name: before[name] for name in SAME}


def test_a_plan_of_a_search_by_its_number(cli: Cli, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cli(f"plan llama-3-8b --cluster dgx-h100 --gpus 8 --global-batch-size 32 --top 2 --json -o {plan}")
    document = json.loads(plan.read_text())
    for number in (1, 2):
        exported = cli(f"export {plan} --to megatron --plan {number} --json").json
        assert f"--micro-batch-size {document['plans'][number - 1]['plan']['micro_batch_size']}\n" in exported["text"]
    assert "plan 3 of 2" in cli(f"export {plan} --to megatron --plan 3").err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("setup"), ["setup", "--json"]),
        (lambda d: d.pop("plan"), ["plan", "--json"]),
        (lambda d: d["plan"].update(tp="2"), ["tp='2'"]),
        (lambda d: d["plan"].update(tensor=2), ["tensor"]),
        (lambda d: d["plan"].update(zero="7"), ["ZeRO stage"]),
        (lambda d: d["setup"].update(model=None), ["--model"]),
        (lambda d: d.update(plans=[]), ["no plan"]),
        (lambda d: d.update(stack="megatron-cor"), ["did you mean"]),
    ],
)
def test_documents_that_are_no_plan(
    cli: Cli, plan_json: Path, tmp_path: Path, change: Callable[[Any], Any], words: list[str]
) -> None:
    document = json.loads(plan_json.read_text())
    change(document)
    plan_json.write_text(json.dumps(document))
    result = cli(f"export {plan_json} --to megatron -o {tmp_path / 'out.txt'}")
    assert result.status == 2
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out.txt").exists()


def test_other_wrong_input(cli: Cli, plan_json: Path, tmp_path: Path) -> None:
    for words, expected in (
        (f"export {plan_json} --to megatronn", "did you mean megatron"),
        (f"export {plan_json} --to torchtitan", "torchtitan cannot express zero=1"),
        (f"export {tmp_path / 'none.json'} --to megatron", "cannot be read"),
        (f"export {plan_json} --to megatron -o {tmp_path / 'no' / 'out'}", "there is no folder"),
        ("estimate --cluster dgx-h100 --gpus 8 --global-batch-size 8", "missing argument 'MODEL'"),
        ("estimate llama-3-8b --cluster dgx-h100 --gpus 8", "missing option '--global-batch-size'"),
    ):
        result = cli(words)
        assert result.status == 2, words
        assert expected in result.err
    (tmp_path / "text.json").write_text("{")
    assert "is not JSON" in cli(f"export {tmp_path / 'text.json'} --to megatron").err
