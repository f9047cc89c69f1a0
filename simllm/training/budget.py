"""What a whole run takes for so many tokens: days, GPU-hours, money, energy, emissions, without failures and with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from simllm.hardware.figures import DollarsPerHour
from simllm.training.estimate import Estimate
from simllm.training.failures import Recovery, optimal_interval
from simllm.training.operation import Operation, published_operation

__all__ = ["Budget", "FailureCost", "RunCost", "budget", "checkpoint_bytes"]

_KWH = 3.6e6
_LOW, _MEDIAN, _HIGH = 0.1, 0.5, 0.9


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a span of time on all GPUs costs.

    Attributes
    ----------
    time_s, gpu_hours : float
    usd, kwh, kg_co2e : float or None
        None where price, power limit or grid are not known.
    """

    time_s: float
    gpu_hours: float
    usd: float | None
    kwh: float | None
    kg_co2e: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return asdict(self) | {"days": self.time_s / 86400}


@dataclass(frozen=True, kw_only=True)
class FailureCost:
    """The same run on machines that break: eight of ten such runs lie within the intervals.

    Attributes
    ----------
    goodput : float
        Useful work over elapsed time, the median.
    goodput_interval : (float, float)
        Over the chance of failures and, unless one's own MTBF was given, over that of published clusters.
    cost : RunCost
        Of the median run.
    time_interval_s : (float, float)
    failures : float
        Expected while the run lasts.
    gpu_mtbf_s, job_mtbf_s : float
        Mean time between failures of one GPU and of the job.
    checkpoint_bytes, checkpoint_s, checkpoint_interval_s, restart_s : float
        Size of a checkpoint, seconds to write it, work between two, and a restart with reading it.
    sources : dict of str to str
        Where each figure that was not given comes from.
    """

    goodput: float
    goodput_interval: tuple[float, float]
    cost: RunCost
    time_interval_s: tuple[float, float]
    failures: float
    gpu_mtbf_s: float
    job_mtbf_s: float
    checkpoint_bytes: float
    checkpoint_s: float
    checkpoint_interval_s: float
    restart_s: float
    sources: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        own = asdict(self)
        own.pop("cost")
        return self.cost.to_dict() | own


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A run of so many tokens.

    Attributes
    ----------
    tokens : int
    ideal : RunCost
        Without interruptions.
    with_failures : FailureCost
    usd_per_gpu_hour : float or None
    price_source, price_date : str or None
        Where and when the price was read; None where it was given.
    watts_per_gpu : float or None
        Power of one GPU with its share of the node, and of the building where a PUE was given.
    power_source : str or None
    kg_co2e_per_kwh : float or None
    """

    tokens: int
    ideal: RunCost
    with_failures: FailureCost
    usd_per_gpu_hour: float | None
    price_source: str | None
    price_date: str | None
    watts_per_gpu: float | None
    power_source: str | None
    kg_co2e_per_kwh: float | None

    @property
    def time_s(self) -> float:
        """Seconds without interruptions."""
        return self.ideal.time_s

    @property
    def gpu_hours(self) -> float:
        """GPU-hours without interruptions."""
        return self.ideal.gpu_hours

    @property
    def usd(self) -> float | None:
        """USD without interruptions."""
        return self.ideal.usd

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return {
            "tokens": self.tokens,
            **self.ideal.to_dict(),
            "usd_per_gpu_hour": self.usd_per_gpu_hour,
            "price_source": self.price_source,
            "price_date": self.price_date,
            "watts_per_gpu": self.watts_per_gpu,
            "power_source": self.power_source,
            "kg_co2e_per_kwh": self.kg_co2e_per_kwh,
            "with_failures": self.with_failures.to_dict(),
        }


def budget(
    answer: Estimate, tokens: int, usd_per_gpu_hour: float | None = None, operation: Operation | None = None
) -> Budget:
    """Days, GPU-hours, USD, energy and emissions of a run, and what failures add.

    Parameters
    ----------
    answer : Estimate
    tokens : int
        Tokens of the whole run.
    usd_per_gpu_hour : float, optional
        Price of one device, before that of ``operation``; that of its profile when neither is given.
    operation : Operation, optional
        One's own figures of failures, storage and power.
    """
    own = operation or Operation()
    card = answer.cluster.accelerator
    price = own.usd_per_gpu_hour if usd_per_gpu_hour is None else usd_per_gpu_hour
    listed = card.figures.get("price") if price is None else None
    if price is None:
        price = card.price_usd_per_hour
    watts, power_source = _power(answer, own)

    def cost(seconds: float) -> RunCost:
        gpu_hours = seconds / 3600 * answer.plan.num_gpus
        kwh = None if watts is None else gpu_hours * 3600 * watts / _KWH
        return RunCost(
            time_s=seconds,
            gpu_hours=gpu_hours,
            usd=None if price is None else gpu_hours * price,
            kwh=kwh,
            kg_co2e=None if kwh is None or own.kg_co2e_per_kwh is None else kwh * own.kg_co2e_per_kwh,
        )

    ideal = cost(answer.training_time_s(tokens))
    failures, median_s = _failures(answer, ideal.time_s, own)
    return Budget(
        tokens=tokens,
        ideal=ideal,
        with_failures=FailureCost(cost=cost(median_s), **failures),
        usd_per_gpu_hour=price,
        price_source=listed.source if listed else None,
        price_date=listed.date if isinstance(listed, DollarsPerHour) else None,
        watts_per_gpu=watts,
        power_source=power_source,
        kg_co2e_per_kwh=own.kg_co2e_per_kwh,
    )


def _power(answer: Estimate, own: Operation) -> tuple[float | None, str | None]:
    """Watts of one GPU with its share of node and building, and what they rest on."""
    tdp = answer.cluster.accelerator.tdp_w
    if tdp is None:
        return None, None
    published = published_operation().node_power
    share = own.node_power or published.si
    why = f"{tdp:g} W of TDP x {share:g} for the node"
    if own.node_power is None:
        why += f" ({published.source})"
    why += f" x PUE {own.pue:g}" if own.pue else ", the building not counted (no PUE given)"
    return tdp * share * (own.pue or 1.0), why


def checkpoint_bytes(answer: Estimate) -> float:
    """Bytes of a checkpoint: all states of all parameters but the gradients, once."""
    kept = sum(term.bytes_per_parameter for term in answer.state_terms if term.what != "gradient")
    return kept * answer.model.parameters.total


def _failures(answer: Estimate, work_s: float, own: Operation) -> tuple[dict[str, Any], float]:
    """The fields of `FailureCost` but its cost, and the median of the elapsed seconds."""
    published, gpus, sources = published_operation(), answer.plan.num_gpus, {}
    typical, worst, best = published.gpu_mtbf, published.gpu_mtbf_worst, published.gpu_mtbf_best
    if own.gpu_mtbf_s is None:
        sources["gpu_mtbf"] = f"{typical.source}; interval: {worst.source}"
        mtbfs = [figure.si for figure in (best, typical, worst)]
    else:
        mtbfs = [own.gpu_mtbf_s] * 3
    bandwidth, restart = own.storage_bandwidth, own.restart_s
    if bandwidth is None:
        bandwidth = published.storage_bandwidth.si * gpus
        sources["storage_bandwidth"] = published.storage_bandwidth.source
    if restart is None:
        restart = published.restart.si
        sources["restart"] = published.restart.source
    size = checkpoint_bytes(answer)
    write_s = size / bandwidth
    restart += write_s  # the checkpoint is read at the speed it was written
    # The interval is chosen for the MTBF one counts on; the machines may turn out better or worse.
    interval = own.checkpoint_interval_s or optimal_interval(write_s, mtbfs[1] / gpus)

    def quantile(mtbf_s: float, share: float) -> float:
        run = Recovery(
            work_s=work_s,
            mtbf_s=mtbf_s / gpus,
            checkpoint_s=write_s,
            restart_s=restart,
            interval_s=interval,
        )
        return run.quantiles_s(share)[0]

    median = quantile(mtbfs[1], _MEDIAN)
    low, high = quantile(mtbfs[0], _LOW), quantile(mtbfs[2], _HIGH)
    return {
        "goodput": work_s / median,
        "goodput_interval": (work_s / high, work_s / low),
        "time_interval_s": (low, high),
        "failures": median / (mtbfs[1] / gpus),
        "gpu_mtbf_s": mtbfs[1],
        "job_mtbf_s": mtbfs[1] / gpus,
        "checkpoint_bytes": size,
        "checkpoint_s": write_s,
        "checkpoint_interval_s": interval,
        "restart_s": restart,
        "sources": sources,
    }, median
