"""VeRA: random matrices shared by all layers, learned scales around them (Kopiczko 2023, arXiv:2310.11454, equation 2).

``h = W x + b * (B (d * (A x)))`` with A and B frozen and one pair for the model: ``out + r`` trained parameters per
matrix. A is r x the widest input, B the widest output x r.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.errors import UnsupportedError
from simllm.models.finetuning.lora import LoRA
from simllm.models.finetuning.method import default_targets
from simllm.models.finetuning.names import schemes_of
from simllm.models.finetuning.operators import LowRankSum, Scale
from simllm.models.finetuning.rewrite import Editor, rewrite
from simllm.models.finetuning.targets import Module, Targets
from simllm.models.graph import Axis, Graph, ModelGraph, Tensor, Weight
from simllm.models.operators import Projection, Router
from simllm.models.spec import ModelSpec

__all__ = ["VeRA"]


@dataclass(frozen=True, kw_only=True)
class VeRA(LoRA):
    """Vector-based random-matrix adaptation. The shared pair is kept with the embedding, on the first pipeline rank."""

    name: ClassVar[str] = "vera"
    formula: ClassVar[str] = "out + r for each targeted matrix"
    paper: ClassVar[str] = "Kopiczko 2023, arXiv:2310.11454"

    rank: int = 256

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        targets = Targets.of(self.targets or default_targets(schemes_of(spec.model_type)[0]), graph, spec)
        modules = [module for part, _ in graph.parts for module in targets.in_block(part)]
        rank = Axis("fixed", self.rank)
        shared = tuple(
            Weight(f"vera_{side}", (rank, Axis("fixed", width)), "adapter", trained=False, counted=False)
            for side, width in (
                ("A", max(module.in_features for module in modules)),
                ("B", max(module.out_features for module in modules)),
            )
        )

        def edit(block: Graph) -> Graph:
            return self._edit(block, targets, spec)

        def stem(block: Graph) -> Graph:
            edited = self._edit(block, targets, spec)
            first = edited.operators[0]
            kept = replace(first, weights=(*first.weights, *shared))
            return replace(edited, operators=(kept, *edited.operators[1:]))

        return rewrite(graph, layer=edit, stem=stem, head=edit, between=edit, layers=self.chosen_layers(graph))

    def adapt(self, editor: Editor, module: Module, spec: ModelSpec) -> None:
        if module.is_expert or isinstance(module.operator, Router):
            raise UnsupportedError(f"vera on {module.name}: not for experts and routers; choose other targets")
        name, rank = module.name, Axis("fixed", self.rank)
        source = editor.operator(module.operator.name).inputs[0]
        low, scaled = (Tensor(f"{name}.vera_{x}", (*source.axes[:-1], rank)) for x in ("A", "d"))
        wide = tuple(replace(out, name=f"{out.name}.vera_B", dtype="activation") for out in module.outputs)
        deltas = tuple(replace(out, name=f"{out.name}.vera_delta") for out in wide)
        first = module.weights[0]
        constant = {"trained": False, "counted": False, "tied": True, "beside": True}
        bases = editor.divert(module.operator.name, module.outputs)
        editor.after(
            module.operator.name,
            Projection(
                name=f"{name}.vera_A",
                component="adapter",
                inputs=(source,),
                outputs=(low,),
                weights=(Weight("vera_A", (first.axes[-2], rank), "adapter", **constant),),  # type: ignore[arg-type]
            ),
            Scale(
                name=f"{name}.vera_d",
                component="adapter",
                inputs=(low,),
                outputs=(scaled,),
                weights=(Weight(f"{name}.vera_lambda_d", (rank,), "adapter"),),
            ),
            Projection(
                name=f"{name}.vera_B",
                component="adapter",
                inputs=(scaled,),
                outputs=wide,
                weights=tuple(Weight("vera_B", (rank, w.axes[-1]), "adapter", **constant) for w in module.weights),  # type: ignore[arg-type]
            ),
            Scale(
                name=f"{name}.vera_b",
                component="adapter",
                inputs=wide,
                outputs=deltas,
                weights=tuple(
                    Weight(f"{name}.vera_lambda_b.{i}", (w.axes[-1],), "adapter") for i, w in enumerate(module.weights)
                ),
            ),
            LowRankSum(
                name=f"{name}.vera_sum",
                component="adapter",
                inputs=(*bases, *deltas),
                outputs=module.outputs,
                source=source,
            ),
        )
