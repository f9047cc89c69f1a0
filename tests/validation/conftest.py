"""A good row of a table of runs, and tables made from it."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

#: Llama 3 8B on one DGX H100, every cell stated.
GOOD = {
    "id": "r1",
    "tier": "A",
    "source": "somebody's table",
    "task": "pretrain",
    "model_family": "llama",
    "model_name": "Llama-3-8B",
    "params_b": "8.03",
    "layers": "32",
    "hidden": "4096",
    "ffn_hidden": "14336",
    "heads": "32",
    "kv_heads": "8",
    "head_dim": "128",
    "vocab": "128256",
    "gated_mlp": "1",
    "tied_embeddings": "0",
    "seq_len": "8192",
    "gpu": "h100-sxm",
    "n_gpus": "16",
    "gpus_per_node": "8",
    "node_network_GBps": "400",
    "tp": "2",
    "pp": "1",
    "vp": "1",
    "cp": "1",
    "ep": "1",
    "dp": "8",
    "sequence_parallel": "1",
    "zero": "1",
    "micro_batch": "1",
    "global_batch_seqs": "64",
    "grad_accum": "8",
    "precision": "bf16",
    "recompute": "none",
    "framework": "Megatron-Core",
    "step_time_s": "5.0",
    "config_key": "k1",
}


@pytest.fixture
def good() -> dict[str, str]:
    return dict(GOOD)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, each the good one with other cells, and return the file; a cell of None drops the column."""

    def write(*changes: dict[str, str | None]) -> Path:
        rows = [{**GOOD, **change} for change in changes]
        dropped = {name for change in changes for name, value in change.items() if value is None}
        columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in dropped]
        path = tmp_path / "runs.csv"
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write
