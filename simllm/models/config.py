"""Reading Hugging Face ``config.json`` files.

A config is read through the table of its family (`simllm.models.families`). Keys that say nothing about the model's
shape are ignored, as transformers does; keys that would change the model and are not modelled are refused by name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from simllm.errors import InputError, UnsupportedError, unknown_name
from simllm.models.families import FAMILIES, Family, families_of, model_types
from simllm.models.families.fields import Values, count, lookup, short
from simllm.models.spec import ModelSpec

__all__ = ["read_config", "spec_from_config"]

#: A config is a few kilobytes; whatever is larger is something else (weights, a tokenizer).
_LARGEST_CONFIG_BYTES = 4 * 2**20

#: Keys that no family models, with the values that mean "not used".
_FIXED_FOR_ALL: Mapping[str, tuple[Any, ...]] = {"pruned_heads": ({},)}

#: What a person may look for in a config of an unknown family.
_COMMON = (
    ("hidden_size", ("hidden_size", "n_embd", "d_model", "n_embed", "dim")),
    ("num_hidden_layers", ("num_hidden_layers", "n_layer", "num_layers", "n_layers")),
    ("num_attention_heads", ("num_attention_heads", "n_head", "num_heads", "n_heads")),
    ("num_key_value_heads", ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")),
    ("head_dim", ("head_dim", "d_kv", "kv_channels")),
    ("intermediate_size", ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size")),
    ("vocab_size", ("vocab_size", "padded_vocab_size")),
    ("max_position_embeddings", ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")),
    ("num_experts", ("num_experts", "num_local_experts", "n_routed_experts")),
    ("num_experts_per_tok", ("num_experts_per_tok", "moe_top_k")),
    ("tie_word_embeddings", ("tie_word_embeddings",)),
)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number that JSON allows")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Parameters
    ----------
    path : str or Path
        The file, or a folder that holds a ``config.json``.

    Raises
    ------
    InputError
        No such file, unreadable, not JSON, or not a JSON object.
    """
    given, file = str(path), Path(path)
    if os.path.isdir(file):
        file = file / "config.json"
        if not os.path.exists(file):
            raise InputError(f"the folder {given!r} holds no config.json; give a folder that does, or the file")
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{str(file)!r} is not a regular file; give a config.json or a folder that holds one")
        if status.st_size > _LARGEST_CONFIG_BYTES:
            raise InputError(f"{str(file)!r} is {status.st_size} bytes long, too long for a config.json")
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {given!r}; give a config.json or a folder that holds one") from None
    except UnicodeDecodeError:
        raise InputError(f"{str(file)!r} is not text in UTF-8; expected a Hugging Face config.json") from None
    except OSError as error:
        raise InputError(f"cannot read {str(file)!r}: {error.strerror or error}") from None
    try:
        config = json.loads(content, parse_constant=_no_constant)
    except RecursionError:
        raise InputError(f"{str(file)!r} is nested too deeply for a config.json") from None
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{str(file)!r} holds a JSON {_json_kind(config)}; a config.json holds an object")
    return config


def _json_kind(value: object) -> str:
    kinds = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds[type(value)]


def spec_from_config(config: Mapping[str, Any], name: str, *, mtp: bool = False, vocab_multiple: int = 1) -> ModelSpec:
    """Turn the contents of a ``config.json`` into a spec.

    Parameters
    ----------
    config : mapping
        As `read_config` returns it.
    name : str
        What the model is called in tables and messages.
    mtp : bool
        Include the multi-token-prediction modules that the config states; transformers' classes leave them out.
    vocab_multiple : int
        Pad the vocabulary up to a multiple of this.

    Raises
    ------
    InputError
        The ``model_type`` is missing or unknown, a needed field is missing, or a value cannot be used; ``mtp`` is asked
        for and the config states no such module.
    UnsupportedError
        A key asks for something that would change the model and is not modelled.

    Examples
    --------
    >>> config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    ...           "num_hidden_layers": 32, "num_attention_heads": 32}
    >>> spec = spec_from_config(config, "llama-7b")
    >>> spec.num_hidden_layers, spec.decoder.layers[0].mixer.head_dim
    (32, 128)
    """
    family = _family(config, name)
    model_type = config["model_type"]
    where = f"{name} (model_type {model_type!r})"
    text = _text_model(config, family, where)
    for key, allowed in {**_FIXED_FOR_ALL, **family.fixed}.items():
        _refuse(text, key, allowed, where)
    values = Values(text, family.table, where)
    spec = family.build(values)
    modules = _mtp_modules(text, where)
    spec = replace(
        spec,
        name=name,
        family=family.title,
        model_type=model_type,
        tokenizer=family.tokenizer,
        vocab_multiple=vocab_multiple,
        multi_token_prediction=(spec.decoder.layers[-1],) * modules if mtp else (),
    )
    if mtp and not modules:
        raise InputError(f"{where}: multi-token prediction was asked for, but the config has no {_MTP_KEY} above zero")
    return replace(spec, notes=spec.notes + _notes(config, spec, modules))


def _family(config: Mapping[str, Any], name: str) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        given = (
            "has no model_type" if model_type is None else f"has model_type={short(model_type)}, which is not a name"
        )
        raise InputError(f"{name}: the config {given}; known: {', '.join(model_types())}")
    families = families_of(config)
    if not families:
        raise unknown_name("model_type", model_type, model_types(), _unknown_hint(config, name))
    if len(families) > 1:
        choices = " or ".join(f"{family.marker} ({family.title})" for family in families)
        raise InputError(f"{name} (model_type {model_type!r}): the config needs {choices}, and has neither")
    return families[0]


def _unknown_hint(config: Mapping[str, Any], name: str) -> str:
    understood, advice = _understood(config), ""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        understood += [f"text_config.{field}" for field in _understood(inner)]
        if inner.get("model_type") in model_types():
            advice = f" Its text_config (model_type {inner['model_type']!r}) can be given as a config of its own."
    return (
        f"(config of {name}). Fields understood: {', '.join(understood) or 'none'}.{advice} "
        f"Known families, with their model_type: {_known_families()}"
    )


def _understood(config: Mapping[str, Any]) -> list[str]:
    return [f"{meaning}={short(config[key])}" for meaning, keys in _COMMON for key in keys if key in config]


def _known_families() -> str:
    """Titles in alphabetical order, each with the model types that configs of the family have."""
    types: dict[str, list[str]] = {}
    for family in sorted(FAMILIES, key=lambda family: family.title.casefold()):
        known = types.setdefault(family.title, [])
        known += [model_type for model_type in family.model_types if model_type not in known]
    return ", ".join(f"{title} ({' or '.join(names)})" for title, names in types.items())


def _text_model(config: Mapping[str, Any], family: Family, where: str) -> Mapping[str, Any]:
    if not family.nested:
        return config
    text = config.get(family.nested)
    if not isinstance(text, Mapping):
        raise InputError(f"{where}: the needed object {family.nested} is missing; it describes the text model")
    return text


def _refuse(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> None:
    found, value = lookup(config, key)
    if found and value is not None and value not in allowed:
        choices = " or ".join(json.dumps(choice) for choice in (*allowed, None))
        raise UnsupportedError(f"{where}: {key}={short(value)} is not modelled; supported: {choices}")


#: How configs call the number of multi-token-prediction modules.
_MTP_KEY = "num_nextn_predict_layers"
_MTP_KEYS = (_MTP_KEY, "num_mtp_layers", "num_mtp_modules")


def _mtp_modules(text: Mapping[str, Any], where: str) -> int:
    key = next((key for key in _MTP_KEYS if text.get(key) is not None), _MTP_KEY)
    return Values(text, {"modules": count(key, default=0)}, where).maybe("modules") or 0


def _notes(config: Mapping[str, Any], spec: ModelSpec, modules: int) -> tuple[str, ...]:
    """What the config says beside the text model's own parameters, in words."""
    notes: list[str] = []
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method", "unnamed")
        notes.append(
            f"quantization_config ({method}) changes how weights are stored, not how many there are: not applied"
        )
    if any(isinstance(config.get(key), Mapping) for key in ("vision_config", "audio_config")):
        notes.append("text model only: the vision or audio towers of the config are not counted")
    if modules and not spec.multi_token_prediction:
        which = "1 multi-token-prediction module" if modules == 1 else f"{modules} multi-token-prediction modules"
        notes.append(f"not counted, as in transformers' class: {which} of the config; --mtp counts them")
    elif modules:
        copies = (1 + (not spec.head.tied)) * modules * spec.padded_vocab_size * spec.hidden_size
        notes.append(
            "multi-token prediction: token table and head are the model's own and counted once; a checkpoint that "
            f"repeats them in every module stores {copies:,} parameters more"
        )
    if spec.padded_vocab_size != spec.vocab_size:
        notes.append(
            f"vocabulary of {spec.vocab_size} padded to {spec.padded_vocab_size}, a multiple of {spec.vocab_multiple}"
        )
    return tuple(notes)
