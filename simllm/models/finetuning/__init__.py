"""Fine-tuning methods: each a transformation of the one graph, in a file with its formula and its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, Final

from simllm.errors import InputError, unknown_name
from simllm.models.finetuning.adalora import AdaLoRA
from simllm.models.finetuning.adapters import Houlsby, Pfeiffer
from simllm.models.finetuning.dora import DoRA
from simllm.models.finetuning.full import BitFit, Freeze, Full
from simllm.models.finetuning.galore import GaLore
from simllm.models.finetuning.ia3 import IA3
from simllm.models.finetuning.llama_adapter import LlamaAdapter
from simllm.models.finetuning.lora import LoRA, LoRAPlus
from simllm.models.finetuning.method import Method
from simllm.models.finetuning.p_tuning import PTuning
from simllm.models.finetuning.prefix import PrefixTuning, PTuningV2
from simllm.models.finetuning.prompt import PromptTuning
from simllm.models.finetuning.qlora import QLoRA
from simllm.models.finetuning.vera import VeRA
from simllm.models.graph import ModelGraph
from simllm.models.spec import ModelSpec

__all__ = ["METHODS", "Method", "finetuned_graph", "method_named"]

METHODS: Final[Mapping[str, type[Method]]] = {
    method.name: method
    for method in (
        Full,
        Freeze,
        BitFit,
        PromptTuning,
        PTuning,
        PrefixTuning,
        PTuningV2,
        Houlsby,
        Pfeiffer,
        LlamaAdapter,
        LoRA,
        LoRAPlus,
        DoRA,
        AdaLoRA,
        VeRA,
        IA3,
        QLoRA,
        GaLore,
    )
}


def method_named(name: str, **options: Any) -> Method:
    """A method by name with its options.

    Raises
    ------
    InputError
        The method is unknown, or it has no such option; the message lists what there is.

    Examples
    --------
    >>> method_named("lora", rank=16).rank
    16
    """
    if name not in METHODS:
        raise unknown_name("fine-tuning method", name, METHODS)
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            allowed = f"its options: {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{name} has no option {option}; {allowed}")
    return METHODS[name](**options)


@lru_cache(maxsize=512)
def finetuned_graph(graph: ModelGraph, spec: ModelSpec, method: Method) -> ModelGraph:
    """The graph of a model under a method. Cached: the same question gives the same object."""
    return method.apply(graph, spec)
