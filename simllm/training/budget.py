"""What a whole run takes: days, GPU-hours and money for so many tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from simllm.training.estimate import Estimate

__all__ = ["Budget", "budget"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A run without interruptions.

    Attributes
    ----------
    tokens : int
    time_s, gpu_hours : float
    usd, usd_per_gpu_hour : float or None
        None where no price is known.
    price_source : str or None
        Where the price was read; None where it was given.
    """

    tokens: int
    time_s: float
    gpu_hours: float
    usd: float | None
    usd_per_gpu_hour: float | None
    price_source: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return asdict(self) | {"days": self.time_s / 86400}


def budget(answer: Estimate, tokens: int, usd_per_gpu_hour: float | None = None) -> Budget:
    """Days, GPU-hours and USD of a run.

    Parameters
    ----------
    answer : Estimate
    tokens : int
        Tokens of the whole run.
    usd_per_gpu_hour : float, optional
        Price of one device; that of its profile when omitted.
    """
    card = answer.cluster.accelerator
    price, source = usd_per_gpu_hour, None
    if price is None and card.price_usd_per_hour is not None:
        price, source = card.price_usd_per_hour, card.figures["price"].source
    seconds = answer.training_time_s(tokens)
    gpu_hours = seconds / 3600 * answer.plan.num_gpus
    return Budget(
        tokens=tokens,
        time_s=seconds,
        gpu_hours=gpu_hours,
        usd=None if price is None else gpu_hours * price,
        usd_per_gpu_hour=price,
        price_source=source,
    )
