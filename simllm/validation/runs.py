"""Published or own training runs beside predictions: `simllm validate runs`.

Each row of the table becomes a model, a cluster, a plan and a software stack, by the rules of `row_model`, `row_stack`
and `row_plan`. What a row does not state is assumed by a rule and listed; what cannot be modelled is unsupported, with
the reason. No row is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from simllm.errors import InputError
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.models.spec import ModelSpec, MoESpec
from simllm.training import Estimate, Training, estimate
from simllm.validation.row_method import fine_tuned, must_have_fitted
from simllm.validation.row_model import check_parameters, model_spec
from simllm.validation.row_plan import run_cluster, run_plan
from simllm.validation.row_stack import (
    base_stack,
    capacity_of,
    check_task,
    dropout_of,
    run_stack,
    state_what_is_not_modelled,
)
from simllm.validation.run_constants import Constants, Quantity
from simllm.validation.scoring import Outcome, Score, score, score_by
from simllm.validation.table import Row, read_table

__all__ = [
    "HEADLINE_TIERS",
    "NEEDED_COLUMNS",
    "PEAK_MEMORY_GROUPS",
    "STEP_TIME_GROUPS",
    "RunResult",
    "ValidationReport",
    "run_result",
    "validate_runs",
]

#: Columns without which no row can be priced; the others may be missing or empty.
NEEDED_COLUMNS = ("gpu", "n_gpus", "layers", "hidden", "heads", "seq_len", "global_batch_seqs")

#: Tier C rows leave too much open to judge a model by; they are priced and listed, but not scored. A table without
#: tiers counts as a whole.
HEADLINE_TIERS = frozenset({"A", "B", ""})

#: What errors are shown by.
STEP_TIME_GROUPS = ("tier", "gpu", "framework", "stack", "scale", "precision", "architecture")
PEAK_MEMORY_GROUPS = ("tier", "gpu", "framework")

#: Ranges of the number of GPUs: a node, a rack or two, a small, a middle, a large cluster.
_SCALES = ((8, "up to 8 GPUs"), (64, "9 to 64"), (512, "65 to 512"), (2048, "513 to 2048"))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One row of the table with its prediction.

    Attributes
    ----------
    id, tier, source, framework, gpu, config_key : str
        As the table has them; a row without a ``config_key`` is a configuration of its own.
    stack : str
        Software stack that it was priced with; "" if unsupported.
    precision : str
        Of the matrix products as priced; "" if unsupported.
    scale : str
        How many GPUs, as a range; "" if unsupported.
    architecture : str
        ``dense`` or ``experts``; "" if unsupported.
    status : {"ok", "unsupported"}
    reason : str
        Why it is unsupported.
    measured_step_time_s, predicted_step_time_s : float or None
        None: the table does not say, or unsupported.
    measured_mfu, predicted_mfu : float or None
        Over full attention, against the peak of the plan's precision; both from the same FLOPs.
    measured_peak_memory_bytes, predicted_peak_memory_bytes : float or None
        In the view that ``memory_kind`` names.
    predicted_by_cause : mapping of str to float
        Seconds of the predicted step time by cause.
    assumptions : tuple of str
        What the row does not state.
    """

    id: str
    tier: str
    source: str
    framework: str
    gpu: str
    config_key: str
    stack: str = ""
    precision: str = ""
    scale: str = ""
    architecture: str = ""
    status: Literal["ok", "unsupported"] = "unsupported"
    reason: str = ""
    measured_step_time_s: float | None = None
    predicted_step_time_s: float | None = None
    measured_mfu: float | None = None
    predicted_mfu: float | None = None
    measured_peak_memory_bytes: float | None = None
    predicted_peak_memory_bytes: float | None = None
    predicted_by_cause: Mapping[str, float] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def step_time(self) -> Outcome | None:
        """The step time as something to score, if both sides are known."""
        if self.measured_step_time_s is None or self.predicted_step_time_s is None:
            return None
        return Outcome(
            key=self.config_key,
            predicted=self.predicted_step_time_s,
            measured=self.measured_step_time_s,
            predicted_utilisation=self.predicted_mfu,
            measured_utilisation=self.measured_mfu,
        )

    @property
    def peak_memory(self) -> Outcome | None:
        """The peak memory as something to score, if both sides are known."""
        if self.measured_peak_memory_bytes is None or self.predicted_peak_memory_bytes is None:
            return None
        return Outcome(
            key=self.config_key, predicted=self.predicted_peak_memory_bytes, measured=self.measured_peak_memory_bytes
        )

    def outcome(self, quantity: Quantity) -> Outcome | None:
        """The step time or the peak memory as something to score."""
        return self.step_time if quantity == "step_time" else self.peak_memory

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "predicted_by_cause": dict(self.predicted_by_cause),
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """Every row, and the errors over all of them.

    Attributes
    ----------
    rows : tuple of RunResult
    cross_validation : mapping
        Errors by tier of predictions that have not seen a part of the runs, by what was left out; empty if not asked
        for.
    ablations : mapping
        Errors by tier without each effect; empty if not asked for.
    """

    rows: tuple[RunResult, ...]
    cross_validation: Mapping[str, Any] = field(default_factory=dict)
    ablations: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[RunResult, ...]:
        """The rows of the headline tiers."""
        return tuple(row for row in self.rows if row.tier in HEADLINE_TIERS)

    def step_time_by(self, group: Callable[[RunResult], str], every_tier: bool = False) -> dict[str, Score]:
        """Errors of step times by a property of the rows."""
        return _by(self.rows if every_tier else self.scored, group, lambda row: row.step_time)

    def peak_memory_by(self, group: Callable[[RunResult], str], every_tier: bool = False) -> dict[str, Score]:
        """Errors of peak memory by a property of the rows."""
        return _by(self.rows if every_tier else self.scored, group, lambda row: row.peak_memory)

    @property
    def summary(self) -> dict[str, Any]:
        """Errors overall and by what describes a run (tiers A and B), and by tier (all rows)."""
        priced = [row for row in self.rows if row.status == "ok"]
        return {
            "rows": len(self.rows),
            "ok": len(priced),
            "unsupported": len(self.rows) - len(priced),
            "headline_tiers": sorted(tier for tier in HEADLINE_TIERS if tier),
            "overall": score(o for row in self.scored if (o := row.step_time)).to_dict(),
            **{
                name: _plain(self.step_time_by(attrgetter(name), every_tier=name == "tier"))
                for name in STEP_TIME_GROUPS
            },
            "memory": {
                "overall": score(o for row in self.scored if (o := row.peak_memory)).to_dict(),
                **{
                    name: _plain(self.peak_memory_by(attrgetter(name), every_tier=name == "tier"))
                    for name in PEAK_MEMORY_GROUPS
                },
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        document: dict[str, Any] = {"rows": [row.to_dict() for row in self.rows], "summary": self.summary}
        if self.cross_validation:
            document["cross_validation"] = dict(self.cross_validation)
        if self.ablations:
            document["ablations"] = {name: _plain(dict(scores)) for name, scores in self.ablations.items()}
        return document


def _by(
    rows: Sequence[RunResult], group: Callable[[RunResult], str], outcome: Callable[[RunResult], Outcome | None]
) -> dict[str, Score]:
    pairs = [(group(row) or "not stated", found) for row in rows if (found := outcome(row)) is not None]
    return score_by(pairs, lambda pair: pair[0], lambda pair: pair[1])


def _plain(scores: dict[str, Score]) -> dict[str, dict[str, float | int | None]]:
    return {name: found.to_dict() for name, found in scores.items()}


def validate_runs(
    path: str | Path, progress: Callable[[int, int], None] | None = None, constants: Constants | None = None
) -> ValidationReport:
    """Price every run of a table.

    Parameters
    ----------
    path : str or Path
        A CSV file with the columns of tests/published/training_runs.csv, of which `NEEDED_COLUMNS` must be there.
    progress : callable, optional
        Called with the rows done and their number after each row.
    constants : Constants, optional
        Other values for what only runs can teach than those of the profiles.

    Raises
    ------
    InputError
        The file cannot be read or lacks a needed column. What is wrong with one row is the reason of that row.
    """
    table = read_table(path, NEEDED_COLUMNS)
    models: dict[ModelSpec, Model] = {}
    results = []
    for done, row in enumerate(table, 1):
        results.append(run_result(row, models, constants))
        if progress is not None:
            progress(done, len(table))
    return ValidationReport(rows=tuple(results))


def run_result(row: Row, models: dict[ModelSpec, Model], constants: Constants | None = None) -> RunResult:
    """One row with its prediction.

    Parameters
    ----------
    row : Row
    models : dict
        Models by their spec, built once and added to.
    constants : Constants, optional
        In place of what the profiles say.
    """
    name = row.text("id") or f"line {row.line}"
    result = RunResult(
        id=name,
        tier=row.text("tier").upper(),
        source=row.text("source"),
        framework=row.text("framework"),
        gpu=row.text("gpu"),
        config_key=row.text("config_key") or name,
    )
    try:
        if row.problem:
            raise InputError(row.problem)
        result = replace(
            result,
            measured_step_time_s=_measured_step_time(row),
            measured_peak_memory_bytes=_measured_memory(row),
        )
        answer = _price(row, models, constants)
    except InputError as error:
        return replace(result, reason=str(error), assumptions=tuple(row.assumptions))
    measured = result.measured_step_time_s
    experts = any(isinstance(block.mlp, MoESpec) for block in answer.model.spec.decoder.layers)
    memory = _predicted_memory(row, answer)
    return replace(
        result,
        status="ok",
        stack=answer.training.software.name,
        precision=answer.plan.precision,
        scale=_scale(answer.plan.num_gpus),
        architecture="experts" if experts else "dense",
        predicted_step_time_s=answer.step_time_s,
        measured_mfu=answer.mfu * answer.step_time_s / measured if measured else None,
        predicted_mfu=answer.mfu,
        predicted_peak_memory_bytes=memory,
        predicted_by_cause=answer.time.by_cause,
        assumptions=(*row.assumptions, *answer.assumptions),
    )


def _scale(num_gpus: int) -> str:
    return next((words for most, words in _SCALES if num_gpus <= most), "more than 2048")


def _price(row: Row, models: dict[ModelSpec, Model], constants: Constants | None) -> Estimate:
    """The prediction of a row."""
    check_task(row)
    seq_len = row.needed_integer("seq_len", 2**27)
    cluster = run_cluster(row)
    if constants is not None:
        cluster = constants.cluster(cluster)
    base = base_stack(row)
    spec = model_spec(row, seq_len, dropout_of(row, base))
    model = models.setdefault(spec, Model(spec))
    check_parameters(row, model)
    model = fine_tuned(row, model)
    stack = run_stack(row, base, load_stack if constants is None else constants.load_stack)
    plan = run_plan(row, model, cluster, stack, base, seq_len)
    state_what_is_not_modelled(row)
    capacity = capacity_of(row) if "experts" in model.parameters.by_component else None
    run = Training(seq_len=seq_len, stack=stack, capacity_factor=capacity)
    return must_have_fitted(row, estimate(model, cluster, plan, run))


def _measured_step_time(row: Row) -> float | None:
    """Seconds of a step as measured, or from the measured tokens per second."""
    stated = row.number("step_time_s")
    rate = row.number("tokens_per_s_per_gpu")
    if stated is not None or rate is None:
        return stated
    batch, seq_len, gpus = (row.integer(name) for name in ("global_batch_seqs", "seq_len", "n_gpus"))
    if batch is None or seq_len is None or gpus is None:
        return None
    row.assume("the measured step time follows from tokens_per_s_per_gpu")
    return batch * seq_len / (rate * gpus)


def _measured_memory(row: Row) -> float | None:
    stated = row.number("measured_peak_mem_gb")
    return None if stated is None else stated * 1e9


def _predicted_memory(row: Row, answer: Estimate) -> float:
    """The peak in the view of the measurement: nvidia-smi shows the context too, PyTorch's counters do not."""
    kind = row.text("memory_kind").casefold()
    views = answer.peak_stage.views
    if "nvidia-smi" in kind:
        return views["nvidia_smi"]
    if row.text("measured_peak_mem_gb"):
        if "reserved" in kind:
            row.assume("reserved memory is taken as allocated: the allocator's slack is not modelled")
        elif "allocated" not in kind:
            row.assume("the kind of peak memory is not stated: taken as allocated by PyTorch, without the context")
    return views["max_reserved" if "reserved" in kind else "max_allocated"]
