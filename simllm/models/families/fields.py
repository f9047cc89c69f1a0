"""Field tables: which key of a ``config.json`` means what, how it is checked, and what its absence means.

A table maps a meaning (Hugging Face's usual name) to a `Field`: the spellings under which the key occurs in that
family, its kind, and the default of the family's config class in transformers. `Values` reads one config through one
table, checks everything at once, and afterwards gives typed values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from simllm.errors import InputError, UnsupportedError

__all__ = [
    "REQUIRED",
    "Field",
    "Table",
    "Values",
    "auto",
    "context",
    "count",
    "experts",
    "flag",
    "integers",
    "layers",
    "lookup",
    "pattern",
    "probability",
    "short",
    "size",
    "text",
    "texts",
    "vocabulary",
]

Kind = Literal[
    "size",
    "count",
    "layers",
    "vocabulary",
    "context",
    "experts",
    "auto",
    "flag",
    "probability",
    "text",
    "list",
    "pattern",
]

#: Marks a field without which the model is not described.
REQUIRED: Final = object()

#: The largest value of each kind of whole number: far above any model, low enough to refuse a slip of the keyboard.
_LIMITS: Mapping[str, int] = {
    "size": 2**24,
    "count": 2**24,
    "layers": 10_000,
    "vocabulary": 2**27,
    "context": 2**31,
    "experts": 2**17,
    "auto": 2**24,
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a family.

    Attributes
    ----------
    names : tuple of str
        Spellings, the first one given counts; ``a.b`` is key ``b`` of the object ``a``.
    default : object
        What a missing key means: the default of transformers' config class, or `REQUIRED`.
    optional : bool
        JSON ``null`` means "none" and is kept; otherwise ``null`` means the default.
    """

    names: tuple[str, ...]
    kind: Kind
    default: Any = REQUIRED
    optional: bool = False
    items: type = str


Table = dict[str, Field]


def _number(kind: Kind) -> Callable[..., Field]:
    def make(*names: str, default: Any = REQUIRED, optional: bool = False) -> Field:
        return Field(names=names, kind=kind, default=default, optional=optional or default is None)

    return make


size = _number("size")
count = _number("count")
layers = _number("layers")
vocabulary = _number("vocabulary")
experts = _number("experts")
auto = _number("auto")
probability = _number("probability")
flag = _number("flag")
text = _number("text")


def context(*names: str, default: int | None = None) -> Field:
    """A context length: absent or null means that the config does not say it."""
    return Field(names=names, kind="context", default=default, optional=True)


def texts(*names: str) -> Field:
    """A list of words, one per layer, or absent."""
    return Field(names=names, kind="list", default=None, optional=True, items=str)


def integers(*names: str, default: tuple[int, ...] | None = None) -> Field:
    """A list of whole numbers, or absent."""
    return Field(names=names, kind="list", default=default, optional=True, items=int)


def pattern(*names: str) -> Field:
    """A list of ``[kinds, repetitions]``, written out to one kind per layer, or absent (GPT-Neo)."""
    return Field(names=names, kind="pattern", default=None, optional=True)


def lookup(config: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Whether ``config`` has ``name`` (``a.b`` looks inside the object ``a``), and its value.

    Examples
    --------
    >>> lookup({"attn_config": {"kv_n_heads": 8}}, "attn_config.kv_n_heads")
    (True, 8)
    >>> lookup({"attn_config": None}, "attn_config.kv_n_heads")
    (False, None)
    """
    node: Any = config
    for key in name.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return False, None
        node = node[key]
    return True, node


def short(value: object) -> str:
    """A value as messages show it, cut to one line.

    Examples
    --------
    >>> short("4096")
    "'4096'"
    >>> short(list(range(100)))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16...'
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _written_out(value: Any) -> tuple[str, ...] | None:
    """``[[["global", "local"], 2]]`` as ``("global", "local", "global", "local")``; None: not of that form."""
    kinds: list[str] = []
    if not isinstance(value, list | tuple):
        return None
    for item in value:
        match item:
            case [list() | tuple() as names, int() as times] if all(isinstance(name, str) for name in names):
                if not 0 <= times <= _LIMITS["layers"]:
                    return None
                kinds.extend(tuple(names) * times)
            case _:
                return None
    return tuple(kinds)


class Values:
    """The fields of one config, checked, under the meanings of a table.

    Parameters
    ----------
    config : mapping
        The parsed ``config.json``.
    table : Table
    where : str
        The model and family, as error messages name them.

    Raises
    ------
    InputError
        A needed field is missing, or a value has the wrong type or is out of range.
    """

    def __init__(self, config: Mapping[str, Any], table: Table, where: str) -> None:
        self.where = where
        self._values: dict[str, Any] = {}
        self._spelled: dict[str, str] = {}
        for meaning, field in table.items():
            self._values[meaning] = self._read(config, meaning, field)

    def _read(self, config: Mapping[str, Any], meaning: str, field: Field) -> Any:
        for name in field.names:
            self._parents(config, name)
        given = [(name, value) for name in field.names for found, value in [lookup(config, name)] if found]
        self._spelled[meaning] = given[0][0] if given else field.names[0]
        for name, value in given:
            if value is not None:
                checked = self._check(name, value, field)
                self._same(name, value, given, field)
                self._spelled[meaning] = name
                return checked
        if given and field.optional:
            return None
        if field.default is REQUIRED:
            state = "is null" if given else "is missing"
            spellings = " (or ".join(field.names) + ")" * (len(field.names) - 1)
            raise self.error(f"the needed field {spellings} {state}; {_EXPECTED[field.kind]}")
        return field.default

    def _parents(self, config: Mapping[str, Any], name: str) -> None:
        """The objects around a nested key must be objects, or its default would be taken unsaid."""
        parent, dot, _ = name.rpartition(".")
        if dot:
            self._parents(config, parent)
            found, value = lookup(config, parent)
            if found and value is not None and not isinstance(value, Mapping):
                raise self.error(f"{parent}={short(value)} cannot be used; expected an object")

    def _same(self, name: str, value: Any, given: list[tuple[str, Any]], field: Field) -> None:
        """Two spellings of one field must agree, else nobody can say which one holds."""
        if field.kind in ("context", "text"):
            return
        for other, second in given:
            if second is not None and second != value:
                raise self.error(
                    f"{name}={short(value)} and {other}={short(second)} mean the same field; remove one of them"
                )

    def _check(self, name: str, value: Any, field: Field) -> Any:
        kind = field.kind
        if kind == "auto" and value == "auto":
            return None
        if kind == "flag":
            if isinstance(value, bool):
                return value
        elif kind == "text":
            if isinstance(value, str) and value:
                return value
        elif kind == "probability":
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
                return float(value)
        elif kind == "pattern":
            written = _written_out(value)
            if written is not None:
                return written
        elif kind == "list":
            if isinstance(value, list | tuple) and all(type(item) is field.items for item in value):
                return tuple(value)
        elif type(value) is int or (isinstance(value, float) and math.isfinite(value) and value.is_integer()):
            lowest = 0 if kind == "count" else 1
            if lowest <= value <= _LIMITS[kind]:
                return int(value)
            raise self.error(f"{name}={short(value)} is out of range; {_EXPECTED[kind]}")
        raise self.error(f"{name}={short(value)} cannot be used; {_EXPECTED[kind]}")

    # -- what the families use ---------------------------------------------------------------------------------

    def integer(self, meaning: str) -> int:
        """A whole number that the model cannot do without."""
        value = self._values[meaning]
        if value is None:
            raise self.error(f"the needed field {self._spelled[meaning]} is null")
        assert isinstance(value, int)
        return value

    def maybe(self, meaning: str) -> int | None:
        """A whole number, or None; also when the family has no such field."""
        value = self._values.get(meaning)
        assert value is None or isinstance(value, int)
        return value

    def flag(self, meaning: str) -> bool:
        """A switch; off when the family has no such field."""
        return bool(self._values.get(meaning))

    def given(self, meaning: str, default: bool) -> bool:
        """A switch, or ``default`` when the config leaves it open."""
        value = self._values.get(meaning)
        return default if value is None else bool(value)

    def number(self, meaning: str) -> float:
        """A probability; 0 when the family has no such field."""
        return float(self._values.get(meaning) or 0.0)

    def text(self, meaning: str) -> str:
        """A word."""
        return str(self._values[meaning])

    def tuple_of_text(self, meaning: str) -> tuple[str, ...] | None:
        """A list of words, or None; also when the family has no such field."""
        value: tuple[str, ...] | None = self._values.get(meaning)
        return value

    def tuple_of_int(self, meaning: str) -> tuple[int, ...] | None:
        """A list of whole numbers, or None; also when the family has no such field."""
        value: tuple[int, ...] | None = self._values.get(meaning)
        return value

    def spelled(self, meaning: str) -> str:
        """The key under which the config gives a field."""
        return self._spelled.get(meaning, meaning)

    def error(self, message: str) -> InputError:
        """An error that names the model and its family."""
        return InputError(f"{self.where}: {message}")

    def unsupported(self, message: str) -> UnsupportedError:
        """An error for what is understood but not modelled."""
        return UnsupportedError(f"{self.where}: {message}")


_EXPECTED: Mapping[Kind, str] = {
    "size": f"expected a whole number from 1 to {_LIMITS['size']}",
    "count": f"expected a whole number from 0 to {_LIMITS['count']}",
    "layers": f"expected a whole number from 1 to {_LIMITS['layers']}",
    "vocabulary": f"expected a whole number from 1 to {_LIMITS['vocabulary']}",
    "context": f"expected a whole number from 1 to {_LIMITS['context']}",
    "experts": f"expected a whole number from 1 to {_LIMITS['experts']}",
    "auto": f'expected a whole number from 1 to {_LIMITS["auto"]}, or "auto"',
    "flag": "expected true or false",
    "probability": "expected a number from 0 up to but not including 1",
    "text": "expected a word",
    "list": "expected a list with one item per layer",
    "pattern": 'expected a list of kinds and repetitions such as [[["global", "local"], 12]]',
}
