"""Generation: prefill, then one token at a time against a key-value cache, priced from the same graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from simllm.errors import InputError, UnsupportedError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.graph import Graph, Layout
from simllm.models.operators import Attention, Loss
from simllm.parallel.plan import Plan, check_plan
from simllm.parallel.stages import block_frozen_bytes, block_weights
from simllm.training.run import Training
from simllm.training.step import Step

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A batch of responses on every data-parallel rank.

    Attributes
    ----------
    prefill_s, decode_s : float
        Seconds to read the prompts, and to write the responses.
    gather_s : float
        Seconds to gather sharded parameters once before.
    cache_bytes : float
        Keys and values of all tokens at the end, on one GPU.
    weight_bytes : float
        Parameters that a GPU needs beyond its share of the training states.
    """

    prefill_s: float
    decode_s: float
    gather_s: float
    cache_bytes: float
    weight_bytes: float

    @property
    def total_s(self) -> float:
        """Seconds of the whole."""
        return self.prefill_s + self.decode_s + self.gather_s


def generate(
    model: Model, cluster: Cluster, plan: Plan, training: Training, *, batch: int, prompt_len: int, response_len: int
) -> Generation:
    """Time and cache of ``batch`` responses a data-parallel rank.

    A step that writes a token runs every operator on one token of each sequence, its attention against all tokens
    before: memory reads of weights and cache dominate. Time is linear in the cached tokens, so the mean of the first
    and the last step stands for all. Sharded parameters are gathered once, as DeepSpeed-Chat's hybrid engine does
    (arXiv:2308.01320, section 4).

    Parameters
    ----------
    model : Model
    cluster : Cluster
    plan : Plan
        Of training; its tensor parallelism serves generation too.
    training : Training
    batch : int
        Sequences on each data-parallel rank.
    prompt_len, response_len : int

    Raises
    ------
    InputError
        Lengths below one, or a plan with a pipeline or context parallelism.
    """
    for name, value in (("batch", batch), ("prompt_len", prompt_len), ("response_len", response_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value} must be a whole number above zero")
    if plan.pp > 1 or plan.cp > 1:
        raise UnsupportedError(f"generation with pp={plan.pp} cp={plan.cp} is not modelled; use tp and dp")
    # One token of each sequence cannot be split over the ranks.
    whole = replace(plan, sequence_parallel=False)
    if "experts" not in model.parameters.by_component:
        check_plan(model, whole, prompt_len)
    step = Step(model, cluster, whole, training)
    prompt = replace(step.layout, batch=batch, seq_len=prompt_len + model.graph.virtual_tokens)
    first = replace(prompt, seq_len=1, cached=prompt.seq_len)
    last = replace(first, cached=prompt.seq_len + response_len - 1)
    decode = (_forward_s(step, first) + _forward_s(step, last)) / 2 * response_len
    parts = model.graph.parts
    gather = weights = 0.0
    if plan.shards_parameters:
        gather = sum(times * step.exchange_s(step.block_gathers(part)) for part, times in parts)
        for part, times in parts:
            trained, frozen = (
                block_weights(part, step.layout),
                block_frozen_bytes(part, step.layout, step.states.gathered),
            )
            weights += times * (sum(trained) * step.states.gathered + sum(frozen))
    return Generation(
        prefill_s=_forward_s(step, prompt),
        decode_s=decode,
        gather_s=gather,
        cache_bytes=_cache_bytes(
            model, replace(last, seq_len=last.cached + 1, cached=0), step.engine.impl.activation_bytes
        ),
        weight_bytes=weights,
    )


def _forward_s(step: Step, layout: Layout) -> float:
    """Seconds of the forward pass; logits are made for the last token of a sequence only."""
    graph, total = step.graph, 0.0
    layers = {id(layer) for layer, _ in graph.layer_parts}
    for part, times in graph.parts:
        asked = layout
        if part is graph.head:
            part, asked = _without_loss(part), replace(layout, seq_len=1, cached=0)
        cost = step.engine.block(part, asked, step.groups, Recompute(), id(part) in layers)
        total += times * cost.forward.total
    return total


@lru_cache(maxsize=256)
def _without_loss(head: Graph) -> Graph:
    """The head up to the logits; the same object for the same head, so that its price is found again."""
    operators = tuple(operator for operator in head.operators if not isinstance(operator, Loss))
    return replace(head, operators=operators, output=operators[-1].outputs[0])


def _cache_bytes(model: Model, layout: Layout, element: int) -> float:
    """Keys and values of all tokens on one GPU, no more than a sliding window keeps."""
    total = 0.0
    for layer in model.graph.layers:
        for operator in layer.operators:
            if isinstance(operator, Attention) and operator.mask not in ("bidirectional", "cross"):
                kept = min(layout.seq_len, operator.sliding_window or layout.seq_len) + operator.virtual_keys
                held = replace(layout, seq_len=kept)
                total += sum(held.elements(tensor) for tensor in operator.cached())
    return total * element
