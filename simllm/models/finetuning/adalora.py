"""AdaLoRA: a low-rank product in the form of a singular value decomposition (Zhang 2023, arXiv:2303.10512, equation 3).

``h = W x + P diag(E) Q x``: ``r (in + out + 1)`` trained parameters at the initial rank. Singular values are pruned
during training down to the target rank on average; parameters and memory stay those of the initial rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simllm.models.finetuning.lora import LoRA
from simllm.models.finetuning.targets import Module
from simllm.models.graph import Axis, Weight

__all__ = ["AdaLoRA"]


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LoRA):
    """Adaptive budget allocation; ``rank`` is the initial rank."""

    name: ClassVar[str] = "adalora"
    formula: ClassVar[str] = "r (in + out + 1) for each targeted matrix, r the initial rank"
    paper: ClassVar[str] = "Zhang 2023, arXiv:2303.10512"

    rank: int = 12

    def extra(self, module: Module) -> tuple[Weight, ...]:
        experts = module.weights[0].axes[:1] if module.is_expert else ()
        return (
            Weight(f"{module.name}.lora_E", (*experts, Axis("fixed", self.rank)), "adapter"),
            # The number of singular values that are left: a parameter without gradient.
            Weight(f"{module.name}.ranknum", (Axis("fixed", 1),), "adapter", trained=False),
        )
