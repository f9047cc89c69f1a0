"""Figures: one physical constant each, with its unit, its source and what it rests on.

A profile names the class of each of its figures, and the class knows the dimension, so a bandwidth given in GB is
refused where it is read, with the key path in the message.
"""

from __future__ import annotations

import math
import re
import reprlib
import types
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import msgspec

from simllm.units import UNITS, to_si

__all__ = [
    "Basis",
    "Bytes",
    "BytesPerSecond",
    "Count",
    "DollarsPerHour",
    "Figure",
    "FlopsPerSecond",
    "OpsPerSecond",
    "Ratio",
    "Watts",
    "explain",
]

Basis = Literal["measured", "vendor", "derived", "fitted", "assumed"]


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One physical constant as printed, with where it comes from.

    Attributes
    ----------
    value : int or float
        The number as the source prints it.
    unit : str
        Its unit, one of `simllm.units.UNITS`.
    source : str
        Publication, repository or page the number was read in.
    basis : str
        ``measured`` by someone who says how; printed by the ``vendor`` or operator; ``derived`` from other figures;
        ``fitted`` to whole training runs, by the constants of hardware_profiles/run_constants.yaml; ``assumed``, with
        the reason in the note.
    note : str or None
        What a reader must know to use the number.

    Subclasses fix the dimension and the allowed range, and are what profiles are made of.

    Examples
    --------
    >>> BytesPerSecond(value=400, unit="Gbps", source="ConnectX-7 datasheet", basis="vendor").si
    50000000000.0
    >>> BytesPerSecond(value=400, unit="GB", source="ConnectX-7 datasheet", basis="vendor")
    Traceback (most recent call last):
        ...
    ValueError: unit 'GB' measures bytes, but bytes/s is wanted; use B/s, MB/s, GB/s, TB/s, Gbps or Tbps
    """

    value: int | float
    unit: str
    source: str
    basis: Basis
    note: str | None = None

    #: What the figure measures; None accepts any known unit.
    dimension: ClassVar[str | None] = None
    #: The smallest value that makes sense (in SI); None means above zero.
    minimum: ClassVar[float | None] = None
    #: The largest (in SI); None means no limit.
    maximum: ClassVar[float | None] = None
    #: Whether only whole numbers make sense.
    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        wanted = self.dimension
        known = [unit for unit, (dimension, _) in UNITS.items() if wanted in (None, dimension)]
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}; use {_either(known)}")
        if self.unit not in known:
            measured = UNITS[self.unit][0]
            raise ValueError(f"unit {self.unit!r} measures {measured}, but {wanted} is wanted; use {_either(known)}")
        if not math.isfinite(self.value):
            raise ValueError(f"value {self.value} is not a finite number")
        if self.minimum is None and self.value <= 0:
            raise ValueError(f"value {self.value} must be above zero")
        if self.minimum is not None and self.si < self.minimum:
            raise ValueError(f"value {self.value} {self.unit} must be at least {self.minimum:g}")
        if self.maximum is not None and self.si > self.maximum:
            raise ValueError(f"value {self.value} {self.unit} must be at most {self.maximum:g}")
        if self.whole and self.value != int(self.value):
            raise ValueError(f"value {self.value} must be a whole number")
        if not self.source.strip():
            raise ValueError("source is empty; say where the number was read, or why it is assumed")

    @property
    def si(self) -> float:
        """The value in SI units."""
        return float(to_si(self.value, self.unit))


class Bytes(Figure, frozen=True):
    """A capacity."""

    dimension = "bytes"


class BytesPerSecond(Figure, frozen=True):
    """A bandwidth; of a link: in each direction."""

    dimension = "bytes/s"


class FlopsPerSecond(Figure, frozen=True):
    """A floating-point rate."""

    dimension = "flop/s"


class OpsPerSecond(Figure, frozen=True):
    """An integer rate."""

    dimension = "op/s"


class Count(Figure, frozen=True):
    """A number of things, one at least."""

    dimension = "count"
    whole = True


class Ratio(Figure, frozen=True):
    """What enters over what leaves, one at least."""

    dimension = "ratio"
    minimum = 1.0


class Watts(Figure, frozen=True):
    """A power."""

    dimension = "power"


class DollarsPerHour(Figure, frozen=True):
    """A price for renting, with the date (year, or year and month) that it was read."""

    dimension = "money/time"

    date: Annotated[str, msgspec.Meta(pattern=r"^20\d\d(-(0[1-9]|1[0-2]))?$")] | None = None


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def explain(error: msgspec.ValidationError, data: Any, shape: Any) -> str:
    """A validation error in words: the key path, what was given, what is allowed."""
    message, _, place = str(error).partition(" - at `$")
    path = [token for token in re.split(r"[.\[\]`]+", place) if token]
    here = ".".join(path)
    given, allowed = data, shape
    for token in path:
        given = _item(given, token)
        allowed = _member(allowed, token, data)
    fields = _fields(allowed, given)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", message):
        needed = ", ".join(key for key, required in fields.items() if required)
        return f"{_at(here)}the key `{missing[1]}` is missing; needed: {needed}"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", message):
        near = get_close_matches(unknown[1], fields, n=1)
        meant = f"did you mean `{near[0]}`? " if near else ""
        return f"{_at(here)}unknown key `{unknown[1]}`; {meant}allowed: {', '.join(fields)}"
    if message.startswith("Invalid") and get_origin(allowed) is Literal:
        return f"{_at(here)}{reprlib.repr(given)} is not allowed; use {_either([str(c) for c in get_args(allowed)])}"
    if message.startswith("Invalid value"):  # the tag that tells the members of a union apart
        tags = [str(member.__struct_config__.tag) for member in get_args(shape)]
        return f"{_at(here)}{reprlib.repr(given)} is not allowed; use {_either(tags)}"
    if message.startswith("Expected"):
        wanted = message[0].lower() + message[1:].replace("`object", "`mapping").replace("`array", "`list")
        return f"{_at(here)}{wanted} ({reprlib.repr(given)})"
    return f"{_at(here)}{message}"


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _item(data: Any, token: str) -> Any:
    if isinstance(data, dict):
        return data.get(token)
    if isinstance(data, list) and token.isdigit() and int(token) < len(data):
        return data[int(token)]
    return None


def _structs(shape: Any) -> list[Any]:
    members = get_args(shape) if get_origin(shape) in (Union, types.UnionType) else (shape,)
    return [member for member in members if isinstance(member, type) and issubclass(member, msgspec.Struct)]


def _struct(shape: Any, data: Any) -> Any:
    """The struct meant by `data`, where `shape` may be a union told apart by a tag."""
    candidates = _structs(shape)
    for struct in candidates:
        config = struct.__struct_config__
        if config.tag_field and isinstance(data, dict) and data.get(config.tag_field) == config.tag:
            return struct
    return candidates[0] if candidates else None


def _member(shape: Any, token: str, data: Any) -> Any:
    struct = _struct(shape, data)
    if struct is not None:
        return next((field.type for field in msgspec.structs.fields(struct) if field.encode_name == token), None)
    arguments = [argument for argument in get_args(shape) if argument is not Ellipsis]
    return arguments[-1] if arguments else None


def _fields(shape: Any, data: Any) -> dict[str, bool]:
    """The keys a mapping may have, and whether each is needed."""
    struct = _struct(shape, data)
    if struct is None:
        return {}
    tag = {struct.__struct_config__.tag_field: True} if struct.__struct_config__.tag_field else {}
    return tag | {field.encode_name: field.required for field in msgspec.structs.fields(struct)}
