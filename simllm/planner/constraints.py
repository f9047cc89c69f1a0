"""What a plan must be, whatever is best: degrees that are fixed, limits on time and money."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from simllm.errors import InputError, unknown_name
from simllm.models.activations import Recompute
from simllm.models.context import CP_COMM_TYPES, CpCommType
from simllm.parallel.offload import Offload
from simllm.parallel.plan import PRECISIONS, ZERO_STAGES
from simllm.parallel.schedules import SCHEDULES

__all__ = ["TP_WITHIN", "Constraints"]

TP_WITHIN = ("node", "domain", "cluster")

_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "dp", "micro_batch_size")
_NAMES = {
    "zero": ("ZeRO stage", ZERO_STAGES),
    "schedule": ("schedule", SCHEDULES),
    "cp_comm_type": ("kind of context parallelism", CP_COMM_TYPES),
    "precision": ("precision", PRECISIONS),
}


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the plans of a search have to satisfy. Empty: free.

    Attributes
    ----------
    tp, pp, vpp, cp, ep, dp, micro_batch_size : tuple of int
        The values allowed.
    zero, schedule : tuple of str
        The ZeRO stages and pipeline schedules allowed.
    cp_comm_type : tuple of str
        The kinds of context parallelism to choose from; empty: that of the software stack.
    precision : tuple of str
        Precisions of the matrix products to choose from.
    recompute : tuple of Recompute
        The recomputation policies allowed.
    offload : tuple of Offload
        What may leave the devices, to choose from.
    sequence_parallel : bool, optional
    uneven_layers : bool
        Also interleave chunks of different sizes where there are equal ones.
    tp_within : {"node", "domain", "cluster"}
        How far tensor parallelism may reach.
    max_days, max_usd : float, optional
        Of the whole run.
    """

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    vpp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    cp_comm_type: tuple[CpCommType, ...] = ()
    ep: tuple[int, ...] = ()
    dp: tuple[int, ...] = ()
    micro_batch_size: tuple[int, ...] = ()
    zero: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    precision: tuple[str, ...] = ("bf16",)
    recompute: tuple[Recompute, ...] = ()
    offload: tuple[Offload, ...] = (Offload(),)
    sequence_parallel: bool | None = None
    uneven_layers: bool = False
    tp_within: Literal["node", "domain", "cluster"] = "domain"
    max_days: float | None = None
    max_usd: float | None = None

    def __post_init__(self) -> None:
        for name in _DEGREES:
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
                    raise InputError(f"{name}={value} must be a whole number from 1 to 10000000")
        for name, (what, known) in _NAMES.items():
            for value in getattr(self, name):
                if value not in known:
                    raise unknown_name(what, str(value), known)
        if not self.offload:
            raise InputError("offload is empty; name at least one, such as none")
        if not self.precision:
            raise InputError("precision is empty; name at least one, such as bf16")
        if self.tp_within not in TP_WITHIN:
            raise unknown_name("reach of tensor parallelism", str(self.tp_within), TP_WITHIN)
        for name in ("max_days", "max_usd"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise InputError(f"{name}={limit} must be a number above zero")
        if self.pp and self.vpp and set(self.pp) == {1} and min(self.vpp) > 1:
            raise InputError(f"vpp={_words(self.vpp)} needs a pipeline, but pp=1; allow vpp=1 or a larger pp")
        if self.cp_comm_type and set(self.cp) == {1}:
            raise InputError(f"cp_comm_type={_words(self.cp_comm_type)} needs cp above 1, but cp=1; allow a larger cp")
        if self.sequence_parallel and self.tp and set(self.tp) == {1}:
            raise InputError("sequence_parallel needs tp above 1, but tp=1; allow a larger tp")
        if self.zero and self.pp and set(self.zero) == {"2"} and min(self.pp) > 1:
            raise InputError(f"zero=2 does not go with a pipeline, but pp={_words(self.pp)}; allow zero=1 or pp=1")
        if self.vpp and set(self.vpp) == {1} and set(self.schedule) == {"interleaved"}:
            raise InputError("schedule=interleaved needs vpp above 1, but vpp=1; allow more chunks or schedule=1f1b")

    def allows(self, name: str, value: object) -> bool:
        """Whether an axis may take a value."""
        allowed = getattr(self, name)
        return not allowed or value in allowed

    def given(self) -> dict[str, str]:
        """The constraints that restrict anything, in words."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words = _words(value) if isinstance(value, tuple) else str(value)
                found[field.name] = f"{value:g}" if isinstance(value, float) else words
        return found

    def without(self, name: str) -> Constraints:
        """The same with one of them given up."""
        default = next(field.default for field in fields(self) if field.name == name)
        return replace(self, **{name: default})  # type: ignore[arg-type]


def _words(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))
