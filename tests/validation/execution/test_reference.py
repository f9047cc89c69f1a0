"""The reference model has the parameters that the graph counts, for models of every kind in full size."""

from __future__ import annotations

import pytest
import torch

from simllm.errors import UnsupportedError
from simllm.models import Model
from simllm.validation.execution.reference import Transformer
from simllm.validation.execution.sizes import shrink

MODELS = (
    "gpt2",
    "gpt3-175b",
    "llama-3-70b",
    "llama-3.1-405b",
    "mixtral-8x7b",
    "falcon-7b",
    "falcon-40b",
    "bloom-176b",
    "t5-11b",
    "deepseek-v3",
    "qwen3-8b",
    "gemma-2-9b",
    "olmo-2-7b",
)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_count(name: str) -> None:
    model = Model.load(name)
    with torch.device("meta"):
        assert _parameters(Transformer(model.spec)) == model.parameters.total


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_has_the_same_parts(name: str) -> None:
    small = Model(shrink(Model.load(name).spec))
    assert _parameters(Transformer(small.spec)) == small.parameters.total
    same = {"position", "norm", "bias", "parallel_block", "head"}
    words, whole = small.components, Model.load(name).components
    assert {key: words[key] for key in same} == {key: whole[key] for key in same}


def test_stages_have_the_parameters_of_the_whole() -> None:
    """Untied, the parts of a pipeline add up; names are those of the whole model."""
    spec = shrink(Model.load("llama-3-70b").spec)
    names = [name for span in ((0, 2), (2, 4)) for name, _ in Transformer(spec, span).named_parameters()]
    assert sorted(names) == sorted(name for name, _ in Transformer(spec).named_parameters())


@pytest.mark.parametrize(("name", "what"), [("chatglm-6b", "prefix mask"), ("bert-base-uncased", "token types")])
def test_what_is_not_executed_is_refused_by_name(name: str, what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        Transformer(Model.load(name).spec)
