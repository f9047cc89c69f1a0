"""Parameter counts against the published architecture table, and against transformers' own classes."""

import csv
import json
from pathlib import Path

import pytest

from simllm.models import Model
from simllm.models.catalog import catalog_names, load_model
from simllm.models.spec import AttentionSpec, MoESpec

PUBLISHED = Path(__file__).parents[1] / "published" / "params.csv"
HUB = json.loads((Path(__file__).parent / "hub_configs.json").read_text(encoding="utf-8"))["models"]

with PUBLISHED.open(encoding="utf-8") as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file)}


def test_the_catalog_holds_every_row_of_the_table():
    assert set(catalog_names()) == set(ROWS)
    assert len(ROWS) == 111


@pytest.mark.parametrize("name", ROWS)
def test_parameters_equal_the_published_counts(name):
    row, counted = ROWS[name], Model.load(name).parameters
    found = {
        "total_params": counted.total,
        "active_params": counted.active,
        "embedding_params": counted.embedding,
        "lm_head_params": counted.lm_head,
        "non_embedding_params": counted.non_embedding,
    }
    assert found == {column: int(row[column]) for column in found}
    assert sum(counted.by_component.values()) == counted.total


def _position(text):
    words = {"learned": "learned", "ALiBi": "alibi", "Transformer-XL": "transformer-xl", "relative": "relative"}
    return next((kind for word, kind in words.items() if word in text), "rope" if "RoPE" in text else "none")


@pytest.mark.parametrize("name", ROWS)
def test_architecture_facts_equal_the_table(name):
    row, spec = ROWS[name], load_model(name)
    block = spec.decoder.layers[-1]
    mixer = next(layer.mixer for layer in spec.decoder.layers if isinstance(layer.mixer, AttentionSpec))
    assert spec.name == name
    assert (spec.architecture, spec.family, spec.tokenizer) == (row["arch_type"], row["family"], row["tokenizer"])
    assert (spec.vocab_size, spec.hidden_size) == (int(row["vocab"]), int(row["hidden"]))
    # The table gives the depth of one stack of an encoder-decoder.
    assert len(spec.decoder.layers) == int(row["num_layers"])
    assert spec.head.tied == (row["tied_embeddings"] == "True")
    assert block.parallel == (row["parallel_block"] == "True")
    assert block.norm.kind == ("rmsnorm" if row["norm"].startswith("RMSNorm") else "layernorm")
    assert mixer.kind == row["attention"]
    assert mixer.num_attention_heads == int(row["heads"])
    assert mixer.num_key_value_heads == int(row["kv_heads"])
    if mixer.latent is None:
        assert mixer.head_dim == int(row["head_dim"])
    else:
        assert f"qk {mixer.head_dim} / v {mixer.latent.v_head_dim}" == row["head_dim"]
    assert ("learned" if spec.decoder.positions else mixer.position) == _position(row["position"])
    moe = next((layer.mlp for layer in spec.decoder.layers if isinstance(layer.mlp, MoESpec)), None)
    if row["experts"]:
        assert (moe.num_experts, moe.num_experts_per_tok) == (float(row["experts"]), float(row["top_k"]))
    else:
        assert moe is None


@pytest.mark.parametrize("name", HUB)
def test_configs_as_the_hub_has_them(name):
    """Other sizes of the families, with the dozens of keys that real files carry."""
    entry = HUB[name]
    counted = Model.from_config(entry["config"], name).parameters
    assert (counted.total, counted.active) == (entry["total_params"], entry["active_params"])
