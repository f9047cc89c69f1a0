"""QLoRA: LoRA beside weights in four bits (Dettmers 2023, arXiv:2305.14314).

The linear modules of the layers are kept in NF4: four bits an element, a scale for every 64 elements, and with double
quantisation the scales in eight bits with a float32 for every 256 of them: 0.127 instead of 0.5 bits an element
(section 3). Every product expands its weight to the compute precision first, forward and again backward. Tables, norms
and the head stay as they are, or go to float32. The paged optimizer keeps the states of the adapters in pages that move
to the host when the device runs full: with ``paged`` they are there, and cross the link both ways for every update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.lora import LoRA
from simllm.models.finetuning.targets import ALL_LINEAR, Targets, modules_of
from simllm.models.graph import Graph, ModelGraph, Storage, Weight
from simllm.models.spec import ModelSpec

__all__ = ["QLoRA", "nf4"]

#: Values that the sixteen codes stand for, and those of the 256 codes of a scale with its mean, in float32.
_CODE_BYTES, _SCALE_CODE_BYTES = 16 * 4, 256 * 4 + 4


def nf4(block: int = 64, double: bool = True) -> Storage:
    """NF4 in blocks, with or without double quantisation.

    >>> round(8 * nf4().bytes(10**9) / 1e9, 3), nf4(double=False).bytes(6400) - 64
    (4.127, 3600.0)
    """
    if double:
        return Storage("nf4", 4, block, 1.0, 256, _CODE_BYTES + _SCALE_CODE_BYTES)
    return Storage("nf4", 4, block, 4.0, 0, _CODE_BYTES)


@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA on quantised weights; ``targets`` are all linear modules by default, as in the paper.

    Attributes
    ----------
    block : int
        Elements that share a scale.
    double_quantisation : bool
    upcast : bool
        What is not quantised goes to float32, as peft's prepare_model_for_kbit_training does.
    paged : bool
        The adapters' optimizer states are on the host.
    """

    name: ClassVar[str] = "qlora"
    formula: ClassVar[str] = "r (in + out) for each targeted matrix"
    paper: ClassVar[str] = "Dettmers 2023, arXiv:2305.14314"

    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank: int = 64
    block: int = 64
    double_quantisation: bool = True
    upcast: bool = False
    paged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in (64, 128, 256, 512, 1024, 2048, 4096):
            raise InputError(f"block={self.block}: blocks of 64, 128, 256, 512, 1024, 2048 or 4096 elements are known")

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        adapted = super().apply(graph, spec)
        everywhere = Targets.of((ALL_LINEAR,), graph, spec)
        storage = nf4(self.block, self.double_quantisation)
        made: dict[int, Graph] = {}

        def quantised(block: Graph) -> Graph:
            if id(block) not in made:
                weights = {
                    id(w)
                    for module in modules_of(block, everywhere.scheme)
                    if module.name in everywhere.names
                    for w in module.weights
                }
                made[id(block)] = _store(block, weights, storage, self.upcast, self.paged)
            return made[id(block)]

        # Parameters that are not modules, such as stacked experts, are left alone by bitsandbytes, like the head.
        return replace(
            adapted,
            stem=quantised(adapted.stem),
            layers=tuple(quantised(layer) for layer in adapted.layers),
            head=quantised(adapted.head),
            bridges=tuple((at, quantised(block)) for at, block in adapted.bridges),
            last_layers=tuple(quantised(layer) for layer in adapted.last_layers),
            last_extras=tuple(quantised(block) for block in adapted.last_extras),
        )


_FLOAT32 = Storage("float32", 32, 1, 0.0)


def _store(graph: Graph, weights: set[int], storage: Storage, upcast: bool, paged: bool) -> Graph:
    def kept(weight: Weight) -> Weight:
        if weight.trained:
            return replace(weight, paged=paged)
        if id(weight) in weights:
            return replace(weight, storage=storage)
        return replace(weight, storage=_FLOAT32) if upcast else weight

    operators = tuple(replace(op, weights=tuple(kept(w) for w in op.weights)) for op in graph.operators)
    return replace(graph, operators=operators)
