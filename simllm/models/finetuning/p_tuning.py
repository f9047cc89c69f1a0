"""P-Tuning: learned tokens that a small network makes (Liu 2021, arXiv:2103.10385, section 2.2).

Table ``V d``, then an MLP of three layers, or a bidirectional LSTM of two layers and an MLP of two. The network runs in
training; afterwards its result alone is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from simllm.errors import unknown_name
from simllm.models.finetuning.method import check_count
from simllm.models.finetuning.operators import Lstm
from simllm.models.finetuning.prompt import Virtual, check_context, in_front, learned_table
from simllm.models.finetuning.rewrite import frozen, rewrite
from simllm.models.graph import Axis, Graph, ModelGraph, Operator, Tensor, Weight
from simllm.models.operators import Activation, Projection
from simllm.models.spec import ModelSpec

__all__ = ["PTuning"]

_LSTM_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class PTuning(Virtual):
    """Prompt tuning with a reparameterisation.

    Attributes
    ----------
    encoder_hidden_size : int
        Width of the network; 0: that of the model.
    encoder : {"mlp", "lstm"}
    """

    name: ClassVar[str] = "p-tuning"
    formula: ClassVar[str] = "V d, and the network"
    paper: ClassVar[str] = "Liu 2021, arXiv:2103.10385"

    encoder_hidden_size: int = 0
    encoder: Literal["mlp", "lstm"] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_hidden_size:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        if self.encoder not in ("mlp", "lstm"):
            raise unknown_name("encoder of p-tuning", self.encoder, ("mlp", "lstm"))

    def apply(self, graph: ModelGraph, spec: ModelSpec) -> ModelGraph:
        check_context(self.virtual_tokens, spec)
        # Of an encoder-decoder one network makes the tokens of both sequences; it is counted with the encoder's.
        second = spec.encoder is not None

        def stem(block: Graph) -> Graph:
            table, operators = learned_table("prompt_table", self.virtual_tokens, Axis("hidden", spec.hidden_size))
            prompt, network = self._network(table, spec.hidden_size)
            return in_front(block, prompt, (*operators, *network))

        def between(block: Graph) -> Graph:
            table, operators = learned_table("prompt_table", self.virtual_tokens, Axis("hidden", spec.hidden_size))
            return in_front(block, table, operators) if second else frozen(block)

        return rewrite(graph, layer=frozen, stem=stem, between=between, virtual_tokens=self.virtual_tokens)

    def _network(self, x: Tensor, width: int) -> tuple[Tensor, tuple[Operator, ...]]:
        hidden = self.encoder_hidden_size or width
        operators: list[Operator] = []
        if self.encoder == "lstm":
            for layer in range(_LSTM_LAYERS):
                x = _lstm(operators, f"prompt_lstm_{layer}", x, self.virtual_tokens, hidden)
            widths: tuple[int, ...] = (2 * hidden, width)
        else:
            widths = (hidden, hidden, width)
        for layer, size in enumerate(widths):
            name = f"prompt_mlp_{layer}"
            out = Tensor(name, (x.axes[0], Axis("hidden" if layer == len(widths) - 1 else "fixed", size)))
            weights = (
                Weight(f"{name}.weight", (x.axes[1], out.axes[1]), "prompt"),
                Weight(f"{name}.bias", (out.axes[1],), "prompt"),
            )
            operators.append(
                Projection(name=name, component="prompt", inputs=(x,), outputs=(out,), weights=weights, bias=True)
            )
            x = out
            if layer < len(widths) - 1:
                x = Tensor(f"{name}_act", out.axes)
                operators.append(
                    Activation(name=f"{name}_act", component="prompt", inputs=(out,), outputs=(x,), function="relu")
                )
        return x, tuple(operators)


def _lstm(operators: list[Operator], name: str, x: Tensor, steps: int, hidden: int) -> Tensor:
    """Append a bidirectional layer: four gates, each with two matrices and two biases, in two directions."""
    out = Tensor(name, (x.axes[0], Axis("fixed", 2 * hidden)))
    gates = Axis("fixed", 4 * hidden)
    weights = tuple(
        weight
        for way in ("forward", "backward")
        for weight in (
            Weight(f"{name}.{way}.input.weight", (x.axes[1], gates), "prompt"),
            Weight(f"{name}.{way}.hidden.weight", (Axis("fixed", hidden), gates), "prompt"),
            Weight(f"{name}.{way}.input.bias", (gates,), "prompt"),
            Weight(f"{name}.{way}.hidden.bias", (gates,), "prompt"),
        )
    )
    operators.append(
        Lstm(name=name, component="prompt", inputs=(x,), outputs=(out,), weights=weights, steps=steps, hidden=hidden)
    )
    return out
