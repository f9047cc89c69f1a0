"""The model families: for each ``model_type`` a table of fields and a function from them to a spec.

To add a family, write its table and its function in one of the modules here and add it to that module's ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simllm.models.families import (
    bart,
    bert,
    deepseek,
    gemma,
    glm,
    google,
    gpt,
    llama_kin,
    llama_like,
    mamba,
    moe,
    olmo,
    parallel,
    qwen,
    qwen_moe,
    t5,
)
from simllm.models.families.parts import Family

__all__ = ["FAMILIES", "Family", "families_of", "model_types"]

FAMILIES: tuple[Family, ...] = tuple(
    family
    for module in (
        gpt,
        parallel,
        llama_like,
        llama_kin,
        olmo,
        qwen,
        qwen_moe,
        gemma,
        glm,
        moe,
        deepseek,
        t5,
        bart,
        bert,
        mamba,
        google,
    )
    for family in module.FAMILIES
)

_BY_MODEL_TYPE: Mapping[str, tuple[Family, ...]] = {
    model_type: tuple(family for family in FAMILIES if model_type in family.model_types)
    for model_type in {model_type for family in FAMILIES for model_type in family.model_types}
}


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` that can be imported, in alphabetical order."""
    return tuple(sorted(_BY_MODEL_TYPE))


def families_of(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """The families that a config can belong to.

    None: its ``model_type`` is not known. One: that is it. Several: they share a ``model_type``, and none of the keys
    that tell them apart is there.
    """
    families = _BY_MODEL_TYPE.get(config["model_type"], ())
    marked = tuple(family for family in families if family.marker in config)
    return marked or families
