"""DoRA: magnitude and direction of a weight apart (Liu 2024, arXiv:2402.09353, equation 5).

``h = m (W x + s B A x) / ||W + s B A||`` with one magnitude per output: ``r (in + out) + out`` trained parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simllm.errors import UnsupportedError
from simllm.models.finetuning.lora import LoRA
from simllm.models.finetuning.operators import Decompose
from simllm.models.finetuning.rewrite import Editor
from simllm.models.finetuning.targets import Module
from simllm.models.graph import Operator, Tensor, Weight
from simllm.models.operators import Router
from simllm.models.spec import ModelSpec

__all__ = ["DoRA"]


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation; the options are LoRA's."""

    name: ClassVar[str] = "dora"
    formula: ClassVar[str] = "r (in + out) + out for each targeted matrix"
    paper: ClassVar[str] = "Liu 2024, arXiv:2402.09353"

    def adapt(self, editor: Editor, module: Module, spec: ModelSpec) -> None:
        if module.is_expert or isinstance(module.operator, Router):
            raise UnsupportedError(f"dora on {module.name}: not for experts and routers; choose other targets")
        super().adapt(editor, module, spec)

    def sum(
        self, editor: Editor, module: Module, source: Tensor, bases: tuple[Tensor, ...], deltas: tuple[Tensor, ...]
    ) -> Operator:
        magnitudes = tuple(
            Weight(f"{module.name}.lora_magnitude.{i}", (w.axes[-1],), "adapter") for i, w in enumerate(module.weights)
        )
        return Decompose(
            name=f"{module.name}.dora",
            component="adapter",
            inputs=(*bases, *deltas),
            outputs=module.outputs,
            weights=magnitudes,
            rank=self.rank,
            in_axis=module.weights[0].axes[-2],
            bias=any(len(weight.axes) == 1 for weight in module.operator.weights),
        )
