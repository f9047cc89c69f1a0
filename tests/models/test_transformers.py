"""Parameters and FLOPs against transformers' own classes, instantiated on PyTorch's meta device: all families it has.

One config of each model type, as the hub has it but for its depth, and the same with every switch that the family's
table reads turned over. Remote code is compared with a class of the same structure.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from simllm.errors import InputError, UnsupportedError
from simllm.models import Model, catalog
from simllm.models.families import FAMILIES, families_of

logging.getLogger("transformers").setLevel(logging.ERROR)

Config = dict[str, Any]

_HERE = Path(__file__).parent
_CATALOG = Path(catalog.__file__).parent / "configs"
_HUB = json.loads((_HERE / "hub_configs.json").read_text(encoding="utf-8"))["models"]
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers")
_DEPTHS += ("decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")
_BY_LAYER = ("layer_types", "no_rope_layers", "attention_layers")
_ENCODERS = {"bert", "roberta", "xlm-roberta"}
_ENCODER_DECODERS = {"t5", "mt5", "umt5", "switch_transformers", "bart", "mbart", "m2m_100"}
_LAYERS, _SEQ_LEN = 4, 32


def _configs() -> dict[str, Config]:
    """One config a model type."""
    found: dict[str, Config] = {}
    for entry in _HUB.values():
        found.setdefault(entry["config"]["model_type"], entry["config"])
    for path in sorted(_CATALOG.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(config["model_type"], config)
    return {name: _shallow(config) for name, config in sorted(found.items())}


def _shallow(config: Config) -> Config:
    """The same with four layers in each stack."""
    cut = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    for key in _DEPTHS:
        if isinstance(cut.get(key), int):
            cut[key] = min(_LAYERS, cut[key])
    for key in _BY_LAYER:
        if cut.get(key):
            cut[key] = cut[key][:_LAYERS]
    if "attention_types" in cut:
        cut["attention_types"] = [[["global", "local"], _LAYERS // 2]]
    if "text_config" in cut:
        cut["text_config"] = _shallow(cut["text_config"])
    return cut


def _twin(config: Config) -> Config | None:
    """The config of a class in transformers with the structure of remote code; None: there is none."""
    kind = config["model_type"]
    if kind in transformers.CONFIG_MAPPING:
        return config
    same = {"kimi_k2": "deepseek_v3", "stablelm_epoch": "stablelm", "baichuan": "llama"}
    if kind in same:
        return {**config, "model_type": same[kind]}
    if kind in ("RefinedWeb", "RefinedWebModel"):
        spellings = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
        falcon = {spellings.get(key, key): value for key, value in config.items()}
        return {**falcon, "model_type": "falcon", "new_decoder_architecture": kind == "RefinedWeb"}
    if kind in ("internlm", "internlm2"):
        return {**config, "model_type": "llama", "attention_bias": config["bias"]}
    if kind == "qwen":
        heads, width = config["num_attention_heads"], config["intermediate_size"] // 2
        return {**config, "model_type": "qwen2", "num_key_value_heads": heads, "intermediate_size": width}
    if kind == "deepseek":
        return {**config, "model_type": "glm4_moe", "use_qk_norm": False, "n_group": 1, "topk_group": 1}
    if kind == "hf_olmo":
        return {
            "model_type": "olmo",
            "vocab_size": config["embedding_size"],
            "hidden_size": config["d_model"],
            "intermediate_size": config["mlp_ratio"] * config["d_model"] // 2,
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": config["n_heads"],
            "tie_word_embeddings": config["weight_tying"],
        }
    if kind == "chatglm" and "ffn_hidden_size" in config:
        return {
            "model_type": "glm",
            "vocab_size": config["padded_vocab_size"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["ffn_hidden_size"],
            "num_hidden_layers": config["num_layers"],
            "num_attention_heads": config["num_attention_heads"],
            "num_key_value_heads": config["multi_query_group_num"],
            "pad_token_id": None,
        }
    return None


def _instantiate(config: Config) -> torch.nn.Module:
    kind = config["model_type"]
    made = AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    made = made.text_config if "text_config" in config else made
    # Only the chosen experts are computed, and without a loop over what the router says, which is unknown on meta.
    made._experts_implementation = "batched_mm"
    make: Any = AutoModelForCausalLM
    if kind in _ENCODERS:
        make = AutoModelForMaskedLM
    elif kind in _ENCODER_DECODERS:
        make = AutoModelForSeq2SeqLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = make.from_config(made, attn_implementation="eager")
    return model


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


def _untied_head(config: Config) -> int:
    """The head of T5 and mT5 that transformers 5 ties whatever the config says."""
    untied = config.get("tie_word_embeddings", config["model_type"] != "mt5") is False
    return config["vocab_size"] * config["d_model"] if untied and config["model_type"] in ("t5", "mt5") else 0


CONFIGS = _configs()
TWINS = {name: twin for name, config in CONFIGS.items() if (twin := _twin(config)) is not None}


def test_only_models_without_a_class_are_missing() -> None:
    described_only = {"chinchilla", "glam", "gopher", "lamda", "palm"}
    assert {name for family in FAMILIES for name in family.model_types} - set(TWINS) == described_only | {
        "Yi",  # a llama by another name
        "glm-130b",
        "grok-1",
        "llama4_text",  # inside llama4
        "mosaic_gpt",
    }


@pytest.mark.parametrize("kind", TWINS)
def test_parameters(kind: str) -> None:
    expected = _parameters(_instantiate(TWINS[kind])) + _untied_head(CONFIGS[kind])
    assert Model.from_config(CONFIGS[kind]).parameters.total == expected


def test_files_that_transformers_5_writes() -> None:
    """Every key of the config class, in the words of today's version, means the same model."""
    compared = 0
    for entry in _HUB.values():
        config = entry["config"]
        if config["model_type"] not in transformers.CONFIG_MAPPING or _untied_head(config):
            continue
        made = AutoConfig.for_model(**config)
        for changes_only in (True, False):
            written = json.loads(made.to_json_string(use_diff=changes_only))
            old, new = Model.from_config(config), Model.from_config(written)
            assert (new.parameters, new.flops(9000)) == (old.parameters, old.flops(9000)), entry
            assert new.components == old.components
            compared += 1
    assert compared > 250


#: Why a model cannot be run on the meta device, or does other work than its experts' choice.
_NO_FLOPS = {
    "dbrx": "loops over the experts that were hit",
    "switch_transformers": "loops over the experts that were hit",
    "internlm3": "asks for a length on the host",
    "llama4": "runs every expert for every token and multiplies with zero",
}


@pytest.mark.parametrize("kind", [kind for kind in TWINS if kind not in _NO_FLOPS])
def test_flops(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Packed sequences are looked for in the positions, which have no values on meta.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None)
    ids = torch.zeros((2, _SEQ_LEN), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind in _ENCODER_DECODERS:
        inputs["decoder_input_ids"] = ids
    if kind not in _ENCODERS:
        inputs["use_cache"] = False
    model = _instantiate(TWINS[kind]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert Model.from_config(CONFIGS[kind]).flops(_SEQ_LEN, 2).forward_full_attention == counter.get_total_flops()


def _switches() -> Iterator[tuple[str, str, Config]]:
    """Every switch of a family's table that transformers' config class has, turned over; remote code has others."""
    for kind, config in CONFIGS.items():
        if TWINS.get(kind) is not config:
            continue
        (family,) = families_of(config)
        text = config.get(family.nested) if family.nested else config
        defaults = AutoConfig.for_model(kind)
        defaults = defaults.text_config if family.nested else defaults
        for field in family.table.values():
            name = next((name for name in field.names if name in text), field.names[0])
            if field.kind == "flag" and hasattr(defaults, name):
                given = text.get(name)
                turned = {**text, name: not (getattr(defaults, name) if given is None else given)}
                yield kind, name, {**config, family.nested: turned} if family.nested else turned


#: Where transformers 5 does not do what its flag says.
_OTHERWISE = {
    ("t5", "tie_word_embeddings"): "ties whatever the flag says",
    ("mt5", "tie_word_embeddings"): "ties whatever the flag says",
    ("umt5", "tie_word_embeddings"): "also unties the stacks' token tables, which share one in every release",
    ("switch_transformers", "tie_word_embeddings"): "also unties the stacks' token tables",
    ("bart", "tie_word_embeddings"): "also unties the stacks' token tables",
    ("mbart", "tie_word_embeddings"): "also unties the stacks' token tables",
    ("m2m_100", "tie_word_embeddings"): "also unties the stacks' token tables",
}
SWITCHES = [case for case in _switches() if case[:2] not in _OTHERWISE]


@pytest.mark.parametrize(("kind", "name", "config"), SWITCHES, ids=[f"{kind}-{name}" for kind, name, _ in SWITCHES])
def test_switches(kind: str, name: str, config: Config) -> None:
    try:
        counted = Model.from_config(config).parameters.total
    except UnsupportedError:
        return  # refused by name
    except InputError as error:
        pytest.fail(f"{name} of {kind}: {error}")
    try:
        model = _instantiate(config)
    except Exception:
        pytest.skip("transformers does not accept it")
    assert counted == _parameters(model) + _untied_head(config)
