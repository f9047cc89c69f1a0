"""Real training steps on one device beside predictions: `simllm validate torch MODEL --device`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError
from simllm.hardware.assembly import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan
from simllm.training import Training, estimate
from simllm.validation.measure.device import TorchDevice
from simllm.validation.measure.streams import STACK

if TYPE_CHECKING:
    from simllm.training import Estimate

__all__ = [
    "StepCase",
    "StepComparison",
    "StepTiming",
    "compare_step",
    "compare_steps",
    "predict_step",
    "time_steps",
]

#: Repeats whose steps differ by more say nothing of a prediction.
LARGEST_SPREAD = 0.15


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One thing to train for some steps.

    Attributes
    ----------
    model : Model
        Its dropout is left out, on both sides.
    seq_len, batch : int
    precision : str
        fp32, or bf16 with all states in bf16.
    recompute : bool
        Whether layers are recomputed in the backward pass.
    """

    model: Model
    seq_len: int
    batch: int
    precision: str
    recompute: bool = False

    @property
    def label(self) -> str:
        """The case in words."""
        again = ", recomputed" if self.recompute else ""
        return f"{self.model.spec.name}, {self.batch} x {self.seq_len}, {self.precision}{again}"

    @property
    def trained(self) -> Model:
        """The model without dropout."""
        return Model(replace(self.model.spec, hidden_dropout=0.0, attention_dropout=0.0))


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """What steps took.

    Attributes
    ----------
    times_s : tuple of float
        Of every step after the warm-up.
    peak_bytes : int or None
        Most memory allocated on the device; None on processors.
    losses : tuple of float
        Of the first and the last step.
    """

    times_s: tuple[float, ...]
    peak_bytes: int | None
    losses: tuple[float, float]

    @property
    def typical_s(self) -> float:
        """The median step."""
        return statistics.median(self.times_s)

    @property
    def spread(self) -> float:
        """How far the middle half of the steps lies apart, relative to the median."""
        quarters = statistics.quantiles(self.times_s, n=4) if len(self.times_s) > 1 else [0.0, 0.0, 0.0]
        return (quarters[2] - quarters[0]) / self.typical_s


def time_steps(case: StepCase, device: TorchDevice, steps: int = 10, warm_up: int = 3) -> StepTiming:
    """Train for some steps and time each.

    A step is forward, backward, clipping, AdamW (one kernel for many weights) and clearing gradients.

    Parameters
    ----------
    case : StepCase
    device : TorchDevice
    steps, warm_up : int
        Steps timed, and steps before.

    Raises
    ------
    InputError
        It does not fit into the device's memory.
    UnsupportedError
        The model is none of those that can be timed.
    """
    run = _Run(case, device)
    try:
        run.step(warm_up)
        return run.step(steps)
    except device.torch.OutOfMemoryError:
        raise InputError(
            f"{case.label} does not fit into the {device.memory_bytes / 2**30:.1f} GiB of the device"
        ) from None


class _Run:
    """A model in training."""

    def __init__(self, case: StepCase, device: TorchDevice) -> None:
        from simllm.validation.step_model import Decoder

        torch = device.torch
        torch.manual_seed(0)
        self.device = device
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(case.precision)
        if dtype is None:
            raise InputError(f"precision={case.precision}: steps are timed in fp32 or bf16")
        self.model = Decoder(case.trained.spec, case.recompute).to(device=device.kind, dtype=dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = (case.batch, case.seq_len)
        vocab = case.model.spec.vocab_size
        self.ids, self.labels = (torch.randint(0, vocab, shape, device=device.kind) for _ in range(2))
        self.first_loss = math.nan

    def step(self, number: int) -> StepTiming:
        """So many steps more."""
        torch, device, clock = self.device.torch, self.device, self.device.clock
        if device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times, loss = [], math.nan
        for _ in range(number):
            device.synchronise()
            start = clock()
            result = self.model(self.ids, self.labels)
            result.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            device.synchronise()
            times.append(clock() - start)
            loss = float(result.detach())
            self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        peak = int(torch.cuda.max_memory_allocated()) if device.kind == "cuda" else None
        return StepTiming(times_s=tuple(times), peak_bytes=peak, losses=(self.first_loss, loss))


def predict_step(case: StepCase, cluster: Cluster) -> Estimate:
    """The estimate of a case on one device of a cluster."""
    plan = Plan(
        tp=1,
        micro_batch_size=case.batch,
        global_batch_size=case.batch,
        zero="0",
        precision=case.precision,
        recompute=Recompute.parse("full" if case.recompute else "none"),
    )
    training = Training(
        seq_len=case.seq_len,
        stack=STACK,
        memory_headroom=0.0,
        master_weights=None if case.precision == "fp32" else False,
    )
    return estimate(case.trained, cluster, plan, training)


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """A timed case beside its predictions.

    Attributes
    ----------
    case : StepCase
    timing : StepTiming
    measured_s : float
        The step that predictions are held against.
    predictions : dict of str to Estimate
        By the profile they are made from.
    """

    case: StepCase
    timing: StepTiming
    measured_s: float
    predictions: dict[str, Estimate]

    @property
    def steady(self) -> bool:
        """Whether the steps repeat well enough to judge a prediction."""
        return self.timing.spread <= LARGEST_SPREAD

    def rows(self, tolerances: dict[str, float], memory_tolerance: float) -> list[dict[str, Any]]:
        """Quantity by quantity: predicted, executed, difference, tolerance, verdict.

        A verdict is None where the steps do not repeat well enough; nothing passes by that.
        """
        found = []
        for profile, estimated in self.predictions.items():
            found.append(
                self._row(f"step time, {profile} profile", estimated.step_time_s, self.measured_s, tolerances[profile])
            )
            if self.timing.peak_bytes is not None:
                found.append(
                    self._row(
                        f"peak memory, {profile} profile",
                        estimated.peak_stage.views["max_allocated"],
                        float(self.timing.peak_bytes),
                        memory_tolerance,
                        steady=True,
                    )
                )
        return found

    def _row(
        self, quantity: str, predicted: float, executed: float, tolerance: float, steady: bool | None = None
    ) -> dict[str, Any]:
        difference = predicted / executed - 1
        judged = self.steady if steady is None else steady
        return {
            "case": self.case.label,
            "quantity": quantity,
            "predicted": predicted,
            "executed": executed,
            "difference": difference,
            "expected_tolerance": tolerance,
            "spread": self.timing.spread,
            "ok": abs(difference) <= tolerance if judged else None,
        }


def compare_steps(
    cases: Sequence[StepCase],
    device: TorchDevice,
    clusters: dict[str, Cluster],
    *,
    steps: int = 10,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[StepComparison]:
    """Time cases in turn, several rounds of them, and predict each from every profile.

    Turns keep a disturbance of the machine from hitting one case alone. Predictions are held against the typical step,
    see `simllm.validation.measure.device.TorchDevice.typical`.

    Parameters
    ----------
    cases : sequence of StepCase
    device : TorchDevice
    clusters : dict of str to Cluster
        What predictions are made from, by name.
    steps, rounds : int
        Steps timed of a case in each round, and rounds.
    progress : callable, optional
        Called with the turns done and their number.
    """
    found: list[list[StepTiming]] = [[] for _ in cases]
    for turn in range(rounds):
        for number, case in enumerate(cases):
            found[number].append(time_steps(case, device, steps))
            if progress is not None:
                progress(turn * len(cases) + number + 1, rounds * len(cases))
    return [compare_step(case, timings, device, clusters) for case, timings in zip(cases, found, strict=True)]


def compare_step(
    case: StepCase, timings: Sequence[StepTiming], device: TorchDevice, clusters: dict[str, Cluster]
) -> StepComparison:
    """The rounds of one case as one, beside its predictions.

    Parameters
    ----------
    case : StepCase
    timings : sequence of StepTiming
        Of each round.
    device : TorchDevice
    clusters : dict of str to Cluster
        What predictions are made from, by name.
    """
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    joined = StepTiming(
        times_s=tuple(seconds for timing in timings for seconds in timing.times_s),
        peak_bytes=max(peaks) if peaks else None,
        losses=timings[-1].losses,
    )
    return StepComparison(
        case=case,
        timing=joined,
        measured_s=device.typical(list(joined.times_s)),
        predictions={name: predict_step(case, cluster) for name, cluster in clusters.items()},
    )
