"""How far off prices are for measurements that no figure was fitted to.

The sweeps, or the systems they come from, are dealt into folds; for each fold every figure of every link class is
fitted again to the other folds and the fold is predicted. What the figures of the catalog reach on the points they were
fitted to says less: those are scored as if they were new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from simllm.errors import InputError
from simllm.network.calibrate import calibrate_all, predict
from simllm.network.measurements import Sweep

__all__ = ["REGIMES", "Prediction", "RegimeError", "cross_validate", "deal", "errors_by_regime"]

#: Regimes of message size that are scored apart: name, from and up to how many bytes.
REGIMES: tuple[tuple[str, float, float], ...] = (
    ("64 MB and more", 64e6, float("inf")),
    ("64 KB to 64 MB", 65536.0, 64e6),
    ("below 64 KB", 0.0, 65536.0),
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A sweep and what was predicted without it.

    Parameters
    ----------
    sweep : Sweep
        The measurements.
    times_s : tuple of float
        Predicted times of its points.
    system_seen : bool
        Whether other sweeps of its system were fitted.
    class_seen : bool
        Whether anything was fitted to its slowest link class; otherwise the class it is like stood in.
    """

    sweep: Sweep
    times_s: tuple[float, ...]
    system_seen: bool
    class_seen: bool


@dataclass(frozen=True, kw_only=True)
class RegimeError:
    """Absolute relative errors of the times in one regime of sizes.

    Parameters
    ----------
    regime : str
        Its name.
    points : int
        Measured points in it.
    median, p90 : float
        Of the absolute relative errors; NaN without points.
    """

    regime: str
    points: int
    median: float
    p90: float


def deal(labels: Iterable[str], folds: int) -> dict[str, int]:
    """A fold for every label: the same on every machine, in equal numbers, whatever their order.

    Examples
    --------
    >>> sorted(deal(["a", "b", "c", "d"], 2).values())
    [0, 0, 1, 1]
    """
    distinct = sorted(set(labels), key=lambda label: hashlib.sha256(label.encode()).hexdigest())
    if not 2 <= folds <= len(distinct):
        raise InputError(f"folds={folds} must be at least 2 and at most {len(distinct)}, the number of things to deal")
    return {label: i % folds for i, label in enumerate(distinct)}


def cross_validate(
    sweeps: Sequence[Sweep], by: Literal["sweep", "system"] = "sweep", folds: int = 5
) -> list[Prediction]:
    """Predict every sweep with figures fitted to the other folds.

    Parameters
    ----------
    sweeps : sequence of Sweep
        Measurements, those not ``fitted`` among them: they are predicted and never fitted.
    by : {"sweep", "system"}
        What is left out together: single sweeps, or all sweeps of a system, which is then unseen.
    folds : int
        Number of fits.
    """
    label = {"sweep": lambda s: s.name, "system": lambda s: s.system}.get(by)
    if label is None:
        raise InputError(f"by={by!r} is neither 'sweep' nor 'system'")
    fold_of = deal((label(sweep) for sweep in sweeps), folds)
    found = []
    for fold in range(folds):
        training = [sweep for sweep in sweeps if fold_of[label(sweep)] != fold]
        classes = calibrate_all(training)
        fitted = [sweep for sweep in training if sweep.fitted]
        systems = {sweep.system for sweep in fitted}
        links = {_link(sweep) for sweep in fitted}
        for sweep in sweeps:
            if fold_of[label(sweep)] == fold:
                found.append(
                    Prediction(
                        sweep=sweep,
                        times_s=tuple(float(time) for time in predict(sweep, classes)),
                        system_seen=sweep.system in systems,
                        class_seen=_link(sweep) in links,
                    )
                )
    return found


def errors_by_regime(predictions: Iterable[Prediction]) -> tuple[RegimeError, ...]:
    """Median and 90th percentile of the absolute errors in every regime of `REGIMES`."""
    import numpy as np

    points = [
        (size, abs(predicted / measured - 1))
        for one in predictions
        for size, measured, predicted in zip(one.sweep.sizes_bytes, one.sweep.times_s, one.times_s, strict=True)
    ]
    found = []
    for name, low, high in REGIMES:
        errors = np.array([error for size, error in points if low <= size < high])
        found.append(
            RegimeError(
                regime=name,
                points=len(errors),
                median=float(np.median(errors)) if len(errors) else float("nan"),
                p90=float(np.quantile(errors, 0.9)) if len(errors) else float("nan"),
            )
        )
    return tuple(found)


def _link(sweep: Sweep) -> str:
    """The link class that decides a sweep: the one between domains where it leaves its own."""
    inside = sweep.group.size <= sweep.cluster.gpus_per_domain and sweep.group.stride == 1
    return sweep.cluster.scaleup_link if inside else str(sweep.cluster.scaleout_link)
