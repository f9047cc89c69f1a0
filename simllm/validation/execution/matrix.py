"""Every strategy on every kind of model, as one table: ``python -m simllm.validation.execution.matrix FILE.csv``.

The command adds the rows that the file lacks, each when it is done.
"""

from __future__ import annotations

import csv
import sys
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

__all__ = ["MODELS", "STRATEGIES", "MatrixRow", "fill_table", "matrix_case", "run_matrix"]

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
    timeout_s: float = 300.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[MatrixRow]:
    """Execute strategies on models with four processes of this machine.

    Parameters
    ----------
    models, strategies : iterable of str
        Names in `MODELS` (or of the catalog) and `STRATEGIES`.
    timeout_s : float
        Of each case.
    progress : callable, optional
        Told how many cases are done, of how many.
    """
    wanted = list(product(models, strategies))
    rows: list[MatrixRow] = []
    for row in _rows(wanted, timeout_s):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(wanted))
    return rows


def _rows(wanted: Sequence[tuple[str, str]], timeout_s: float) -> Iterator[MatrixRow]:
    from simllm.validation.execution.pool import ExecutionError, Pool

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


def fill_table(path: Path, timeout_s: float = 300.0) -> None:
    """Execute what a table lacks, row by row: a run that was interrupted goes on where it was.

    Parameters
    ----------
    path : Path
        CSV file; made where there is none.
    timeout_s : float
        Of each case.
    """
    import torch

    there: set[tuple[str, str]] = set()
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            there = {(record["model"], record["strategy"]) for record in csv.DictReader(file)}
    wanted = [pair for pair in product(MODELS, STRATEGIES) if pair not in there]
    source = f"executed by simllm: torch {torch.__version__.partition('+')[0]} CPU, gloo, {_RANKS} processes"
    with path.open("a", encoding="utf-8", newline="") as file:
        for row in _rows(wanted, timeout_s):
            record = {**row.to_dict(), "source": source}
            writer = csv.DictWriter(file, list(record), lineterminator="\n")
            if not there:
                writer.writeheader()
            there.add((row.model, row.strategy))
            writer.writerow(record)
            file.flush()


if __name__ == "__main__":
    fill_table(Path(sys.argv[1]))
