"""A plan of one's own beside those of a search: how it ranks, and why it is not the best."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from simllm.errors import InputError, unknown_name
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan, Zero
from simllm.planner.reasons import explain_difference
from simllm.training import Estimate, Training

__all__ = ["Comparison", "parse_plan"]

_SHORT = {"mbs": "micro_batch_size", "sp": "sequence_parallel"}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SWITCHES = ("sequence_parallel", "uneven_layers")
_TEXTS = ("zero", "precision", "schedule")


def parse_plan(
    text: str, num_gpus: int, global_batch_size: int, training: Training, experts: bool, precision: str = "bf16"
) -> Plan:
    """A plan from ``tp=8,pp=16,vpp=8``; what is not said is as `simllm estimate` takes it.

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
    given.setdefault("sequence_parallel", tp > 1)
    given.setdefault("schedule", "interleaved" if given.get("vpp", 1) > 1 else "1f1b")
    given.setdefault("precision", precision)
    return Plan(**given, global_batch_size=global_batch_size)


def _value(name: str, text: str, whole: str) -> Any:
    if name == "recompute":
        return Recompute.parse(text)
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
    rank : int or None
        Its place among the plans that fit, 1 for the best; None where it does not fit.
    feasible : int
        Plans that fit.
    fix : str or None
        Where it does not fit: what would make it.
    """

    answer: Estimate
    best: Estimate | None
    rank: int | None
    feasible: int
    fix: str | None

    @property
    def why(self) -> str:
        """How it ranks, and why."""
        if self.rank is None:
            over = self.answer.peak_memory_bytes - self.answer.usable_memory_bytes
            fix = f"; {self.fix}" if self.fix else ""
            return f"does not fit: {over / 2**30:.3g} GiB more than a GPU may use{fix}"
        place = f"place {self.rank:,} of {self.feasible:,}"
        if self.best is None:
            return place
        return f"{place}: {explain_difference(self.best, self.answer)}"
