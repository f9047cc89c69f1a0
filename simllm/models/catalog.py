"""The catalog: models by name, each a config as Hugging Face writes it, beside what a config does not say."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from simllm.errors import unknown_name
from simllm.models.config import read_config, spec_from_config
from simllm.models.spec import ModelSpec

__all__ = ["CatalogEntry", "catalog_entries", "catalog_names", "load_config", "load_model"]

_HERE = Path(__file__).parent
_CONFIGS = _HERE / "configs"


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """A model of the catalog.

    Attributes
    ----------
    name : str
        What `load_model` accepts.
    family, tokenizer : str
        Family and kind of tokenizer; several families share a ``model_type`` (GPT-3 is a ``gpt2``).
    hub_ids : tuple of str
        Repositories of the Hugging Face hub with this config; `load_model` accepts them too.
    context_length : int or None
        Training length, for configs without a field for it (ALiBi, relative positions).
    config : Path
        The ``config.json``.
    """

    name: str
    family: str
    tokenizer: str
    hub_ids: tuple[str, ...]
    context_length: int | None
    config: Path


@cache
def _index() -> dict[str, CatalogEntry]:
    raw: dict[str, dict[str, Any]] = json.loads((_HERE / "catalog.json").read_text(encoding="utf-8"))
    return {
        name: CatalogEntry(
            name=name,
            family=entry["family"],
            tokenizer=entry["tokenizer"],
            hub_ids=tuple(entry.get("hub_ids", ())),
            context_length=entry.get("context_length"),
            config=_CONFIGS / f"{name}.json",
        )
        for name, entry in raw.items()
    }


@cache
def _spellings() -> dict[str, str]:
    """Every accepted spelling, in lower case, and the name it stands for.

    Hub ids count with and without their organisation, and a catalog name counts behind any organisation.
    """
    spellings: dict[str, str] = {}
    for entry in _index().values():
        for hub_id in entry.hub_ids:
            spellings[hub_id.casefold()] = entry.name
            spellings.setdefault(hub_id.rpartition("/")[2].casefold(), entry.name)
    return spellings | {name.casefold(): name for name in _index()}


def catalog_names() -> tuple[str, ...]:
    """Names of the catalog's models, families together.

    Examples
    --------
    >>> "llama-3.1-405b" in catalog_names()
    True
    """
    return tuple(_index())


def catalog_entries() -> tuple[CatalogEntry, ...]:
    """The catalog's models with their families, families together."""
    return tuple(_index().values())


def load_model(name_or_path: str | os.PathLike[str], *, mtp: bool = False, vocab_multiple: int = 1) -> ModelSpec:
    """The spec of a model of the catalog, or of a ``config.json``.

    Parameters
    ----------
    name_or_path : str or path
        A name of the catalog or a hub id of one of its models (upper and lower case alike), a ``config.json``, or a
        folder that holds one. A name of the catalog wins over a file of the same name.
    mtp : bool
        Include the multi-token-prediction modules that the config states.
    vocab_multiple : int
        Pad the vocabulary up to a multiple of this.

    Raises
    ------
    InputError
        The name is unknown, or the config cannot be used.

    Examples
    --------
    >>> load_model("meta-llama/Llama-3.1-405B").name
    'llama-3.1-405b'
    >>> load_model("lama-3-8b")
    Traceback (most recent call last):
    ...
    simllm.errors.InputError: unknown model 'lama-3-8b'; did you mean llama-3-8b...
    """
    given = os.fspath(name_or_path)
    name = _name(given)
    if name is not None:
        return _load(name, mtp, vocab_multiple)
    path = Path(given)
    # os.path.exists says no, instead of raising, to names that cannot be paths.
    looks_like_a_path = path.suffix == ".json" or path.is_absolute() or given.startswith(".")
    if "\0" not in given and (looks_like_a_path or os.path.exists(given)):
        return spec_from_config(read_config(given), _path_name(path), mtp=mtp, vocab_multiple=vocab_multiple)
    hint = "(the names are printed by `simllm models list`; a config.json, or a folder that holds one, is accepted too)"
    raise unknown_name("model", given, catalog_names(), hint)


def load_config(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The Hugging Face config behind a name or path that `load_model` accepts.

    >>> load_config("llama-3-8b")["rope_theta"]
    500000.0
    """
    given = os.fspath(name_or_path)
    name = _name(given)
    return read_config(given if name is None else _index()[name].config)


def _name(given: str) -> str | None:
    spelled = given.strip().casefold()
    organisation, slash, rest = spelled.rpartition("/")
    spellings = _spellings()
    if spelled in spellings:
        return spellings[spelled]
    # An organisation is one word: ./llama-7b and models/llama/llama-7b are paths.
    if slash and organisation not in (".", "..", "") and "/" not in organisation and not os.path.exists(given):
        return spellings.get(rest)
    return None


def _path_name(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == "config.json":
        return folder.resolve().name or "model"
    return path.stem


@cache
def _load(name: str, mtp: bool, vocab_multiple: int) -> ModelSpec:
    entry = _index()[name]
    spec = spec_from_config(read_config(entry.config), name, mtp=mtp, vocab_multiple=vocab_multiple)
    return replace(
        spec,
        family=entry.family,
        tokenizer=entry.tokenizer,
        context_length=spec.context_length or entry.context_length,
    )
