"""FLOPs of training on one sequence, counted as the sources of published MFU and HFU count them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simllm.errors import unknown_name
from simllm.models.activations import Recompute, recomputed_operators
from simllm.models.counts import operator_flops
from simllm.models.graph import Implementation, Layout
from simllm.models.operators import Attention

if TYPE_CHECKING:
    from simllm.models.model import Model

__all__ = ["FLOP_CONVENTIONS", "FlopConvention", "training_flops"]


@dataclass(frozen=True, kw_only=True)
class FlopConvention:
    """A way to count the FLOPs of training on one sequence.

    Attributes
    ----------
    name : str
    counts : str
        What it counts, in words.
    source : str
        Who counts so.
    of : callable
        From the model, the sequence length and the recomputation policy to FLOPs.
    """

    name: str
    counts: str
    source: str
    of: Callable[[Model, int, Recompute], int]


def _scores(model: Model, seq_len: int) -> int:
    """Forward FLOPs of all attention cores over the full square: 4 L H Q T^2 for equal layers."""
    layout = Layout(seq_len=seq_len)
    return sum(
        operator_flops(operator, layout)[0] * times
        for part, times in model.graph.parts
        for operator in part.operators
        if isinstance(operator, Attention)
    )


def _per_parameter(model: Model, seq_len: int, without: int = 0) -> int:
    return 6 * (model.parameters.active - without) * seq_len


def _recomputed(model: Model, seq_len: int, policy: Recompute) -> int:
    """Forward FLOPs of what runs again; attention counts as unfused, whose core `selective` recomputes."""
    layout, impl = Layout(seq_len=seq_len), Implementation(attention="unfused")
    return sum(
        round(times * policy.fraction * operator_flops(operator, layout)[0])
        for layer, times in model.graph.layer_parts
        for operator in recomputed_operators(layer, policy, impl)
    )


FLOP_CONVENTIONS: Final[Mapping[str, FlopConvention]] = {
    convention.name: convention
    for convention in (
        FlopConvention(
            name="full-attention",
            counts="forward and backward of every matrix product, attention over the full square of scores",
            source="PyTorch's FlopCounterMode; Megatron-LM; equation 3 of arXiv:2104.04473 without recomputation",
            of=lambda model, seq_len, _: model.flops(seq_len).training_full_attention,
        ),
        FlopConvention(
            name="masked",
            counts="the same, but of attention only the pairs that the mask keeps (half of them when causal)",
            source="Megatron-Bridge, NeMo AutoModel, MaxText since July 2025",
            of=lambda model, seq_len, _: model.flops(seq_len).training_masked,
        ),
        FlopConvention(
            name="6n",
            counts="6 per active parameter and token, tables and head included, nothing for attention scores",
            source="Hoffmann 2022, arXiv:2203.15556, appendix F",
            of=lambda model, seq_len, _: _per_parameter(model, seq_len),
        ),
        FlopConvention(
            name="6n-non-embedding",
            counts="6 per active parameter and token without tables and head",
            source="Kaplan 2020, arXiv:2001.08361, section 2.1",
            of=lambda model, seq_len, _: _per_parameter(
                model, seq_len, model.parameters.embedding + model.parameters.lm_head
            ),
        ),
        FlopConvention(
            name="palm",
            counts="6 per active parameter and token, tables included, and 12 L H Q T for full attention",
            source="Chowdhery 2022, arXiv:2204.02311, appendix B; llm-foundry",
            of=lambda model, seq_len, _: _per_parameter(model, seq_len) + 3 * _scores(model, seq_len),
        ),
        FlopConvention(
            name="torchtitan",
            counts="6 per active parameter and token without the tables, and 12 L H Q T for full attention",
            source="torchtitan, get_num_flop_per_token",
            of=lambda model, seq_len, _: (
                _per_parameter(model, seq_len, model.parameters.embedding) + 3 * _scores(model, seq_len)
            ),
        ),
        FlopConvention(
            name="with-recompute",
            counts="full-attention, and once more the forward pass of what is recomputed (all layers: about 4/3)",
            source="arXiv:2104.04473, equation 3; MT-NLG, BLOOM, BigScience, InternEvo, ZeRO",
            of=lambda model, seq_len, policy: (
                model.flops(seq_len).training_full_attention + _recomputed(model, seq_len, policy)
            ),
        ),
    )
}


def training_flops(
    model: Model, seq_len: int, convention: str = "full-attention", recompute: Recompute | str = "full"
) -> float:
    """FLOPs of training on one sequence, counted as a source counts them.

    Model FLOPs utilisation in a convention is this, per sequence, over time and peak; hardware FLOPs utilisation is
    that of ``with-recompute``.

    Parameters
    ----------
    model : Model
    seq_len : int
    convention : str
        A name of `FLOP_CONVENTIONS`.
    recompute : Recompute or str
        What is recomputed; only ``with-recompute`` looks at it.

    Raises
    ------
    InputError
        The convention or the policy is unknown.

    Examples
    --------
    GPT-3 as Narayanan 2021 counts it: 96 B s l h^2 (1 + s / 6 h + V / 16 l h), biases aside.

    >>> from simllm.models import Model
    >>> s, layers, h, v = 2048, 96, 12288, 50257
    >>> training_flops(Model.load("gpt3-175b"), s, "with-recompute") == 96 * s * layers * h * h + (
    ...     16 * s * s * layers * h + 6 * s * h * v)
    True
    """
    if convention not in FLOP_CONVENTIONS:
        raise unknown_name("FLOP convention", convention, FLOP_CONVENTIONS)
    policy = Recompute.parse(recompute) if isinstance(recompute, str) else recompute
    return float(FLOP_CONVENTIONS[convention].of(model, seq_len, policy))
