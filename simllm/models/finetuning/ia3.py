"""IA3: learned factors on keys, values and the inner activations (Liu 2022, arXiv:2205.05638, section 3.3).

One factor per output of a targeted module, or per input where it is a feed-forward module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.errors import InputError, UnsupportedError
from simllm.models.finetuning.method import Targeted
from simllm.models.finetuning.names import Scheme, schemes_of
from simllm.models.finetuning.operators import Scale
from simllm.models.finetuning.rewrite import Editor, rewrite
from simllm.models.finetuning.targets import Module, Targets
from simllm.models.graph import Graph, ModelGraph, Weight
from simllm.models.operators import Router
from simllm.models.spec import ModelSpec

__all__ = ["IA3"]


@dataclass(frozen=True, kw_only=True)
class IA3(Targeted):
    """Infused adapter by inhibiting and amplifying inner activations.

    Attributes
    ----------
    feedforward : tuple of str
        Those of the targets whose input is scaled instead of their output; empty: the targets that end a feed-forward
        layer.
    """

    name: ClassVar[str] = "ia3"
    formula: ClassVar[str] = "out for each targeted matrix, in for those of a feed-forward layer"
    paper: ClassVar[str] = "Liu 2022, arXiv:2205.05638"

    feedforward: tuple[str, ...] = ()

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        scheme = schemes_of(spec.model_type)[0]
        targets = Targets.of(self.targets or _usual(scheme), graph, spec)
        inner = _feed_forward(targets)
        if self.feedforward:
            inner = Targets.of(self.feedforward, graph, spec).names
            if not inner <= targets.names:
                raise InputError(f"feedforward={','.join(sorted(inner - targets.names))} is not among the targets")

        def edit(block: Graph) -> Graph:
            editor = Editor(block)
            for module in targets.in_block(block):
                _scale(editor, module, module.name in inner)
            return editor.graph()

        return rewrite(graph, layer=edit, stem=edit, head=edit, between=edit, layers=self.chosen_layers(graph))


def _usual(scheme: Scheme) -> tuple[str, ...]:
    """Keys, values (or the fused module) and what ends the feed-forward layer."""
    return tuple(
        name
        for name, part in scheme.items()
        if part.startswith("down:") or (part.startswith("qkv:") and {"k", "v"} & set(part[4:].split(",")))
    )


def _feed_forward(targets: Targets) -> frozenset[str]:
    return frozenset(name for name in targets.names if targets.scheme.get(name, "").startswith("down:"))


def _scale(editor: Editor, module: Module, inner: bool) -> None:
    if module.is_expert or isinstance(module.operator, Router):
        raise UnsupportedError(f"ia3 on {module.name}: not for experts and routers; choose other targets")
    name, operator = module.name, editor.operator(module.operator.name)
    if inner:
        x = operator.inputs[0]
        scaled = replace(x, name=f"{name}.ia3")
        weight = Weight(f"{name}.ia3_l", (module.weights[0].axes[-2],), "adapter")
        editor.before(
            operator.name,
            Scale(name=f"{name}.ia3", component="adapter", inputs=(x,), outputs=(scaled,), weights=(weight,)),
        )
        editor.change(operator.name, inputs=(scaled, *operator.inputs[1:]))
        return
    weights = tuple(Weight(f"{name}.ia3_l.{i}", (w.axes[-1],), "adapter") for i, w in enumerate(module.weights))
    bases = editor.divert(operator.name, module.outputs)
    editor.after(
        operator.name,
        Scale(name=f"{name}.ia3", component="adapter", inputs=bases, outputs=module.outputs, weights=weights),
    )
