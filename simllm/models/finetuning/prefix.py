"""Prefix tuning: learned keys and values in front of those of every layer (Li 2021, arXiv:2101.00190, section 4).

``2 L V w`` trained parameters, w the width of a layer's keys; P-Tuning v2 (Liu 2021, arXiv:2110.07602) is the same.
With the paper's reparameterisation a table of ``V w`` goes through layers of ``w (h + 1)`` and ``2 L w (h + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simllm.models.finetuning.method import check_count
from simllm.models.finetuning.operators import Join
from simllm.models.finetuning.prompt import Virtual, check_attention, check_context, learned_table
from simllm.models.finetuning.rewrite import Editor, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Activation, Attention, Embedding, Projection
from simllm.models.spec import AttentionSpec, ModelSpec

__all__ = ["PTuningV2", "PrefixTuning"]

#: Configs without a field for key-value heads: peft then gives the prefix the width of the model.
_FULL_WIDTH = frozenset({"falcon", "gpt_bigcode", "dbrx"})


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Virtual):
    """Learned keys and values in every decoder layer, of an encoder-decoder in self- and in cross-attention.

    Attributes
    ----------
    projection : bool
        With the reparameterisation.
    encoder_hidden_size : int
        Its width; 0: that of the prefix.
    """

    name: ClassVar[str] = "prefix"
    formula: ClassVar[str] = "2 L V w; projected V w + w (h + 1) + 2 L w (h + 1)"
    paper: ClassVar[str] = "Li 2021, arXiv:2101.00190"

    projection: bool = False
    encoder_hidden_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_hidden_size:
            check_count("encoder_hidden_size", self.encoder_hidden_size)

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        check_context(self.virtual_tokens, spec)
        check_attention(spec, self.name)
        mixer = spec.decoder.layers[0].mixer
        assert isinstance(mixer, AttentionSpec)
        width = mixer.num_key_value_heads * mixer.head_dim
        if spec.model_type in _FULL_WIDTH:
            width = spec.hidden_size
        hidden = self.encoder_hidden_size or width
        first = len(spec.encoder.layers) if spec.encoder else 0

        def layer(block: Graph) -> Graph:
            return self._layer(block, width, hidden)

        def stem(block: Graph) -> Graph:
            return self._stem(block, width, hidden)

        return rewrite(
            graph, layer=layer, stem=stem, layers=frozenset(range(first, len(graph.layers))) if first else None
        )

    def _lent(self, hidden: int) -> Tensor:
        """What the layers read of the first block: the projected table, or the ids that all look up with."""
        if self.projection:
            return Tensor("prefix_hidden", (Axis("virtual", self.virtual_tokens), Axis("fixed", hidden)))
        return Tensor("prefix_ids", (Axis("fixed", self.virtual_tokens),), "index")

    def _stem(self, block: Graph, width: int, hidden: int) -> Graph:
        editor = Editor(block)
        lent = self._lent(hidden)
        if self.projection:
            table, operators = learned_table("prefix_table", self.virtual_tokens, Axis("fixed", width), "virtual")
            inner = Tensor("prefix_inner", lent.axes)
            weights = (
                Weight("prefix_down.weight", (table.axes[1], lent.axes[1]), "prompt"),
                Weight("prefix_down.bias", (lent.axes[1],), "prompt"),
            )
            editor.after(
                editor.operators[-1].name,
                *operators,
                Projection(
                    name="prefix_down",
                    component="prompt",
                    inputs=(table,),
                    outputs=(inner,),
                    weights=weights,
                    bias=True,
                ),
                Activation(name="prefix_act", component="prompt", inputs=(inner,), outputs=(lent,), function="tanh"),
            )
        return editor.graph(lends=(*block.lends, lent))

    def _layer(self, block: Graph, width: int, hidden: int) -> Graph:
        editor = Editor(block)
        lent = self._lent(hidden)
        cores = [operator for operator in block.operators if isinstance(operator, Attention)]
        k, v = cores[0].inputs[1:3]
        axes = tuple(replace(t.axes[1], size=width) if width != t.axes[1].size else t.axes[1] for t in (k, v))
        learned = tuple(
            Tensor(name, (Axis("virtual", self.virtual_tokens), t.axes[1]))
            for name, t in (("prefix_k", k), ("prefix_v", v))
        )
        make: Operator
        if self.projection:
            weights = tuple(Weight(f"prefix_{i}.weight", (lent.axes[1], axis), "prompt") for i, axis in enumerate(axes))
            biases = tuple(Weight(f"prefix_{i}.bias", (axis,), "prompt") for i, axis in enumerate(axes))
            make = Projection(
                name="prefix", component="prompt", inputs=(lent,), outputs=learned, weights=weights + biases, bias=True
            )
        else:
            rows = Axis("fixed", self.virtual_tokens)
            tables = tuple(Weight(f"prefix_{i}.weight", (rows, axis), "prompt") for i, axis in enumerate(axes))
            make = Embedding(name="prefix", component="prompt", inputs=(lent,), outputs=learned, weights=tables)
        editor.before(block.operators[0].name, make)
        for core in cores:
            keys, values = core.inputs[1:3]
            join = Join(
                name=f"{core.name}.prefix_join",
                component="prompt",
                inputs=(keys, learned[0], values, learned[1]),
                outputs=(),
            )
            editor.before(core.name, join)
            editor.change(core.name, inputs=(*core.inputs, *learned), virtual_keys=self.virtual_tokens)
        return editor.graph(borrows=block.borrows | {lent.name})


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompts: prefix tuning under the name that it has for understanding tasks."""

    name: ClassVar[str] = "p-tuning-v2"
    formula: ClassVar[str] = "2 L V w"
    paper: ClassVar[str] = "Liu 2021, arXiv:2110.07602"
