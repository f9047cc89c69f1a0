"""Every wrong input: exit status 2, one line on standard error that says what was given and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ESTIMATE = "estimate llama-3-8b --cluster dgx-h100 --gpus 16 --global-batch-size 16"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SYSTEM = """\
kind: system
name: mine
accelerator: h100-sxm
node:
  gpus: {value: 8, unit: count, source: a page, basis: vendor}
scaleup:
  link: nvlink4
  fabric: nvswitch-gen3
  domain_gpus: {value: 8, unit: count, source: a page, basis: vendor}
  bandwidth: {value: 450, unit: GB/s, source: a page, basis: vendor}
"""


def refused(result, *said: str) -> None:
    assert result.status == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.startswith("simllm: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        # unknown names, with the nearest known one
        ("models show lama-3-8b", ["'lama-3-8b'", "llama-3-8b", "simllm models list"]),
        ("models list --family lama-3", ["'lama-3'", "Llama-3"]),
        (ESTIMATE.replace("dgx-h100", "dgx-h10"), ["'dgx-h10'", "dgx-h100"]),
        (ESTIMATE.replace("dgx-h100", "h100-sxm"), ["h100-sxm", "is an accelerator", "dgx-h100"]),
        (f"{ESTIMATE} --stack megatron-cor", ["'megatron-cor'", "megatron-core"]),
        (f"{ESTIMATE} --schedule 1f1", ["'1f1'", "1f1b"]),
        (f"{ESTIMATE} --precision bf17", ["'bf17'", "bf16"]),
        (f"{ESTIMATE} --precision fp8".replace("dgx-h100", "dgx-a100"), ["fp8", "a100-sxm-80gb", "bf16"]),
        (f"{ESTIMATE} --zero 5", ["'5'", "0, 1, 2, 3, hsdp"]),
        (f"{ESTIMATE} --expert-imbalance 1.2", ["expert_imbalance=1.2", "llama-3-8b has no experts"]),
        (f"{ESTIMATE} --capacity-factor 1", ["capacity_factor=1", "llama-3-8b has no experts"]),
        (f"{ESTIMATE} --expert-imbalance much", ["--expert-imbalance=much", "random"]),
        (f"{ESTIMATE} --expert-imbalance 0.5", ["expert_imbalance=0.5", "at least 1"]),
        (f"{ESTIMATE} --capacity-factor -1", ["capacity_factor=-1", "above 0"]),
        (f"{ESTIMATE} --capacity-factor full", ["--capacity-factor=full", "a number"]),
        (ESTIMATE.replace("estimate", "plan") + " --expert-imbalance 2", ["llama-3-8b has no experts"]),
        (f"{ESTIMATE} --zero hdsp", ["'hdsp'", "hsdp"]),
        (f"{ESTIMATE} --recompute ful", ["'ful'", "full"]),
        (f"{ESTIMATE} --recompute list:attn", ["'attn'", "attention_core"]),
        (ESTIMATE.replace("estimate", "plan") + " --objective tim", ["'tim'", "time"]),
        (ESTIMATE.replace("estimate", "plan") + " --precision bf17", ["'bf17'", "bf16"]),
        ("collective all_redce --size 1GB --cluster dgx-h100 --gpus 8", ["'all_redce'", "all_reduce"]),
        ("collective all_reduce --size 1GB --cluster dgx-h100 --gpus 8 --algorithm rng", ["'rng'", "ring"]),
        ("hardware show h10-sxm", ["'h10-sxm'", "h100-sxm"]),
        ("hardware show h100-sxm --kind acelerator", ["'acelerator'", "accelerator"]),
        # the grammar of the command line
        ("plann llama-3-8b", ["'plann'", "plan"]),
        ("models shwo gpt2", ["'shwo'", "show"]),
        ("models", ["list, show, compare"]),
        ("validate", ["runs"]),
        ("estimate llama-3-8b --gpu 8", ["--gpu;", "--gpus"]),
        ("estimate llama-3-8b --cluster dgx-h100 --gpus 8", ["--global-batch-size", "--help"]),
        ("estimate --cluster dgx-h100 --gpus 8 --global-batch-size 8", ["MODEL"]),
        ("models show gpt2 gpt2-xl", ["gpt2-xl"]),
        ("estimate llama-3-8b --gpus", ["--gpus"]),
        # degrees that do not fit each other, the model or the cluster
        (f"{ESTIMATE} --tp 3", ["tp=3", "16"]),
        (f"{ESTIMATE} --tp 2 --dp 2", ["tp=2", "dp=2", "= 4", "16"]),
        (ESTIMATE.replace("16", "24") + " --tp 3", ["tp=3", "num_attention_heads=32", "1, 2, 4, 8, 16 or 32"]),
        (ESTIMATE.replace("16", "24") + " --pp 12", ["12", "32 layers"]),
        (f"{ESTIMATE} --vpp 2", ["vpp=2", "pp=1"]),
        (f"{ESTIMATE} --pp 2 --vpp 2 --schedule 1f1b", ["1f1b", "vpp=2"]),
        (f"{ESTIMATE} --cp 3", ["cp=3"]),
        (f"{ESTIMATE} --cp 2 --seq-len 4095", ["cp=2", "seq_len=4095"]),
        (f"{ESTIMATE} --cp 4 --cp-comm-type ulysses", ["'ulysses'", "a2a, a2a+p2p, all_gather, p2p"]),
        (f"{ESTIMATE} --cp-comm-type a2a", ["cp_comm_type=a2a", "cp above 1"]),
        (f"{ESTIMATE} --cp 2 --cp-comm-type a2a+p2p", ["cp=2 into two levels", "use a2a or p2p"]),
        (f"{ESTIMATE} --cp 8 --cp-comm-type a2a+p2p --cp-a2a 3", ["cp_a2a=3", "use 2 or 4"]),
        (f"{ESTIMATE} --cp 4 --cp-a2a 2", ["cp_a2a=2", "only a2a+p2p"]),
        (f"{ESTIMATE} --tp 4 --cp 2 --cp-comm-type a2a".replace("llama-3-8b", "gpt2"), ["cp=2", "3 attention heads"]),
        (ESTIMATE.replace("estimate", "plan") + " --cp-comm-type a2b", ["'a2b'", "a2a"]),
        (ESTIMATE.replace("estimate", "plan") + " --cp 1 --cp-comm-type a2a", ["cp above 1", "cp=1"]),
        (f"{ESTIMATE} --ep 2", ["ep=2", "no experts"]),
        (f"{ESTIMATE} --ep 16".replace("llama-3-8b", "mixtral-8x7b"), ["ep=16", "num_experts=8", "1, 2, 4 or 8"]),
        (f"{ESTIMATE} --micro-batch-size 3", ["micro_batch_size=3", "global_batch_size=16"]),
        (ESTIMATE.replace("size 16", "size 9"), ["global_batch_size=9", "dp=16"]),
        (f"{ESTIMATE} --hsdp-shard 3", ["hsdp_shard=3", "zero=hsdp", "16"]),
        (f"{ESTIMATE} --zero 3 --hsdp-shard 4", ["hsdp_shard=4", "zero=hsdp or zero=1"]),
        (f"{ESTIMATE} --zero 2 --pp 2", ["zero=2", "pp=2", "zero=1"]),
        (f"{ESTIMATE} --sequence-parallel", ["sequence_parallel", "tp above 1"]),
        (ESTIMATE.replace("gpus 16", "gpus 12"), ["num_gpus=12", "8 GPUs each", "8 or 16"]),
        ("plan llama-3-8b --cluster dgx-h100 --gpus 100 --global-batch-size 8", ["num_gpus=100", "96 or 104"]),
        ("collective all_reduce --size 1GB --cluster dgx-h100 --gpus 100", ["num_gpus=100", "96 or 104"]),
        ("collective all_reduce --size 1GB --cluster dgx-h100 --gpus 8 --ranks 16", ["16 ranks", "8 GPUs"]),
        ("estimate llama-3-8b --cluster tinybox-green --gpus 12 --global-batch-size 12", ["12", "6"]),
        # numbers that are none
        ("collective all_reduce --size 1XB --cluster dgx-h100 --gpus 8", ["--size=1XB", "256MB"]),
        (
            "collective all_reduce --size 1kB --cluster dgx-h100 --gpus 8 --sweep --min-size 1MB",
            ["--min-size=1MB", "--size=1kB"],
        ),
        ("collective all_reduce --size 1GB --cluster dgx-h100 --gpus 8 --plot a.png", ["--sweep"]),
        (f"{ESTIMATE} --memory-headroom 1", ["--memory-headroom=1", "below 1"]),
        (f"{ESTIMATE} --memory-headroom nan", ["--memory-headroom=nan"]),
        (f"{ESTIMATE} --memory-headroom abc", ["--memory-headroom=abc"]),
        (f"{ESTIMATE} --price -3", ["--price=-3", "above zero"]),
        (f"{ESTIMATE} --plot a.gif", ["--plot=a.gif", ".png"]),
    ],
)
def test_refused(cli, line: str, said: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli(line), *said)
    assert list(tmp_path.iterdir()) == []


OPTIONS = (
    "--gpus",
    "--global-batch-size",
    "--micro-batch-size",
    "--seq-len",
    "--tp",
    "--pp",
    "--vpp",
    "--cp",
    "--cp-a2a",
    "--ep",
    "--etp",
    "--dp",
    "--hsdp-shard",
    "--tokens",
)


@pytest.mark.parametrize("value", ["abc", "-5", "0", "nan", "inf", "1e30", "1.5", ""])
@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_number(cli, option: str, value: str) -> None:
    words = ESTIMATE.split()
    if option in words:
        del words[words.index(option) : words.index(option) + 2]
    refused(cli(*words, option, value), f"{option}={value}")


@pytest.mark.parametrize("value", ["abc", "-5", "0", "nan", "inf", "1e30", "1.5"])
def test_wrong_number_of_plans(cli, value: str) -> None:
    refused(cli("plan llama-3-8b --cluster dgx-h100 --gpus 8 --global-batch-size 8 --top " + value), f"--top={value}")


@pytest.mark.parametrize("value", ["abc", "-5", "0", "nan", "inf", "1e30"])
def test_wrong_size(cli, value: str) -> None:
    refused(
        cli(f"collective all_reduce --cluster dgx-h100 --gpus 8 --size {value}"),
        f"--size={value}",
        "bytes" if value == "1e30" else "256MB",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", ["is not JSON"]),
        ("[1, 2]", ["list", "object"]),
        (json.dumps(LLAMA | {"hidden_size": float("nan")}), ["is not JSON", "NaN"]),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}), ["hidden_size", "missing"]),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "model_type"}), ["model_type", "llama"]),
        (json.dumps(LLAMA | {"model_type": "lama"}), ["'lama'", "llama"]),
        (json.dumps(LLAMA | {"num_attention_heads": 31}), ["31", "4096"]),
        (json.dumps(LLAMA | {"num_key_value_heads": 5}), ["5", "32"]),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), ["num_hidden_layers", "0"]),
        (json.dumps(LLAMA | {"hidden_size": -4096}), ["hidden_size", "-4096"]),
        (json.dumps(LLAMA | {"hidden_size": 10**30}), ["hidden_size"]),
    ],
)
def test_config_that_cannot_be_used(cli, tmp_path: Path, content: str, said: list[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    for name in (file, tmp_path):
        refused(cli("models", "show", str(name)), *said)


def test_config_that_is_not_there(cli, tmp_path: Path) -> None:
    refused(cli("models", "show", str(tmp_path / "config.json")), "no file", str(tmp_path))
    refused(cli("models", "show", str(tmp_path)), "no config.json", str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("unit: GB/s", "unit: GB", ["scaleup.bandwidth", "GB", "GB/s"]),
        ("unit: GB/s", "unit: parsecs", ["parsecs", "GB/s"]),
        ("value: 450", "value: -450", ["-450", "above zero"]),
        ("value: 450", "value: .nan", ["nan", "finite"]),
        ("value: 450", "value: fast", ["scaleup.bandwidth", "fast"]),
        ("basis: vendor}\nscaleup", "basis: guess}\nscaleup", ["'guess'", "measured, vendor"]),
        ("accelerator: h100-sxm", "acelerator: h100-sxm", ["acelerator", "accelerator"]),
        ("name: mine", "name: !!python/object/apply:os.system ['touch hacked']", ["python/object/apply", "refused"]),
        ("name: mine", "name: [", ["not YAML"]),
        ("kind: system", "kind: accelerator", ["'accelerator'", "system"]),
        ("  link: nvlink4\n", "", ["link", "missing"]),
    ],
)
def test_cluster_file_that_cannot_be_used(
    cli, tmp_path: Path, monkeypatch, old: str, new: str, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in SYSTEM
    Path("mine.yaml").write_text(SYSTEM.replace(old, new))
    command = "estimate llama-3-8b --cluster mine.yaml --gpus 8 --global-batch-size 8"
    refused(cli(command), "mine.yaml", *said)
    refused(cli("collective all_reduce --size 1GB --cluster mine.yaml --gpus 8"), "mine.yaml", *said)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_cluster_file_with_an_unknown_accelerator(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SYSTEM.replace("h100-sxm", "h10-sxm"))
    refused(cli("estimate llama-3-8b --cluster mine.yaml --gpus 8 --global-batch-size 8"), "'h10-sxm'", "h100-sxm")


def test_the_same_file_unspoiled_works(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SYSTEM)
    result = cli("estimate llama-3-8b --cluster mine.yaml --gpus 8 --global-batch-size 8 --zero 3 --json")
    assert result.status == 0
    assert result.json["cluster"] == "mine"


def test_files_that_are_not_there(cli, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    refused(cli(*ESTIMATE.replace("dgx-h100", f"{gone}.yaml").split()), "gone.yaml", "does not exist")
    refused(cli("hardware", "check", f"{gone}.yaml"), "gone.yaml", "does not exist")
    refused(cli("hardware", "show", f"{gone}.yaml"), "gone.yaml", "does not exist")
    refused(cli("validate", "runs", f"{gone}.csv"), "gone.csv")


WRITERS = (
    "models list",
    "models show gpt2",
    "models compare gpt2 gpt2-xl",
    "hardware list --kind link",
    "hardware show h100-sxm",
    "collective all_reduce --size 1GB --cluster dgx-h100 --gpus 8",
    ESTIMATE,
    ESTIMATE.replace("estimate", "plan"),
)


@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.parametrize("place", ["missing/out.json", ".", "file/out.json", "x" * 300])
def test_output_that_cannot_be_written(cli, line: str, place: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    refused(cli(f"{line} --output {place}"), f"--output={place}")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "kept"}


def test_plot_that_cannot_be_written(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli(f"{ESTIMATE} --plot missing/a.png"), "--plot=missing/a.png", "no folder")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file(cli, tmp_path: Path, monkeypatch) -> None:
    import os

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    old = tmp_path / "out.json"
    old.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    refused(cli("models", "show", "gpt2", "--overwrite", "--output", str(old)), "No space left on device")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"out.json": "old"}


@pytest.mark.parametrize("content", ["", "id,gpu\nR1,h100-sxm\n"])
def test_table_that_cannot_be_used(cli, tmp_path: Path, content: str) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(content)
    refused(cli("validate", "runs", str(file)), "runs.csv")
