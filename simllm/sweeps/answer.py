"""One cell of a sweep to one row of the table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from simllm.errors import InputError
from simllm.hardware import Cluster, load_cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan
from simllm.planner import plan as search_plans
from simllm.training import Estimate, Training, estimate
from simllm.training.estimate import plan_dict

__all__ = ["ANSWERED", "NOTHING_FITS", "REFUSED", "answer"]

#: What a row says of its cell: a plan, none that fits, or a question that cannot be asked.
ANSWERED, NOTHING_FITS, REFUSED = "ok", "nothing fits", "refused"


@lru_cache(maxsize=64)
def _model(name: str) -> Model:
    return Model.load(name)


@lru_cache(maxsize=256)
def _cluster(name: str, gpus: int) -> Cluster:
    return load_cluster(name, gpus)


def answer(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a cell; the same wherever and in whatever order it is computed.

    Parameters
    ----------
    cell : dict
        Of `simllm.sweeps.cells.Sweep`.
    """
    row = {name: value for name, value in cell.items() if name != "plan"}
    try:
        return row | _answer(cell)
    except InputError as error:
        return row | {"status": REFUSED, "reason": str(error)}


def _answer(cell: Mapping[str, Any]) -> dict[str, Any]:
    model, cluster = _model(cell["model"]), _cluster(cell["cluster"], cell["gpus"])
    training = Training(
        seq_len=cell["seq_len"],
        stack=cell["stack"],
        optimizer=cell["optimizer"],
        memory_headroom=cell["memory_headroom"],
    )
    if "plan" in cell:
        return {"status": ANSWERED, "reason": None} | _row(
            estimate(model, cluster, _given_plan(cell, model, training), training)
        )
    search = search_plans(
        model,
        cluster,
        training,
        global_batch_size=cell["global_batch_size"],
        precision=cell["precision"],
        objective=cell["objective"],
        top=1,
    )
    counts = {"searched": search.searched, "feasible": search.feasible}
    if not search.plans:
        # What ran out of memory came furthest; other combinations were never a plan.
        reasons = sorted(search.rejected, key=lambda name: ("out of memory" not in name, -search.rejected[name]))
        return {"status": NOTHING_FITS, "reason": reasons[0] if reasons else None} | counts
    return {"status": ANSWERED, "reason": None} | counts | _row(search.plans[0])


def _given_plan(cell: Mapping[str, Any], model: Model, training: Training) -> Plan:
    """A plan of the file with the defaults of ``simllm estimate``."""
    given = dict(cell["plan"])
    tp, pp, cp = given.get("tp", 1), given.get("pp", 1), given.get("cp", 1)
    replica = tp * pp * cp
    if "dp" not in given and cell["gpus"] % replica:
        raise InputError(f"tp={tp} x pp={pp} x cp={cp} = {replica} does not divide the {cell['gpus']} GPUs")
    moe = "experts" in model.parameters.by_component
    defaults: dict[str, Any] = {
        "dp": cell["gpus"] // replica,
        "etp": training.expert_tensor_parallel(tp) if moe else 1,
        "cp_comm_type": training.context_kind(cp),
        "sequence_parallel": tp > 1,
        "schedule": "interleaved" if given.get("vpp", 1) > 1 else "1f1b",
    }
    given["recompute"] = Recompute.parse(given.get("recompute", "none"))
    return Plan(**(defaults | given), global_batch_size=cell["global_batch_size"], precision=cell["precision"])


def _row(found: Estimate) -> dict[str, Any]:
    low, high = found.step_time_interval_s
    plan = plan_dict(found.plan)
    # What the cell already says, as it was asked.
    del plan["global_batch_size"], plan["precision"]
    return {
        "gpus_used": found.plan.num_gpus,
        **plan,
        "step_time_s": found.step_time_s,
        "step_time_low_s": low,
        "step_time_high_s": high,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "model_tflops_per_gpu": found.model_tflops_per_gpu,
        "mfu": found.mfu,
        "hfu": found.hfu,
        "fits": found.fits,
        "peak_memory_bytes": float(found.peak_memory_bytes),
        "usable_memory_bytes": float(found.usable_memory_bytes),
        **{f"time_{cause}_s": float(seconds) for cause, seconds in found.time.by_cause.items()},
        **{f"memory_{kind}_bytes": float(size) for kind, size in found.peak_stage.by_kind.items()},
    }
