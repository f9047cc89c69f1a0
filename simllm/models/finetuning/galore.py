"""GaLore: moments of a projection of the gradient, all weights trained (Zhao 2024, arXiv:2403.03507).

Of an m x n matrix with m >= n the moments have m x r elements and the projection n x r (section 4.3, table 1). Tables,
head and vectors keep the optimizer's own states. With ``adam-8bit`` as the optimizer it is 8-bit GaLore.
Projecting down and back is priced in every step; the decomposition that renews the projection every few hundred steps
is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.models.finetuning.method import Method, check_count, check_rank
from simllm.models.finetuning.rewrite import rewrite, unchanged
from simllm.models.graph import Graph, ModelGraph, Weight
from simllm.models.spec import ModelSpec

__all__ = ["GaLore"]


@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """Gradient low-rank projection.

    Attributes
    ----------
    rank : int
    """

    name: ClassVar[str] = "galore"
    formula: ClassVar[str] = (
        "all parameters; moments of r max(m, n) elements and a projection of r min(m, n) per matrix"
    )
    paper: ClassVar[str] = "Zhao 2024, arXiv:2403.03507"

    rank: int = 128

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        def edit(block: Graph) -> Graph:
            operators = tuple(
                replace(op, weights=tuple(self._project(w) for w in op.weights)) for op in block.operators
            )
            return replace(block, operators=operators)

        return rewrite(graph, layer=edit, stem=unchanged, head=unchanged, between=unchanged)

    def _project(self, weight: Weight) -> Weight:
        if len(weight.axes) < 2 or weight.component not in _PROJECTED:
            return weight
        *_, rows, columns = (axis.size for axis in weight.axes)
        check_rank(self.rank, weight.name, rows, columns)
        return replace(weight, moment_rank=self.rank)


_PROJECTED = frozenset({"attention", "cross_attention", "mlp", "experts", "shared_experts", "mamba"})
