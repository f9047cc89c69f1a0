"""Prompt tuning: learned tokens in front of the sequence (Lester 2021, arXiv:2104.08691, section 2).

``V`` rows of the embedding's width; of an encoder-decoder ``V`` for each of its two sequences, as in peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from simllm.errors import InputError
from simllm.models.finetuning.method import Method, check_count
from simllm.models.finetuning.operators import Join
from simllm.models.finetuning.rewrite import Editor, frozen, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Embedding
from simllm.models.spec import MambaSpec, ModelSpec

__all__ = ["PromptTuning", "Virtual", "check_attention", "check_context", "in_front", "learned_table"]


@dataclass(frozen=True, kw_only=True)
class Virtual(Method):
    """A method with learned tokens.

    Attributes
    ----------
    virtual_tokens : int
    """

    virtual_tokens: int = 20

    def __post_init__(self) -> None:
        check_count("virtual_tokens", self.virtual_tokens)

    @property
    def context_tokens(self) -> int:
        return self.virtual_tokens


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Virtual):
    """Learned tokens in front of the sequence; every layer works on them too."""

    name: ClassVar[str] = "prompt"
    formula: ClassVar[str] = "V d; twice for an encoder-decoder"
    paper: ClassVar[str] = "Lester 2021, arXiv:2104.08691"

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        check_context(self.virtual_tokens, spec)

        def edit(block: Graph) -> Graph:
            prompt, operators = learned_table("prompt", self.virtual_tokens, Axis("hidden", spec.hidden_size))
            return in_front(block, prompt, operators)

        return rewrite(graph, layer=frozen, stem=edit, between=edit, virtual_tokens=self.virtual_tokens)


def check_context(virtual_tokens: int, spec: ModelSpec) -> None:
    """Refuse virtual tokens that leave no room for a sequence."""
    if spec.context_length is not None and virtual_tokens >= spec.context_length:
        raise InputError(
            f"virtual_tokens={virtual_tokens} fill the whole context of {spec.name}, {spec.context_length} tokens; "
            "use fewer"
        )


def learned_table(
    name: str, rows: int, width: Axis, axis: Literal["learned", "virtual"] = "learned"
) -> tuple[Tensor, tuple[Operator, ...]]:
    """A table of learned tokens, looked up once (``learned``) or for every sequence (``virtual``), as peft does."""
    ids = Tensor(f"{name}_ids", (Axis("fixed", rows),), "index")
    out = Tensor(name, (Axis(axis, rows), width))
    weight = Weight(f"{name}.weight", (Axis("fixed", rows), width), "prompt")
    return out, (Embedding(name=name, component="prompt", inputs=(ids,), outputs=(out,), weights=(weight,)),)


def in_front(block: Graph, prompt: Tensor, operators: tuple[Operator, ...]) -> Graph:
    """Put learned tokens in front of what an embedding looked up."""
    editor = Editor(block)
    embedding = editor.operator("embedding")
    (base,) = editor.divert("embedding", embedding.outputs)
    join = Join(name="prompt_join", component="prompt", inputs=(base, prompt), outputs=embedding.outputs)
    editor.after("embedding", *operators, join)
    return editor.graph()


def check_attention(spec: ModelSpec, method: str) -> None:
    """Refuse learned keys and values where a layer has no attention that could take them."""
    for block in spec.decoder.layers:
        if isinstance(block.mixer, MambaSpec):
            raise InputError(f"{method}: {spec.name} has state-space mixers without keys and values; use lora")
        if block.mixer.latent is not None:
            raise InputError(f"{method}: {spec.name} keeps keys and values as latents; use lora or prompt")
