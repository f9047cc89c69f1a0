"""A plan of one's own beside those of a search: how it ranks, and why it is not the best."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from simllm.errors import InputError, unknown_name
from simllm.models.activations import Recompute
from simllm.parallel.offload import Offload
from simllm.parallel.plan import Plan, Zero
from simllm.planner.reasons import explain_difference
from simllm.training import Estimate, Training
from simllm.units import format_bytes, format_duration

__all__ = ["NO_CHANGE", "Comparison", "parse_plan"]

#: Where nothing that is tried alone makes a plan fit.
NO_CHANGE = "no single change makes it fit"

_SHORT = {"mbs": "micro_batch_size", "sp": "sequence_parallel"}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SWITCHES = ("sequence_parallel", "uneven_layers")
_TEXTS = ("zero", "precision", "schedule", "cp_comm_type")


def parse_plan(
    text: str, num_gpus: int, global_batch_size: int, training: Training, experts: bool, precision: str = "bf16"
) -> Plan:
    """A plan from ``tp=8,pp=16,vpp=8``; what is not said is as `simllm estimate` takes it.

    What is offloaded is joined with a plus: ``offload=optimizer+gradients``.

    Parameters
    ----------
    text : str
    num_gpus : int
        Data parallelism follows from it.
    global_batch_size : int
    training : Training
    experts : bool
        The model has experts.
    precision : str

    Examples
    --------
    >>> plan = parse_plan("tp=8,pp=16,mbs=1", 16384, 2048, Training(seq_len=8192), experts=False)
    >>> plan.dp, plan.sequence_parallel, plan.schedule
    (128, True, '1f1b')
    """
    names = [field.name for field in fields(Plan) if field.name != "global_batch_size"]
    given: dict[str, Any] = {}
    for part in text.replace(" ", ",").split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        name = _SHORT.get(key.strip().replace("-", "_"), key.strip().replace("-", "_"))
        if name not in names:
            raise unknown_name("part of a plan", key, [*names, *_SHORT])
        if name == "sequence_parallel" and not equals:
            value = "true"
        if name in given or not value:
            raise InputError(f"{part!r} in {text!r}: write every part once, as {key}=VALUE")
        given[name] = _value(name, value.strip(), text)
    tp = given.setdefault("tp", 1)
    replica = tp * given.get("pp", 1) * given.get("cp", 1)
    if "dp" not in given:
        if num_gpus % replica:
            raise InputError(f"{text}: tp x pp x cp = {replica} does not divide the {num_gpus} GPUs; change a degree")
        given["dp"] = num_gpus // replica
    elif replica * given["dp"] != num_gpus:
        raise InputError(
            f"{text}: the degrees multiply to {replica * given['dp']} GPUs, not to {num_gpus}; leave out dp"
        )
    given.setdefault("etp", training.expert_tensor_parallel(tp) if experts else 1)
    given.setdefault("cp_comm_type", training.context_kind(given.get("cp", 1)))
    given.setdefault("sequence_parallel", tp > 1)
    given.setdefault("schedule", "interleaved" if given.get("vpp", 1) > 1 else "1f1b")
    given.setdefault("precision", precision)
    return Plan(**given, global_batch_size=global_batch_size)


def _value(name: str, text: str, whole: str) -> Any:
    if name == "recompute":
        return Recompute.parse(text)
    if name == "offload":
        return Offload.parse(text.replace("+", ","))
    if name in _TEXTS:
        return cast("Zero", text)
    if name in _SWITCHES:
        if text.lower() not in _WORDS:
            raise InputError(f"{name}={text} in {whole!r}: write true or false")
        return _WORDS[text.lower()]
    if not text.isdigit():
        raise InputError(f"{name}={text} in {whole!r}: write a whole number above zero")
    return int(text)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A given plan among those of a search.

    Attributes
    ----------
    answer : Estimate
    best : Estimate or None
        The best plan of the search.
    rank : int
        Its place among the feasible plans, 1 for the best; of a plan that does not fit, the place it would take.
    feasible : int
        Plans that can be recommended.
    fix : str or None
        Where it does not fit: the nearest single change that makes it.
    fixed : Estimate or None
        The plan after that change.
    fixed_rank : int or None
    """

    answer: Estimate
    best: Estimate | None
    rank: int
    feasible: int
    fix: str | None
    fixed: Estimate | None
    fixed_rank: int | None

    @property
    def why(self) -> tuple[str, ...]:
        """How it ranks and why, a sentence each."""
        place = f"place {self.rank:,} of {self.feasible:,}"
        difference = f": {explain_difference(self.best, self.answer)}" if self.best is not None else ""
        if self.answer.fits:
            return (f"{place}{difference}",)
        over = self.answer.peak_memory_bytes - self.answer.usable_memory_bytes
        lines = [f"does not fit: {format_bytes(over)} more than a GPU may use"]
        if self.feasible:
            lines.append(f"by its time it would take {place}{difference}")
        if self.fixed is None:
            return (*lines, NO_CHANGE)
        after = f", step {format_duration(self.fixed.step_time_s)}, MFU {self.fixed.mfu:.1%}"
        return (*lines, f"{self.fix}{after}, place {self.fixed_rank:,} of {self.feasible:,}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return {
            "estimate": self.answer.to_dict(),
            "rank": self.rank,
            "of": self.feasible,
            "why": list(self.why),
            "fix": self.fix,
            "fixed": self.fixed.to_dict() if self.fixed else None,
            "fixed_rank": self.fixed_rank,
        }
