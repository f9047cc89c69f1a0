"""Every strategy on every kind of model, as one table: ``simllm validate torch --matrix``."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.spec import ModelSpec
from simllm.parallel.plan import Plan
from simllm.validation.execution.sizes import shrink

__all__ = ["MODELS", "STRATEGIES", "MatrixRow", "matrix_case", "run_matrix"]

#: One model of the catalog for each kind of architecture.
MODELS: Final[Mapping[str, str]] = {
    "gpt3-175b": "learned positions, LayerNorm, GELU, biases, tied head",
    "llama-3-70b": "RoPE, RMSNorm, SwiGLU, grouped-query attention",
    "mixtral-8x7b": "mixture of experts",
    "falcon-7b": "parallel block, multi-query attention, tied head",
    "bloom-176b": "ALiBi, embedding norm",
    "deepseek-v3": "latent attention, shared expert",
    "t5-base": "encoder-decoder, relative bias",
}

_RANKS = 4
_SEQ_LEN = 32


def _strategy(**plan: Any) -> dict[str, Any]:
    return plan


#: Strategies by name: what differs from one rank, stage 0, two micro-batches of two sequences, in float32.
STRATEGIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "one rank": _strategy(),
    "one rank, recompute selective": _strategy(recompute="selective"),
    "one rank, recompute full": _strategy(recompute="full"),
    "one rank, recompute every:2": _strategy(recompute="every:2"),
    "one rank, unfused": _strategy(unfused=True),
    "DDP 2": _strategy(dp=2),
    "DDP 4": _strategy(dp=4),
    "DDP 2, recompute full": _strategy(dp=2, recompute="full"),
    "ZeRO-1 2": _strategy(dp=2, zero="1"),
    "ZeRO-1 4": _strategy(dp=4, zero="1"),
    "ZeRO-2 2": _strategy(dp=2, zero="2"),
    "ZeRO-2 4": _strategy(dp=4, zero="2"),
    "ZeRO-3 2": _strategy(dp=2, zero="3"),
    "ZeRO-3 4": _strategy(dp=4, zero="3"),
    "ZeRO-3 2, recompute full": _strategy(dp=2, zero="3", recompute="full"),
    "ZeRO-3 2, recompute selective": _strategy(dp=2, zero="3", recompute="selective"),
    "ZeRO-3 2, offload": _strategy(dp=2, zero="3", offload=True),
    "ZeRO-2 2, bf16": _strategy(dp=2, zero="2", precision="bf16"),
    "ZeRO-3 2, bf16": _strategy(dp=2, zero="3", precision="bf16"),
    "HSDP 2x2": _strategy(dp=4, zero="hsdp"),
    "HSDP 2x2, bf16": _strategy(dp=4, zero="hsdp", precision="bf16"),
    "TP 2": _strategy(tp=2, sequence_parallel=False),
    "TP 4": _strategy(tp=4, sequence_parallel=False),
    "TP 2, SP": _strategy(tp=2),
    "TP 4, SP": _strategy(tp=4),
    "TP 2, SP, recompute full": _strategy(tp=2, recompute="full"),
    "TP 2, recompute full": _strategy(tp=2, sequence_parallel=False, recompute="full"),
    "TP 2 x DP 2": _strategy(tp=2, dp=2),
    "TP 2 x ZeRO-2 2": _strategy(tp=2, dp=2, zero="2"),
    "TP 2 x ZeRO-3 2": _strategy(tp=2, dp=2, zero="3"),
    "TP 2 x ZeRO-3 2, bf16": _strategy(tp=2, dp=2, zero="3", precision="bf16"),
    "TP 2 x ZeRO-3 2, recompute full": _strategy(tp=2, dp=2, zero="3", recompute="full"),
    "TP 2 (no SP) x ZeRO-3 2": _strategy(tp=2, dp=2, zero="3", sequence_parallel=False),
    "PP 2, GPipe": _strategy(pp=2, schedule="gpipe"),
    "PP 4, GPipe": _strategy(pp=4, schedule="gpipe"),
    "PP 2, 1F1B": _strategy(pp=2),
    "PP 4, 1F1B": _strategy(pp=4, micro_batches=8),
    "PP 4, 1F1B, few micro-batches": _strategy(pp=4, micro_batches=3),
    "PP 2 x 2, interleaved": _strategy(pp=2, vpp=2, schedule="interleaved"),
    "PP 2 x 2, interleaved, one group": _strategy(pp=2, vpp=2, schedule="interleaved", micro_batches=2),
    "PP 2 x 2 x DDP 2, interleaved": _strategy(pp=2, vpp=2, dp=2, schedule="interleaved"),
    "PP 2 x 2, looped BFS": _strategy(pp=2, vpp=2, schedule="looped-bfs"),
    "PP 2 x 2, interleaved zero bubble": _strategy(pp=2, vpp=2, schedule="interleaved-zb"),
    "PP 2 x 2, ZBV": _strategy(pp=2, vpp=2, schedule="zb-v"),
    "PP 2 x 2, ZBV, 8 micro-batches": _strategy(pp=2, vpp=2, schedule="zb-v", micro_batches=8),
    "PP 2 x 2, DualPipeV": _strategy(pp=2, vpp=2, schedule="dualpipe-v"),
    "PP 2 x 2, DualPipeV, 8 micro-batches": _strategy(pp=2, vpp=2, schedule="dualpipe-v", micro_batches=8),
    "PP 2 x 2 x TP 2, interleaved zero bubble": _strategy(pp=2, vpp=2, tp=2, schedule="interleaved-zb"),
    "PP 2 x 2 x TP 2, ZBV": _strategy(pp=2, vpp=2, tp=2, schedule="zb-v"),
    "PP 2, 1F1B, recompute full": _strategy(pp=2, recompute="full"),
    "PP 2 x DDP 2": _strategy(pp=2, dp=2),
    "PP 2 x DDP 2, GPipe": _strategy(pp=2, dp=2, schedule="gpipe"),
    "PP 2 x ZeRO-1 2": _strategy(pp=2, dp=2, zero="1"),
    "PP 2 x ZeRO-3 2": _strategy(pp=2, dp=2, zero="3"),
    "PP 2 x ZeRO-3 2, bf16": _strategy(pp=2, dp=2, zero="3", precision="bf16"),
    "PP 2 x ZeRO-3 2, interleaved": _strategy(pp=2, vpp=2, dp=2, zero="3", schedule="interleaved"),
    "PP 2 x TP 2, SP": _strategy(pp=2, tp=2),
    "PP 2 x TP 2": _strategy(pp=2, tp=2, sequence_parallel=False),
    "PP 2 x TP 2, SP, interleaved": _strategy(pp=2, vpp=2, tp=2, schedule="interleaved"),
    "EP 2 x DDP 2": _strategy(dp=2, ep=2),
    "EP 4 x DDP 4": _strategy(dp=4, ep=4),
    "EP 2 x DDP 4": _strategy(dp=4, ep=2),
    "EP 2 x ZeRO-3 4": _strategy(dp=4, ep=2, zero="3"),
    "EP 2 x TP 2 x ZeRO-3 2": _strategy(tp=2, dp=2, ep=2, zero="3"),
    "EP 4 x TP 2 x DP 2": _strategy(tp=2, dp=2, ep=4),
    "EP 2 x PP 2 x DDP 2": _strategy(pp=2, dp=2, ep=2),
}


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One strategy on one model.

    ``status``: executed; refused, with the reason; or failed, when a rank did.
    """

    model: str
    strategy: str
    plan: str
    status: str
    compared: int = 0
    off: tuple[str, ...] = ()
    peak_error: float = 0.0
    gradient_error: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Executed, and every quantity as expected."""
        return self.status == "executed" and not self.off

    def to_dict(self) -> dict[str, Any]:
        """As one record."""
        return {
            "model": self.model,
            "strategy": self.strategy,
            "plan": self.plan,
            "status": self.status,
            "quantities": self.compared,
            "as_expected": self.compared - len(self.off),
            "off": "; ".join(self.off),
            "peak_memory_error": round(self.peak_error, 4),
            "gradient_error": float(f"{self.gradient_error:.2g}"),
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, str]) -> MatrixRow:
        """A record of a table, which holds no times."""
        return cls(
            model=record["model"],
            strategy=record["strategy"],
            plan=record["plan"],
            status=record["status"],
            compared=int(record["quantities"]),
            off=tuple(record["off"].split("; ")) if record["off"] else (),
            peak_error=float(record["peak_memory_error"]),
            gradient_error=float(record["gradient_error"]),
            reason=record["reason"],
        )


#: Columns of a table of rows: those of a record and where it was executed.
_COLUMNS = (*MatrixRow(model="", strategy="", plan="", status="").to_dict(), "source")


def matrix_case(spec: ModelSpec, strategy: Mapping[str, Any]) -> Any:
    """The case of a strategy on a small model, checked."""
    from simllm.validation.execution.session import make_case

    words = dict(strategy)
    micro_batches = words.pop("micro_batches", 4 if words.get("pp", 1) > 1 else 2)
    details = {key: words.pop(key) for key in ("offload", "unfused") if key in words}
    words.setdefault("zero", "0")
    words.setdefault("precision", "fp32")
    words.setdefault("sequence_parallel", words.get("tp", 1) > 1)
    words["recompute"] = Recompute.parse(words.get("recompute", "none"))
    plan = Plan(micro_batch_size=2, global_batch_size=2 * micro_batches * words.get("dp", 1), **words)
    return make_case(spec, plan, _SEQ_LEN, **details)


def run_matrix(
    models: Iterable[str] = tuple(MODELS),
    strategies: Iterable[str] = tuple(STRATEGIES),
    *,
    path: Path | None = None,
    timeout_s: float = 300.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[MatrixRow]:
    """Execute strategies on models with four processes of this machine.

    Parameters
    ----------
    models, strategies : iterable of str
        Names in `MODELS` (or of the catalog) and `STRATEGIES`.
    path : Path, optional
        CSV file that keeps the rows, each as soon as it is done: what it holds is not executed again, so that a run
        which was interrupted goes on where it was. Made where there is none.
    timeout_s : float
        Of each case.
    progress : callable, optional
        Told how many cases are done, of how many.

    Raises
    ------
    InputError
        The file cannot be read or written, or is not such a table.
    """
    wanted = list(product(models, strategies))
    found = {} if path is None else _read_table(path)
    missing = [pair for pair in wanted if pair not in found]
    for row in _rows(missing, timeout_s):
        found[row.model, row.strategy] = row
        if path is not None:
            _append(path, row)
        if progress is not None:
            progress(len(wanted) - len(missing) + sum(pair in found for pair in missing), len(wanted))
    return [found[pair] for pair in wanted]


def _read_table(path: Path) -> dict[tuple[str, str], MatrixRow]:
    if not path.exists():
        _append(path, None)
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [MatrixRow.from_dict(record) for record in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is not a table of executed strategies; its columns are {', '.join(_COLUMNS)}"
        ) from None
    return {(row.model, row.strategy): row for row in rows}


def _append(path: Path, row: MatrixRow | None) -> None:
    """Add a row to a table, or begin one."""
    import torch

    source = f"executed by simllm: torch {torch.__version__.partition('+')[0]} CPU, gloo, {_RANKS} processes"
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader() if row is None else writer.writerow({**row.to_dict(), "source": source})
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def _rows(wanted: Sequence[tuple[str, str]], timeout_s: float) -> Iterator[MatrixRow]:
    from simllm.validation.execution.pool import ExecutionError, Pool

    if not wanted:
        return
    pool = Pool(_RANKS, timeout_s=timeout_s)
    try:
        for name, strategy in wanted:
            try:
                yield _run(pool, name, shrink(Model.load(name).spec), strategy)
            except ExecutionError as error:
                yield MatrixRow(model=name, strategy=strategy, plan="", status="failed", reason=str(error))
                pool.close()
                pool = Pool(_RANKS, timeout_s=timeout_s)
    finally:
        pool.close()


def _run(pool: Any, name: str, spec: ModelSpec, strategy: str) -> MatrixRow:
    from simllm.validation.execution.compare import compare

    try:
        case = matrix_case(spec, STRATEGIES[strategy])
    except InputError as error:
        return MatrixRow(model=name, strategy=strategy, plan="", status="refused", reason=str(error))
    begin = time.perf_counter()
    comparison = compare(case, pool.run(case))
    peak = next(q for q in comparison.quantities if q.quantity == "peak memory")
    gradient = next(q for q in comparison.quantities if q.quantity == "gradients against one process")
    assert isinstance(peak.executed, int | float)
    assert isinstance(gradient.executed, int | float)
    return MatrixRow(
        model=name,
        strategy=strategy,
        plan=f"{case.plan} {case.plan.precision}",
        status="executed",
        compared=len(comparison.quantities),
        off=tuple(q.quantity for q in comparison.quantities if not q.ok),
        peak_error=peak.difference / peak.executed,
        gradient_error=float(gradient.executed),
        seconds=time.perf_counter() - begin,
    )
