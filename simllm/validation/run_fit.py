"""Run constants fitted to published runs, and how well runs are predicted that the fit has not seen.

The fit is maximum a posteriori: errors of the logarithm of step times with a robust loss (scipy's ``soft_l1``), and for
every constant the distance from its prior or parent in units of its spread. Sources with many runs do not drown the
others: a run weighs the fourth root of their number less. Predictions are linear in the constants over the small steps
of a fit, so one pass over all runs for each constant serves all fits; what is reported is predicted afresh with the
constants of the fit that left it out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.spec import ModelSpec
from simllm.validation.run_constants import QUANTITIES, Constants, Quantity, run_constants, shipped_values
from simllm.validation.runs import HEADLINE_TIERS, NEEDED_COLUMNS, RunResult, run_result
from simllm.validation.scoring import Outcome, Score, score
from simllm.validation.table import Row, read_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["LEFT_OUT", "RunErrors", "RunFit", "cross_validated", "fitted_constants", "publication_of", "source_of"]

#: How far a prediction usually lies off, in logarithms: what a residual is weighed against priors by.
_USUAL_ERROR = 0.07
_FOLDS = 8
#: Step of a difference quotient, in spreads of the constant.
_STEP = 0.25
_Progress = Callable[[int, int], None]

#: What a prediction has not seen: nothing, one fold of (publication, model) pairs, the runs of one publication on one
#: device, a whole publication.
LEFT_OUT = ("nothing", "fold", "source", "publication")


def publication_of(text: str) -> str:
    """Who published a run, from what its table says of its source: a repository or a paper.

    >>> publication_of("pytorch/torchtitan docs/performance.md @3faaa1"), publication_of("TorchTitan Table 5")
    ('torchtitan', 'torchtitan')
    """
    plain = re.sub(r"\[.*", "", text).strip()
    repository = re.match(r"\S+/(\S+)", plain)
    return (repository[1] if repository else re.split(r" Table| \(", plain)[0]).casefold()


def source_of(text: str, device: str) -> str:
    """A publication and the device it ran on: one machine, one software, one way of measuring."""
    return f"{publication_of(text)} on {device}"


@dataclass(frozen=True, kw_only=True)
class RunErrors:
    """Predictions of every judged run, each with constants that have not seen what is left out.

    Attributes
    ----------
    quantity : {"step_time", "peak_memory"}
    left_out : str
        One of `LEFT_OUT`.
    rows : tuple of RunResult
    parts : tuple of str
        What each row was left out with.
    """

    quantity: Quantity
    left_out: str
    rows: tuple[RunResult, ...]
    parts: tuple[str, ...]

    def score(self, tiers: Iterable[str]) -> Score:
        """Errors of the runs of some tiers."""
        wanted = frozenset(tiers)
        return score(o for row in self.rows if row.tier in wanted and (o := row.outcome(self.quantity)))


@dataclass(frozen=True, kw_only=True)
class _Configuration:
    """Repeated runs of one configuration: where their rows are, and what was measured."""

    rows: tuple[int, ...]
    measured: float
    fold: str
    source: str
    publication: str


class RunFit:
    """The judged runs of a table and fits to them.

    Parameters
    ----------
    path : str or Path
        As of `simllm.validation.runs.validate_runs`; rows of tier C, rows without a measurement of the quantity and
        rows that are not modelled take no part.
    progress : callable, optional
        Called with the passes over the runs done and their number.
    quantity : {"step_time", "peak_memory"}
        What is fitted, with the constants of this quantity.
    """

    def __init__(self, path: str | Path, progress: _Progress | None = None, quantity: Quantity = "step_time") -> None:
        self._path, self._progress, self._done = path, progress, 0
        self._models: dict[ModelSpec, Model] = {}
        self.quantity = quantity
        self.names = tuple(name for name, one in run_constants().constants.items() if one.quantity == quantity)
        self._depends: list[set[str]] = []
        self._rows: list[Row] = []
        for row in read_table(path, NEEDED_COLUMNS):
            if row.text("tier").upper() not in HEADLINE_TIERS:
                continue
            constants = Constants(shipped_values())
            result = run_result(row, self._models, constants)
            if result.outcome(quantity) is not None:
                self._rows.append(row)
                self._depends.append(constants.used & set(self.names))
        if not self._rows:
            what = quantity.replace("_", " ")
            raise InputError(f"{path} has no run of tiers A and B with a {what} that can be predicted")
        self._configurations = self._grouped()

    def _grouped(self) -> list[_Configuration]:
        from statistics import median

        groups: dict[str, list[int]] = {}
        for index, row in enumerate(self._rows):
            groups.setdefault(row.text("config_key") or row.text("id") or str(row.line), []).append(index)
        found = []
        results = self.predict(shipped_values(), range(len(self._rows)))
        for indices in groups.values():
            first = self._rows[indices[0]]
            found.append(
                _Configuration(
                    rows=tuple(indices),
                    measured=median(self._outcome(results[i]).measured for i in indices),
                    fold=f"{publication_of(first.text('source'))}: {first.text('model_name')}",
                    source=source_of(first.text("source"), first.text("gpu")),
                    publication=publication_of(first.text("source")),
                )
            )
        return found

    # -- predictions ---------------------------------------------------------------------------------------------

    def predict(self, values: Mapping[str, float], rows: Iterable[int]) -> dict[int, RunResult]:
        """Some of the runs with some values of the constants; those not given as the profiles have them."""
        constants = Constants(shipped_values() | dict(values))
        return {i: run_result(replace(self._rows[i], assumptions=[]), self._models, constants) for i in rows}

    def _outcome(self, result: RunResult) -> Outcome:
        found = result.outcome(self.quantity)
        assert found is not None
        return found

    def _logs(self, values: Mapping[str, float], known: Array | None = None, only: str | None = None) -> Array:
        """Logarithm of predicted over measured by configuration."""
        import numpy as np

        logs = np.zeros(len(self._configurations)) if known is None else known.copy()
        for number, configuration in enumerate(self._configurations):
            if only is not None and not any(only in self._depends[i] for i in configuration.rows):
                continue
            predicted = [self._outcome(r).predicted for r in self.predict(values, configuration.rows).values()]
            logs[number] = np.median(np.log(predicted)) - np.log(configuration.measured)
        if self._progress is not None:
            self._done += 1
            self._progress(self._done, len(self.names) + len(LEFT_OUT))
        return logs

    # -- the fit -------------------------------------------------------------------------------------------------

    @cached_property
    def _linear(self) -> tuple[Array, Array, Array]:
        """Where predictions are linearised: the constants, the logarithms there, and their derivatives."""
        return self._linearised(shipped_values())

    def _linearised(self, values: Mapping[str, float]) -> tuple[Array, Array, Array]:
        import numpy as np

        at = np.array([values[name] for name in self.names])
        logs = self._logs(values)
        slopes = np.zeros((len(logs), len(at)))
        for j, name in enumerate(self.names):
            constant = run_constants().constants[name]
            if not constant.figures:
                continue
            step = _STEP * constant.spread
            if at[j] + step > constant.high:
                step = -step
            moved = self._logs({**values, name: at[j] + step}, logs, only=name)
            slopes[:, j] = (moved - logs) / step
        return at, logs, slopes

    @cached_property
    def _weights(self) -> Array:
        import numpy as np

        sources = [configuration.source for configuration in self._configurations]
        weights = np.array([sources.count(name) ** -0.25 for name in sources])
        return np.asarray(weights / weights.mean())

    def _solved(self, linear: tuple[Array, Array, Array], seen: NDArray[np.bool_]) -> dict[str, float]:
        import numpy as np

        try:
            from scipy.optimize import least_squares
        except ModuleNotFoundError:
            raise InputError("fitting needs scipy, which is not installed; pip install 'simllm[calibrate]'") from None
        at, logs, slopes = linear
        catalog = [run_constants().constants[name] for name in self.names]
        spread = np.array([c.spread for c in catalog])
        low, high = np.array([c.low for c in catalog]), np.array([c.high for c in catalog])
        parent = np.array([-1 if c.parent is None else self.names.index(c.parent) for c in catalog])
        prior = np.array([run_constants().prior(name) for name in self.names])

        def residuals(x: Array) -> Array:
            errors = ((logs + slopes @ (x - at)) * self._weights / _USUAL_ERROR)[seen]
            expected = np.where(parent >= 0, x[parent], prior)
            return np.concatenate([errors, (x - expected) / spread])

        margin = 1e-6 * spread
        start = np.clip(at, low + margin, high - margin)
        found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1").x
        return dict(zip(self.names, map(float, found), strict=True))

    def fitted(self, rounds: int = 1) -> dict[str, float]:
        """The constants fitted to all runs.

        Parameters
        ----------
        rounds : int
            How often predictions are linearised anew at what the last round found.
        """
        import numpy as np

        everything = np.ones(len(self._configurations), dtype=bool)
        values = self._solved(self._linear, everything)
        for _ in range(rounds - 1):
            values = self._solved(self._linearised(values), everything)
        return values

    # -- what a fit has not seen ---------------------------------------------------------------------------------

    def errors(self, left_out: str) -> RunErrors:
        """Every run predicted with constants that have not seen what is left out.

        Parameters
        ----------
        left_out : {"nothing", "fold", "source", "publication"}
        """
        import numpy as np

        parts = self._parts(left_out)
        found: dict[int, tuple[RunResult, str]] = {}
        for part in dict.fromkeys(parts):
            seen = np.array([left_out == "nothing" or other != part for other in parts])
            values = self._solved(self._linear, seen)
            rows = [i for c, own in zip(self._configurations, parts, strict=True) if own == part for i in c.rows]
            found |= {i: (result, part) for i, result in self.predict(values, rows).items()}
        if self._progress is not None:
            self._done += 1
            self._progress(self._done, len(self.names) + len(LEFT_OUT))
        ordered = [found[i] for i in sorted(found)]
        return RunErrors(
            quantity=self.quantity,
            left_out=left_out,
            rows=tuple(row for row, _ in ordered),
            parts=tuple(part for _, part in ordered),
        )

    def _parts(self, left_out: str) -> Sequence[str]:
        """The part that each configuration is left out with."""
        if left_out == "nothing":
            return ["everything"] * len(self._configurations)
        if left_out != "fold":
            return [str(getattr(configuration, left_out)) for configuration in self._configurations]
        groups = sorted({configuration.fold for configuration in self._configurations})
        random.Random(0).shuffle(groups)
        fold = {group: str(number % _FOLDS) for number, group in enumerate(groups)}
        return [fold[configuration.fold] for configuration in self._configurations]

    @property
    def constants_fitted(self) -> int:
        """Constants that any judged run depends on."""
        return len(set().union(*self._depends))


def _fits(path: str | Path, progress: _Progress | None) -> list[RunFit]:
    """A fit for each quantity that the runs of a table measure."""
    found, problems = [], []
    for quantity in QUANTITIES:
        try:
            found.append(RunFit(path, progress, quantity))
        except InputError as problem:
            problems.append(problem)
    if not found:
        raise problems[0]
    return found


def fitted_constants(path: str | Path, rounds: int, progress: _Progress | None = None) -> dict[str, float]:
    """All run constants fitted to the runs of a table; those of a quantity that no run measures are left out.

    Parameters
    ----------
    path : str or Path
    rounds : int
        As of `RunFit.fitted`.
    progress : callable, optional

    Raises
    ------
    InputError
        No run measures anything.
    """
    return {name: value for fit in _fits(path, progress) for name, value in fit.fitted(rounds).items()}


def cross_validated(path: str | Path, progress: _Progress | None = None) -> dict[str, object]:
    """Errors by tier of predictions that have not seen a part of the runs.

    Returns
    -------
    dict
        For ``step_time`` and ``peak_memory``: ``constants``, how many were fitted; and for everything in `LEFT_OUT`
        the scores of tier A, tier B and both. A quantity that no run measures is left out.

    Raises
    ------
    InputError
        No run measures either.
    """
    found: dict[str, object] = {}
    for fit in _fits(path, progress):
        scores: dict[str, object] = {"constants": fit.constants_fitted}
        for left_out in LEFT_OUT:
            errors = fit.errors(left_out)
            tiers = {"A": "A", "B": "B", "A and B": ("A", "B", "")}
            scores[left_out] = {name: errors.score(wanted).to_dict() for name, wanted in tiers.items()}
        found[fit.quantity] = scores
    return found
