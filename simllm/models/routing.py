"""How tokens spread over experts: the rows that the busiest expert-parallel rank computes, and what a capacity drops.

A router sends every token to ``top_k`` of ``num_experts`` experts, which ``ep`` ranks share evenly. Exchanges and
grouped products wait for the rank that gets most. Its rows over the mean of the ranks are the imbalance: 1 where a
benchmark forces balance, above 1 by chance alone when every token chooses at random, more when a router has
favourites. With a capacity every expert computes the same number of rows whatever the router does: what exceeds it is
dropped, what is missing is padding (GShard, arXiv:2006.16668, section 2.2; Switch, arXiv:2101.03961, section 2.2).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

__all__ = ["BALANCED", "ExpertLoad", "Routing", "expert_load", "random_imbalance"]

_NORMAL = NormalDist()
#: Blom's constant for the expected largest of n normal deviates (Statistical Estimates and Transformed Beta-Variables,
#: 1958); within 5 % for two, 1 % from eight on.
_BLOM = 0.375


class Routing(NamedTuple):
    """What is known of a router beside its shape.

    Attributes
    ----------
    imbalance : float or "random"
        Rows of the busiest expert-parallel rank over the mean; ``random``: what chance gives.
    capacity_factor : float or None
        Rows of an expert over its mean share, padded up to it; None: no token is dropped and none padded.
    """

    imbalance: float | Literal["random"] = 1.0
    capacity_factor: float | None = None

    def busiest(self, tokens: int, top_k: int, num_experts: int, ep: int) -> float:
        """Rows of the busiest rank over the mean, without a capacity.

        Parameters
        ----------
        tokens : int
            Of all ranks that exchange with each other.
        top_k, num_experts, ep : int

        Examples
        --------
        >>> Routing(1.5).busiest(4096, 2, 8, 4), Routing(1.5).busiest(4096, 2, 8, 1), Routing().busiest(4096, 2, 8, 4)
        (1.5, 1.0, 1.0)
        """
        stated = random_imbalance(tokens, num_experts, top_k, ep) if self.imbalance == "random" else self.imbalance
        return min(float(stated), _largest(top_k, num_experts, ep))

    def rows(self, tokens: int, top_k: int, num_experts: int, ep: int, etp: int = 1) -> int:
        """Rows that the experts of the busiest rank compute of one micro-batch.

        Parameters
        ----------
        tokens : int
            Of one rank, before routing.
        top_k, num_experts, ep : int
        etp : int
            Ranks that share every expert, and with it their tokens.

        Examples
        --------
        >>> Routing().rows(1024, 2, 8, 4), Routing(1.5).rows(1024, 2, 8, 4), Routing(1.5, 1.25).rows(1024, 2, 8, 4)
        (2048, 3072, 2560)
        """
        if self.capacity_factor is not None:
            return num_experts * capacity(tokens, top_k, num_experts, self.capacity_factor) * etp
        if self.imbalance == 1.0:
            return tokens * top_k * etp
        return ceil(tokens * top_k * self.busiest(tokens * ep * etp, top_k, num_experts, ep)) * etp


BALANCED = Routing()


@lru_cache(maxsize=1 << 14)
def random_imbalance(tokens: int, num_experts: int, top_k: int, ep: int) -> float:
    """Expected rows of the busiest rank over the mean when every token chooses ``top_k`` experts at random.

    The choices of a token that fall on one rank's experts are hypergeometric, those of many tokens normal. The rows of
    all ranks add up to a constant: they are ``ep`` independent normal numbers less their mean, of variance
    ``mean (num_experts - top_k) / (num_experts - 1)`` each, and the expected largest of these is Blom's.

    Parameters
    ----------
    tokens : int
        Of all ranks that exchange with each other.
    num_experts, top_k, ep : int

    Examples
    --------
    A micro-batch of 4096 tokens on each of 64 ranks, 8 of 256 experts: the busiest has 1.3 % more than the mean.

    >>> round(random_imbalance(64 * 4096, 256, 8, 64), 4)
    1.0127
    >>> random_imbalance(4096, 8, 2, 1)
    1.0
    """
    if ep == 1 or tokens < 1:
        return 1.0
    largest = _NORMAL.inv_cdf((ep - _BLOM) / (ep - 2 * _BLOM + 1))
    mean = tokens * top_k / ep
    deviation = sqrt(mean * (num_experts - top_k) / max(1, num_experts - 1))
    return min(1.0 + largest * deviation / mean, _largest(top_k, num_experts, ep))


def _largest(top_k: int, num_experts: int, ep: int) -> float:
    """The imbalance when every token chooses as many experts of one rank as that has."""
    return ep * min(top_k, max(1, num_experts // ep)) / top_k


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows that an expert takes of one rank's tokens: its mean share times the capacity factor, rounded up.

    As Megatron-Core's ``moe_expert_capacity_factor`` and DeepSpeed's ``capacity_factor`` count it, over the choices of
    one rank.

    >>> capacity(4096, 2, 8, 1.25)
    1280
    """
    # A share that is a whole number stays one: 1.1 x 10 is 11.000000000000002.
    return max(1, ceil(round(factor * tokens * top_k / num_experts, 6)))


class ExpertLoad(NamedTuple):
    """What becomes of the rows that a rank's tokens ask for, in one micro-batch.

    Attributes
    ----------
    imbalance : float
        Rows of the busiest rank over the mean as the router chose.
    routed_rows : int
        What the tokens of a rank ask for: tokens times top_k.
    busiest_rows : int
        What the busiest rank's experts compute, padding included.
    capacity : int or None
        Rows that an expert takes of one rank's tokens.
    computed_rows, dropped_rows : float
        Of ``routed_rows``, on average over the ranks; they add up to it.
    """

    imbalance: float
    routed_rows: int
    busiest_rows: int
    capacity: int | None
    computed_rows: float
    dropped_rows: float

    @property
    def dropped_share(self) -> float:
        """Of the rows asked for, those that no expert computes."""
        return self.dropped_rows / self.routed_rows

    @property
    def padding_share(self) -> float:
        """Of the rows that experts compute, those that are no token's, with a capacity."""
        return 0.0 if self.capacity is None else 1.0 - self.computed_rows / self.busiest_rows

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data with stable keys."""
        return self._asdict() | {"dropped_share": self.dropped_share, "padding_share": self.padding_share}


def expert_load(routing: Routing, tokens: int, top_k: int, num_experts: int, ep: int, etp: int = 1) -> ExpertLoad:
    """What a capacity drops and pads under an imbalance.

    A stated imbalance is that of one rank; the others share the rest evenly, and so do the experts of a rank. At random
    the rows that one expert gets of one rank's tokens are binomial, taken as normal.

    Parameters
    ----------
    routing : Routing
    tokens : int
        Of one rank.
    top_k, num_experts, ep, etp : int

    Examples
    --------
    The busiest of four ranks gets half more than the mean, an expert takes a quarter more: that rank drops a quarter of
    the mean, a sixteenth of all rows.

    >>> load = expert_load(Routing(1.5, 1.25), 1024, 2, 8, 4)
    >>> load.dropped_share, load.padding_share, load.computed_rows + load.dropped_rows
    (0.0625, 0.25, 2048.0)
    """
    asked = tokens * top_k
    busiest = routing.busiest(tokens * ep * etp, top_k, num_experts, ep)
    rows = routing.rows(tokens, top_k, num_experts, ep)
    if routing.capacity_factor is None:
        return ExpertLoad(busiest, asked, rows, None, float(asked), 0.0)
    taken, mean = capacity(tokens, top_k, num_experts, routing.capacity_factor), asked / num_experts
    if routing.imbalance == "random":
        dropped = num_experts * _excess(mean, sqrt(mean * (1 - top_k / num_experts)), taken)
    else:
        others = (ep - busiest) / (ep - 1) if ep > 1 else 1.0
        loads = (busiest, *(others,) * (ep - 1))
        dropped = num_experts / ep * sum(max(0.0, load * mean - taken) for load in loads)
    dropped = min(dropped, float(asked))
    return ExpertLoad(busiest, asked, rows, taken, asked - dropped, dropped)


def _excess(mean: float, deviation: float, limit: float) -> float:
    """Expected excess of a normal number over a limit."""
    if deviation == 0:
        return max(0.0, mean - limit)
    z = (limit - mean) / deviation
    return deviation * (_NORMAL.pdf(z) - z * (1 - _NORMAL.cdf(z)))
