"""How a cluster is operated: price, failures, storage, power. What one does not say is what published runs saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import BytesPerSecond, Figure, Ratio
from simllm.hardware.profiles import load_profile_file, profiles_dir

__all__ = ["Operation", "OperationProfile", "published_operation"]


class Duration(Figure, frozen=True):
    """A span of time."""

    dimension = "time"


class OperationProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """hardware_profiles/operation.yaml: what published runs and clusters saw."""

    gpu_mtbf: Duration
    gpu_mtbf_worst: Duration
    gpu_mtbf_best: Duration
    restart: Duration
    storage_bandwidth: BytesPerSecond
    node_power: Ratio


@lru_cache(maxsize=1)
def published_operation() -> OperationProfile:
    """The figures of published runs.

    >>> published_operation().gpu_mtbf.si / 3600
    50700.0
    """
    return load_profile_file(profiles_dir() / "operation.yaml", OperationProfile)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One's own figures; None means what published runs saw, or that there is none.

    Attributes
    ----------
    usd_per_gpu_hour : float, optional
        Price of one device; None: that of its profile.
    gpu_mtbf_s : float, optional
        Mean time between failures of one GPU with its share of node, network and software.
    restart_s : float, optional
        From a failure until the job starts to read its checkpoint.
    storage_bandwidth : float, optional
        Bytes/s at which the whole job writes and reads checkpoints.
    checkpoint_interval_s : float, optional
        Work between checkpoints; None: the best one.
    node_power : float, optional
        Power of a node in training over the power limits (TDP) of its GPUs.
    pue : float, optional
        Energy of the building over that of the nodes; None: the nodes alone are counted.
    kg_co2e_per_kwh : float, optional
        Carbon intensity of the grid; None: no emissions are stated.

    Examples
    --------
    >>> Operation(pue=0.5)
    Traceback (most recent call last):
        ...
    simllm.errors.InputError: pue=0.5 must be at least 1; a building uses more than its nodes
    """

    usd_per_gpu_hour: float | None = None
    gpu_mtbf_s: float | None = None
    restart_s: float | None = None
    storage_bandwidth: float | None = None
    checkpoint_interval_s: float | None = None
    node_power: float | None = None
    pue: float | None = None
    kg_co2e_per_kwh: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            zero = field.name in ("kg_co2e_per_kwh", "restart_s", "usd_per_gpu_hour")
            if value is not None and not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
                raise InputError(f"{field.name}={value} must be a number {'of at least' if zero else 'above'} zero")
        if self.pue is not None and self.pue < 1:
            raise InputError(f"pue={self.pue} must be at least 1; a building uses more than its nodes")
