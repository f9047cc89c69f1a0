"""Reading axes: every mistake is named before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simllm.errors import InputError
from simllm.sweeps import read_sweep

AXES: dict[str, Any] = {
    "models": ["llama-2-7b", "llama-3-8b"],
    "clusters": "dgx-h100",
    "gpus": [8, 16],
    "seq_len": "4k",
    "global_batch_size": [64, 128],
}


def test_cells_are_the_product_of_the_axes_in_order() -> None:
    cells = read_sweep(AXES).cells
    assert len(cells) == 8
    assert [(c["model"], c["gpus"], c["global_batch_size"]) for c in cells[:3]] == [
        ("llama-2-7b", 8, 64),
        ("llama-2-7b", 8, 128),
        ("llama-2-7b", 16, 64),
    ]
    assert {c["seq_len"] for c in cells} == {4096}
    assert cells[0]["objective"] == "time"
    given = read_sweep(AXES | {"plans": [{"tp": 2, "zero": 1}, {"pp": 2, "recompute": "full"}]}).cells
    assert len(given) == 16
    assert given[0]["plan"] == {"tp": 2, "zero": "1"}
    assert "objective" not in given[0]


def test_the_fingerprint_follows_the_questions() -> None:
    assert read_sweep(AXES).fingerprint == read_sweep(dict(AXES)).fingerprint
    assert read_sweep(AXES).fingerprint != read_sweep(AXES | {"gpus": 8}).fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_batchsize": 64}, ["unknown key 'global_batchsize'", "did you mean global_batch_size"]),
        ({"model": "llama-3-8b"}, ["unknown key 'model'", "did you mean models"]),
        ({"models": "lama-3-8b"}, ["did you mean llama-3-8b"]),
        ({"clusters": ["dgx-h10"]}, ["did you mean", "dgx-h100"]),
        ({"gpus": []}, ["gpus is an empty list"]),
        ({"gpus": [8, 8]}, ["gpus has a value twice"]),
        ({"gpus": 8.5}, ["gpus", "whole number"]),
        ({"gpus": True}, ["gpus", "whole number"]),
        ({"gpus": [12, 20]}, ["num_gpus=12", "whole nodes"]),
        ({"seq_len": "4q"}, ["seq_len", "4q"]),
        ({"precision": "bf61"}, ["precision", "did you mean bf16"]),
        ({"stack": "megatron"}, ["did you mean megatron-"]),
        ({"optimizer": "adamw8"}, ["optimizer"]),
        ({"memory_headroom": 2}, ["memory_headroom"]),
        ({"objective": "speed"}, ["objective", "time"]),
        ({"plans": []}, ["plans must be a list"]),
        ({"plans": [{"tpp": 2}]}, ["key of plan 1", "did you mean", "tp"]),
        ({"plans": [{"tp": "2"}]}, ["plan 1", "tp='2'"]),
        ({"plans": [{"precision": "bf16"}]}, ["precision is an axis"]),
        ({"plans": [{"tp": 2}], "objective": "time"}, ["objective", "plans are given"]),
        ({"seq_len": None}, ["seq_len", "None"]),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_sweep(AXES | change)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models: [", ["is not YAML"]),
        ("- a\n- b", ["must be a mapping"]),
        ("models: llama-3-8b", ["clusters is missing"]),
        ("!!python/object/apply:os.system ['true']", ["is not YAML"]),
    ],
)
def test_files_that_are_no_axes(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "axes.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        read_sweep(file)
    for word in (str(file), *words):
        assert word in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_sweep(tmp_path / "other.yaml")
