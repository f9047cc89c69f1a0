"""LoRA: a trained low-rank product beside a frozen one (Hu 2021, arXiv:2106.09685, equation 3).

``h = W x + (alpha / r) B A x``, with A of r x in and B of out x r: ``r (in + out)`` trained parameters per matrix, of a
fused module one pair for the whole, of experts one pair for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.method import Targeted, check_count, check_rank, default_targets
from simllm.models.finetuning.names import schemes_of
from simllm.models.finetuning.operators import LowRankSum
from simllm.models.finetuning.rewrite import Editor, rewrite
from simllm.models.finetuning.targets import Module, Targets
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Dropout, GroupedProjection, Projection, Router
from simllm.models.spec import ModelSpec

__all__ = ["LoRA", "LoRAPlus"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Targeted):
    """Low-rank adaptation.

    Attributes
    ----------
    rank : int
    alpha : float
        Scale of the product, over the rank. It changes what is learned, not what it costs.
    dropout : float
        Probability of dropout in front of A; each module then has its own mask and its own copy of the input.

    Examples
    --------
    >>> from simllm.models import Model
    >>> Model.load("llama-7b").finetuned("lora", rank=8).trainable_parameters
    4194304
    """

    name: ClassVar[str] = "lora"
    formula: ClassVar[str] = "r (in + out) for each targeted matrix"
    paper: ClassVar[str] = "Hu 2021, arXiv:2106.09685"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must be at least 0 and below 1")

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        targets = Targets.of(self.targets or default_targets(schemes_of(spec.model_type)[0]), graph, spec)

        def edit(block: Graph) -> Graph:
            return self._edit(block, targets, spec)

        return rewrite(graph, layer=edit, stem=edit, head=edit, between=edit, layers=self.chosen_layers(graph))

    def _edit(self, block: Graph, targets: Targets, spec: ModelSpec) -> Graph:
        editor = Editor(block)
        for module in targets.in_block(block):
            check_rank(self.rank, module.name, module.in_features, module.out_features)
            method = replace(self, rank=2 * self.rank) if module.name in targets.doubled else self
            method.adapt(editor, module, spec)
        return editor.graph()

    def adapt(self, editor: Editor, module: Module, spec: ModelSpec) -> None:
        """Put the low-rank pair beside a module."""
        source = editor.operator(module.operator.name).inputs[0]
        pair, deltas = self.pair(module, source)
        if isinstance(module.operator, Router):
            # The sum goes into the router's softmax: one more input.
            editor.before(module.operator.name, *pair)
            editor.change(module.operator.name, inputs=(*module.operator.inputs, *deltas))
            return
        bases = editor.divert(module.operator.name, module.outputs)
        editor.after(module.operator.name, *pair, self.sum(editor, module, source, bases, deltas))

    def sum(
        self, editor: Editor, module: Module, source: Tensor, bases: tuple[Tensor, ...], deltas: tuple[Tensor, ...]
    ) -> Operator:
        """What puts the frozen and the trained product together."""
        return LowRankSum(
            name=f"{module.name}.lora_sum",
            component="adapter",
            inputs=(*bases, *deltas),
            outputs=module.outputs,
            source=source,
        )

    def pair(self, module: Module, source: Tensor) -> tuple[tuple[Operator, ...], tuple[Tensor, ...]]:
        """The operators of ``B A x`` and what they produce."""
        name, rank = module.name, Axis("fixed", self.rank)
        first = module.weights[0]
        experts = first.axes[:1] if module.is_expert else ()
        kind = GroupedProjection if module.is_expert else Projection
        operators: list[Operator] = []
        x = source
        if self.dropout:
            x = replace(source, name=f"{name}.lora_dropped")
            operators.append(Dropout(name=f"{name}.lora_dropout", component="adapter", inputs=(source,), outputs=(x,)))
        low = Tensor(f"{name}.lora_A", (*x.axes[:-1], rank))
        deltas = tuple(replace(out, name=f"{out.name}.lora_delta", dtype="activation") for out in module.outputs)
        down = (self.weight(f"{name}.lora_A.weight", (*experts, first.axes[-2], rank), first),)
        up = tuple(
            self.weight(f"{name}.lora_B.{i}.weight", (*experts, rank, w.axes[-1]), first)
            for i, w in enumerate(module.weights)
        )
        operators.append(
            kind(
                name=f"{name}.lora_A",
                component="adapter",
                inputs=(x,),
                outputs=(low,),
                weights=(*down, *self.extra(module)),
            )
        )
        operators.append(kind(name=f"{name}.lora_B", component="adapter", inputs=(low,), outputs=deltas, weights=up))
        return tuple(operators), deltas

    def extra(self, module: Module) -> tuple[Weight, ...]:
        """Further weights beside A."""
        return ()

    def weight(self, name: str, axes: tuple[Axis, ...], like: Weight) -> Weight:
        """A trained weight that a token passes through as often as the base's."""
        return Weight(name, axes, "adapter", like.active)


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA whose B learns faster than A (Hayou 2024, arXiv:2402.12354): the learning rates differ, the costs do not."""

    name: ClassVar[str] = "lora+"
    paper: ClassVar[str] = "Hayou 2024, arXiv:2402.12354"
