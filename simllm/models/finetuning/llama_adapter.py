"""LLaMA-Adapter: learned tokens that upper layers see through a gate (Zhang 2023, arXiv:2303.16199, equation 6).

``K d + 1`` trained parameters in each of the last layers: K tokens and a gate that starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simllm.errors import InputError
from simllm.models.finetuning.method import Method, check_count
from simllm.models.finetuning.operators import AdapterAttention
from simllm.models.finetuning.prompt import check_attention
from simllm.models.finetuning.rewrite import Editor, frozen, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Weight
from simllm.models.operators import Attention
from simllm.models.spec import ModelSpec

__all__ = ["LlamaAdapter"]


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    """Gated learned tokens, peft's adaption prompt.

    Attributes
    ----------
    adapter_len : int
        Learned tokens of a layer.
    adapter_layers : int
        The last so many layers; 0: all but two, as in the paper.
    """

    name: ClassVar[str] = "llama-adapter"
    formula: ClassVar[str] = "K d + 1 for each of the last layers"
    paper: ClassVar[str] = "Zhang 2023, arXiv:2303.16199"

    adapter_len: int = 10
    adapter_layers: int = 0

    def __post_init__(self) -> None:
        check_count("adapter_len", self.adapter_len)

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        check_attention(spec, self.name)
        if spec.architecture in ("encoder", "encoder-decoder"):
            raise InputError(f"llama-adapter: for decoders only, and {spec.name} is an {spec.architecture}; use lora")
        count = len(graph.layers)
        layers = self.adapter_layers or max(1, count - 2)
        if not 1 <= layers <= count:
            raise InputError(f"adapter_layers={layers}: the model has {count} layers")
        return rewrite(graph, layer=self._layer, other_layer=frozen, layers=frozenset(range(count - layers, count)))

    def _layer(self, block: Graph) -> Graph:
        editor = Editor(block)
        core = next(operator for operator in block.operators if isinstance(operator, Attention))
        source = editor.operator("qkv").inputs[0]
        out = editor.operator("o")
        (base,) = editor.divert("o", out.outputs)
        editor.after(
            "o",
            AdapterAttention(
                name="adaption_prompt",
                component="adapter",
                inputs=(source, base),
                outputs=out.outputs,
                weights=(
                    Weight("adaption_prompt.weight", (Axis("fixed", self.adapter_len), source.axes[-1]), "adapter"),
                    Weight("adaption_gate", (Axis("fixed", 1),), "adapter"),
                ),
                keys=self.adapter_len,
                q_axis=core.inputs[0].axes[1],
                kv_axis=core.inputs[1].axes[1],
                head_dim=core.head_dim,
            ),
        )
        return editor.graph()
