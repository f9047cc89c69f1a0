"""Modules by name: what a person targets, found in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from simllm.errors import InputError, unknown_name
from simllm.models.finetuning.names import STACKED_EXPERTS, Scheme, schemes_of
from simllm.models.graph import Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import GroupedProjection, Projection, Router
from simllm.models.spec import ModelSpec

__all__ = ["ALL_LINEAR", "Module", "Targets", "modules_of", "names_in", "parse_targets"]

ALL_LINEAR = "all-linear"
#: Families whose experts are modules of their own, which ``all-linear`` means too; elsewhere they are one parameter.
_EXPERT_MODULES = frozenset({"switch_transformers"})
_FORMER = frozenset({"gate_proj", "up_proj", "down_proj"})
_HEAD = {"lm_head": "lm_head:lm_head"}


@dataclass(frozen=True, kw_only=True)
class Module:
    """A linear module: the product it is part of, its matrices, and what they produce."""

    name: str
    operator: Operator
    weights: tuple[Weight, ...]
    outputs: tuple[Tensor, ...]

    @property
    def is_expert(self) -> bool:
        """Whether it is one matrix for each expert."""
        return self.weights[0].is_expert

    @property
    def in_features(self) -> int:
        """Rows of the matrix."""
        return self.weights[0].axes[-2].size

    @property
    def out_features(self) -> int:
        """Columns of the matrix, all weights of a fused module together."""
        return sum(weight.axes[-1].size for weight in self.weights)

    @property
    def experts(self) -> int:
        """Matrices of this size."""
        return self.weights[0].axes[0].size if self.is_expert else 1


def modules_of(graph: Graph, scheme: Scheme) -> Iterator[Module]:
    """The modules of one block that a scheme names."""
    operators = {operator.name: operator for operator in graph.operators}
    for name, part in {**scheme, **_HEAD}.items():
        where, _, condition = part.partition(" ")
        address, _, weights = where.partition(":")
        operator = operators.get(address)
        if operator is None or (condition and (condition[1:] in operators) != condition.startswith("+")):
            continue
        module = _module(name, operator, weights.split(","))
        if module is not None:
            yield module


def _module(name: str, operator: Operator, wanted: list[str]) -> Module | None:
    expert = isinstance(operator, GroupedProjection)
    assert expert or isinstance(operator, Projection | Router)
    matrices = [weight for weight in operator.weights if len(weight.axes) == (3 if expert else 2)]
    outputs = operator.outputs if len(operator.outputs) == len(matrices) else operator.outputs * len(matrices)
    chosen = [(w, out) for w, out in zip(matrices, outputs, strict=True) if w.name.removesuffix(".weight") in wanted]
    if not chosen:
        return None
    return Module(
        name=name, operator=operator, weights=tuple(w for w, _ in chosen), outputs=tuple(out for _, out in chosen)
    )


def parse_targets(text: str) -> tuple[str, ...]:
    """From the command line's spelling.

    >>> parse_targets("q_proj, v_proj")
    ('q_proj', 'v_proj')
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InputError(f"targets={text!r} has an empty name; write q_proj,v_proj or {ALL_LINEAR}")
    return names


def names_in(model: ModelGraph, scheme: Scheme) -> tuple[str, ...]:
    """The modules of a whole model, in the order of its blocks."""
    return tuple(dict.fromkeys(module.name for part, _ in model.parts for module in modules_of(part, scheme)))


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The chosen modules of a model.

    A target means the modules whose name it is or ends, as in peft: ``q_proj``, ``self_attn.q_proj``. ``all-linear``
    means every linear module but the output head.
    """

    scheme: Scheme
    names: frozenset[str]
    #: Those of two matrices side by side that had a pair each: one pair of twice the rank stands for both.
    doubled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, wanted: Iterable[str], model: ModelGraph, spec: ModelSpec) -> Targets:
        """Look targets up in a model.

        Raises
        ------
        InputError
            A target is no module of this model; the message lists those that are.
        """
        wanted = tuple(wanted)
        schemes = schemes_of(spec.model_type)
        if wanted == (ALL_LINEAR,):
            return cls._all_linear(model, spec, schemes[0])
        for scheme in schemes:
            own = names_in(model, scheme)
            if all(any(_means(target, name) for name in own) for target in wanted):
                chosen = frozenset(name for name in own if any(_means(target, name) for target in wanted))
                return cls(scheme=scheme, names=chosen)
        own = names_in(model, schemes[0])
        missing = next(target for target in wanted if not any(_means(target, name) for name in own))
        raise unknown_name(f"target of {spec.name}", missing, own, f"(its modules: {', '.join(own)}; or {ALL_LINEAR})")

    @classmethod
    def _all_linear(cls, model: ModelGraph, spec: ModelSpec, scheme: Scheme) -> Targets:
        modules = {m.name: m for part, _ in model.parts for m in modules_of(part, scheme) if m.name not in _HEAD}
        if spec.model_type not in STACKED_EXPERTS:
            experts = spec.model_type in _EXPERT_MODULES
            return cls(scheme=scheme, names=frozenset(n for n, m in modules.items() if experts or not m.is_expert))
        # peft reads the names of the experts' former modules as those of the parameters, wherever else they stand.
        dense = {name for name, m in modules.items() if name.rpartition(".")[2] in _FORMER and not m.is_expert}
        fused = frozenset(name for name, m in modules.items() if m.is_expert and len(m.weights) > 1)
        return cls(scheme=scheme, names=frozenset(modules) - dense, doubled=fused)

    def in_block(self, graph: Graph) -> tuple[Module, ...]:
        """The chosen modules of one block."""
        return tuple(module for module in modules_of(graph, self.scheme) if module.name in self.names)
