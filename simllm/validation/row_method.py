"""The fine-tuning method of a published run: the task says that there is one, the notes say which."""

from __future__ import annotations

import re
from dataclasses import replace

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.finetuning.names import schemes_of
from simllm.models.finetuning.targets import names_in
from simllm.models.graph import ModelGraph
from simllm.models.spec import ModelSpec
from simllm.training import Estimate, estimate
from simllm.validation.table import Row

__all__ = ["fine_tuned", "must_have_fitted"]

#: What stands in for a rank that is not stated: that of MLPerf's benchmark.
_RANK = 16


def fine_tuned(row: Row, model: Model) -> Model:
    """The model of a row as its task trains it.

    Raises
    ------
    InputError
        The rank is larger than a matrix.
    """
    if row.text("task").casefold() != "lora":
        return model
    notes = row.text("notes").casefold()
    stated = re.search(r"\br(?:ank)?\s*=?\s*(\d+)", notes)
    rank = int(stated.group(1)) if stated else _RANK
    attention = bool(re.search(r"attention lora|qkv", notes))
    targets = _attention_modules(model.graph, model.spec) if attention else ("all-linear",)
    what = ", ".join(name.rpartition(".")[2] for name in targets)
    if not targets:
        raise InputError("task=lora of a model without attention modules")
    row.assume(
        f"LoRA of rank {rank} on {what}{'' if stated else '; the rank is not stated'}; frozen weights in 16 bits"
    )
    return model.finetuned("lora", rank=rank, targets=targets)


def must_have_fitted(row: Row, answer: Estimate) -> Estimate:
    """Of a fine-tuning run that states no recomputation and does not fit without: with the least that makes it fit.

    Megatron recomputes some of the layers, transformers all of them.
    """
    if answer.model.method is None or answer.fits or row.text("recompute"):
        return answer
    whole = row.text("framework").startswith("HF")
    for every in (1,) if whole else (8, 4, 2, 1):
        again = replace(answer.plan, recompute=Recompute(kind="full", every=every))
        priced = estimate(answer.model, answer.cluster, again, answer.training)
        if priced.fits or every == 1:
            break
    row.assume(f"recomputation is not stated, and without it the run does not fit: recompute={again.recompute}")
    return priced


def _attention_modules(graph: ModelGraph, spec: ModelSpec) -> tuple[str, ...]:
    scheme = schemes_of(spec.model_type)[0]
    return tuple(name for name in names_in(graph, scheme) if scheme.get(name, "").partition(":")[0] in ("qkv", "o"))
