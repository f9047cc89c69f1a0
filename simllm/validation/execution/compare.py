"""Prediction and execution side by side, and the verdict on each quantity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from simllm.parallel.schedules import Action
from simllm.validation.execution.case import Case, group_ranks
from simllm.validation.execution.predict import Prediction, Term, predict
from simllm.validation.execution.runner import Record

__all__ = ["Comparison", "Quantity", "compare"]

#: Largest relative difference of a gradient from the single process: sums in another order, in float32 and in bf16.
_GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.2}
_LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One quantity of the rank on which prediction and execution differ most; rank 0 where they are equal.

    ``expected_tolerance``: relative to the executed value, or 0: they must be equal.
    """

    quantity: str
    rank: int
    predicted: float | str
    executed: float | str
    difference: float
    expected_tolerance: float
    ok: bool
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All quantities of one execution, with the named terms in the predictions.

    ``resident_bytes``: of a fake cluster, most memory of a process that executed it.
    """

    case: Case
    quantities: tuple[Quantity, ...]
    terms: tuple[Term, ...]
    step_s: tuple[float, ...] = ()
    resident_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether every quantity is within its tolerance."""
        return all(quantity.ok for quantity in self.quantities)

    def to_dict(self) -> dict[str, Any]:
        """As one document."""
        return {
            "model": self.case.spec.name,
            "plan": str(self.case.plan),
            "precision": self.case.plan.precision,
            "seq_len": self.case.seq_len,
            "ok": self.ok,
            "quantities": [
                {
                    "quantity": q.quantity,
                    "rank": q.rank,
                    "predicted": q.predicted,
                    "executed": q.executed,
                    "difference": q.difference,
                    "expected_tolerance": q.expected_tolerance,
                    "ok": q.ok,
                }
                for q in self.quantities
            ],
            "terms": [{"quantity": t.quantity, "amount": t.amount, "why": t.why} for t in self.terms],
            "step_s": list(self.step_s),
            **({"resident_bytes": self.resident_bytes} if self.resident_bytes else {}),
        }


@dataclass
class _Table:
    rows: dict[str, list[Quantity]] = field(default_factory=dict)

    def add(
        self, quantity: str, rank: int, predicted: float, executed: float, tolerance: float = 0.0, unit: str = ""
    ) -> None:
        difference = predicted - executed
        ok = abs(difference) <= tolerance * abs(executed)
        self._put(
            Quantity(
                quantity=quantity,
                rank=rank,
                predicted=predicted,
                executed=executed,
                difference=difference,
                expected_tolerance=tolerance,
                ok=ok,
                unit=unit,
            )
        )

    def words(self, quantity: str, rank: int, predicted: str, executed: str) -> None:
        same = predicted == executed
        self._put(
            Quantity(
                quantity=quantity,
                rank=rank,
                predicted=predicted,
                executed=executed,
                difference=float(not same),
                expected_tolerance=0.0,
                ok=same,
            )
        )

    def _put(self, row: Quantity) -> None:
        self.rows.setdefault(row.quantity, []).append(row)

    def worst(self) -> tuple[Quantity, ...]:
        return tuple(max(rows, key=lambda q: (not q.ok, abs(q.difference), -q.rank)) for rows in self.rows.values())


def compare(case: Case, records: Iterable[Record], backend: str = "gloo") -> Comparison:
    """Hold the records of ranks against their predictions.

    Parameters
    ----------
    case : Case
    records : iterable of Record
    backend : {"gloo", "nccl", "fake"}

    Returns
    -------
    Comparison
    """
    table = _Table()
    terms: dict[Term, None] = {}
    times: Sequence[float] = ()
    resident = 0
    for record in records:
        prediction = predict(case, record.rank, backend)
        _one_rank(table, case, prediction, record)
        terms |= dict.fromkeys(prediction.terms)
        times = record.step_s if len(record.step_s) > len(times) else times
        resident = max(resident, record.resident_bytes)
    return Comparison(
        case=case, quantities=table.worst(), terms=tuple(terms), step_s=tuple(times), resident_bytes=resident
    )


def _one_rank(table: _Table, case: Case, prediction: Prediction, record: Record) -> None:
    rank = record.rank
    table.add("parameters", rank, prediction.parameters, record.parameters)
    table.add("FLOPs of products and attention", rank, prediction.flops, record.flops, unit="FLOP")
    for kind, size in prediction.persistent.items():
        table.add(f"persistent memory: {kind}", rank, size, record.persistent[kind], unit="B")
    _saved(table, prediction, record)
    _traffic(table, case, prediction, record)
    if case.plan.pp > 1:
        table.words("pipeline order", rank, _order(prediction.actions), _order(record.actions))
        table.add("micro-batches in flight", rank, prediction.in_flight, _in_flight(record.actions))
    table.add("peak memory", rank, prediction.peak_bytes, record.peak_bytes, 0.03, "B")
    _correctness(table, case, record)


def _saved(table: _Table, prediction: Prediction, record: Record) -> None:
    """Kinds of parts, not every layer, are the rows: the layer that differs most stands for all."""
    for name in sorted({*prediction.saved, *record.saved}):
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        wanted, found = prediction.saved.get(name, 0), record.saved.get(name, 0)
        table.add(f"saved for the backward pass: {kind}", record.rank, wanted, found, unit="B")


def _traffic(table: _Table, case: Case, prediction: Prediction, record: Record) -> None:
    groups = group_ranks(case, record.rank)
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for call in record.calls:
        calls[call.op, call.ranks] += 1
        sizes[call.op, call.ranks] += call.size_bytes
    for key in sorted({*calls, *prediction.traffic}):
        op, ranks = key
        number, size = prediction.traffic.get(key, (0, 0))
        name = f"{op} over {groups.role(ranks)}"
        table.add(f"{name}: calls", record.rank, number, calls[key])
        table.add(f"{name}: payload", record.rank, size, sizes[key], unit="B")


def _correctness(table: _Table, case: Case, record: Record) -> None:
    """The parallel run computes what the single process does."""
    precision = case.plan.precision
    if record.reference_loss is None:
        return
    tolerance = _GRADIENT_TOLERANCE[precision]
    table._put(
        Quantity(
            quantity="gradients against one process",
            rank=record.rank,
            predicted=0.0,
            executed=record.gradient_error,
            difference=-record.gradient_error,
            expected_tolerance=tolerance,
            ok=record.gradient_error <= tolerance,
        )
    )
    if record.loss is not None and case.plan.dp == 1:
        table.add(
            "loss against one process", record.rank, record.reference_loss, record.loss, _LOSS_TOLERANCE[precision]
        )


def _order(actions: Sequence[Action]) -> str:
    return " ".join(f"{a.kind}{a.micro_batch}" + (f".{a.chunk}" if a.chunk else "") for a in actions)


def _in_flight(actions: Sequence[Action]) -> int:
    most = now = 0
    for action in actions:
        now += {"F": 1, "I": 0}.get(action.kind, -1)
        most = max(most, now)
    return most
