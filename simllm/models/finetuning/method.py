"""What a fine-tuning method is: a transformation of the graph, with its formula and its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from simllm.errors import InputError
from simllm.models.graph import ModelGraph
from simllm.models.spec import ModelSpec

__all__ = ["Method", "Targeted", "check_count", "check_rank", "default_targets"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fine-tuning method with its options.

    Subclasses say in `apply` what becomes of the graph; parameters, memory, time and plans follow from it.
    """

    name: ClassVar[str]
    #: Trainable parameters, in words.
    formula: ClassVar[str]
    paper: ClassVar[str]

    @property
    def context_tokens(self) -> int:
        """Positions of the context that learned tokens take."""
        return 0

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        """The graph of the model as it is fine-tuned.

        Raises
        ------
        InputError
            The method or its options do not go with this model.
        """
        raise NotImplementedError


#: What peft targets where nothing is said, by the projections of the graph: queries and values, or all of a fused one.
_DEFAULT_PARTS: Final = ("q", "v")


def default_targets(scheme: Mapping[str, str]) -> tuple[str, ...]:
    """Queries and values as a family calls them, as in the LoRA paper and peft; the fused module where there is one.

    >>> default_targets({"attn.c_attn": "qkv:q,k,v", "attn.c_proj": "o:o"})
    ('attn.c_attn',)
    """
    chosen = []
    for module, part in scheme.items():
        operator, _, weights = part.partition(" ")[0].partition(":")
        parts = weights.split(",")
        if operator == "qkv" and any(part in parts for part in _DEFAULT_PARTS):
            chosen.append(module)
    if not chosen:
        # Latent attention and state-space mixers have no such pair: what makes queries, or what enters the mixer.
        chosen = [name for name, part in scheme.items() if part.partition(":")[0] in ("q_a", "q_b", "in_proj")]
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method that changes chosen modules.

    Attributes
    ----------
    targets : tuple of str
        Names of modules as `Targets` reads them; empty: the family's queries and values.
    layers : tuple of int
        Only in these layers; empty: in all.
    """

    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            from simllm.models.finetuning.targets import parse_targets

            object.__setattr__(self, "targets", parse_targets(self.targets))

    def chosen_layers(self, graph: ModelGraph) -> frozenset[int] | None:
        """The layers to change, or None for all."""
        for layer in self.layers:
            if not 0 <= layer < len(graph.layers):
                raise InputError(f"layer {layer} does not exist; the model has layers 0 to {len(graph.layers) - 1}")
        return frozenset(self.layers) or None


def check_count(what: str, value: int, most: int = 10**6) -> None:
    """Refuse what is no whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{what}={value} must be a whole number from 1 to {most}")


def check_rank(rank: int, module: str, rows: int, columns: int) -> None:
    """Refuse a rank that is larger than the matrix it approximates."""
    if rank > min(rows, columns):
        raise InputError(
            f"rank={rank} is larger than {module}, a {rows} x {columns} matrix; use at most {min(rows, columns)}"
        )
