"""The axes of a sweep, and the cells that they span."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simllm.errors import InputError, unknown_name
from simllm.parallel.plan import PRECISIONS, Plan
from simllm.planner import OBJECTIVES
from simllm.units import parse_count, parse_seq_len

__all__ = ["AXES", "Sweep", "read_sweep"]

_LARGEST_BYTES = 2**20
_MOST_CELLS = 1_000_000


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{name}: {value!r} must be a name")
    return value


def _number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{name}: {value!r} must be a whole number")
    return parse_count(value, name)


def _length(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{name}: {value!r} must be a number of tokens")
    return parse_seq_len(value, name)


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}: {value!r} must be a number")
    return float(value)


def _one_of(*known: str) -> Callable[[Any, str], str]:
    def read(value: Any, name: str) -> str:
        if value not in known:
            raise unknown_name(name, str(value), known)
        return str(value)

    return read


#: Axes in the order in which cells vary, the first slowest: key of the file -> (name in a cell, reader, default).
AXES: Mapping[str, tuple[str, Callable[[Any, str], Any], Any]] = {
    "models": ("model", _word, None),
    "clusters": ("cluster", _word, None),
    "gpus": ("gpus", _number, None),
    "seq_len": ("seq_len", _length, None),
    "global_batch_size": ("global_batch_size", _number, None),
    "stack": ("stack", _word, "megatron-core"),
    "precision": ("precision", _one_of(*PRECISIONS), "bf16"),
    "optimizer": ("optimizer", _word, "adam"),
    "memory_headroom": ("memory_headroom", _share, 0.05),
    "objective": ("objective", _one_of(*OBJECTIVES), "time"),
}

#: What a plan of the file may set; the rest follows from the axes.
_PLAN_KEYS = tuple(field.name for field in fields(Plan) if field.name not in ("global_batch_size", "precision"))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The cells of a sweep in order.

    Attributes
    ----------
    cells : tuple of dict
        What is asked in each: a value on every axis, and ``plan`` where plans are given instead of searched.
    """

    cells: tuple[dict[str, Any], ...]

    @property
    def fingerprint(self) -> str:
        """What an unfinished sweep is recognised by: its questions and the version that answers them."""
        from simllm import __version__

        content = json.dumps([__version__, self.cells], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def read_sweep(source: str | Path | Mapping[str, Any]) -> Sweep:
    """The cells that a YAML file, or the same as a mapping, asks for.

    Parameters
    ----------
    source : path or mapping
        Keys are axes, values one entry or a list: ``models``, ``clusters``, ``gpus``, ``seq_len``,
        ``global_batch_size``, and optionally ``stack``, ``precision``, ``optimizer``, ``memory_headroom``,
        ``objective``. With ``plans``, a list of mappings, those plans are estimated; without, the best is searched.

    Raises
    ------
    InputError
        A key or value is mistyped or missing; nothing has been computed then.

    Examples
    --------
    >>> axes = {"models": "llama-3-8b", "clusters": "dgx-h100", "gpus": [8, 16], "seq_len": ["4k", "8k"],
    ...         "global_batch_size": 64}
    >>> [(cell["gpus"], cell["seq_len"]) for cell in read_sweep(axes).cells]
    [(8, 4096), (8, 8192), (16, 4096), (16, 8192)]
    """
    where = "" if isinstance(source, Mapping) else f"{source}: "
    document = source if isinstance(source, Mapping) else _load(Path(source))
    try:
        return _sweep(document)
    except InputError as error:
        raise type(error)(f"{where}{error}") from None


def _load(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputError(f"{path} is larger than any list of axes")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} must be a mapping of axes, such as models: [llama-3-8b]")
    return document


def _sweep(document: Mapping[str, Any]) -> Sweep:
    for key in document:
        if key not in AXES and key != "plans":
            raise unknown_name("key", str(key), (*AXES, "plans"))
    if "plans" in document and "objective" in document:
        raise InputError("objective is for searching plans, but plans are given; leave one of them out")
    axes: dict[str, list[Any]] = {}
    for key, (name, reader, default) in AXES.items():
        if key not in document and default is None:
            raise InputError(f"{key} is missing; give one value or a list")
        given = document.get(key, default)
        values = given if isinstance(given, list) else [given]
        if not values:
            raise InputError(f"{key} is an empty list; give at least one value")
        axes[name] = [reader(value, key) for value in values]
        if len(set(axes[name])) < len(values):
            raise InputError(f"{key} has a value twice: {', '.join(map(str, values))}")
    if "plans" in document:
        axes["plan"] = _plans(document["plans"])
        del axes["objective"]
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > _MOST_CELLS:
        raise InputError(f"{size} cells are more than the {_MOST_CELLS} that a sweep may have; use several files")
    _check_names(axes)
    return Sweep(cells=tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())))


def _plans(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InputError("plans must be a list of mappings, such as - {tp: 8, pp: 4}")
    defaults = Plan()
    for number, plan in enumerate(given, start=1):
        if not isinstance(plan, dict):
            raise InputError(f"plan {number}: {plan!r} must be a mapping, such as {{tp: 8, pp: 4}}")
        for key, value in plan.items():
            if key in ("global_batch_size", "precision"):
                raise InputError(f"plan {number}: {key} is an axis; give it beside plans")
            if key not in _PLAN_KEYS:
                raise unknown_name(f"key of plan {number}", str(key), _PLAN_KEYS)
            expected = str if key in ("recompute", "zero") else type(getattr(defaults, key))
            if expected is str and isinstance(value, int) and not isinstance(value, bool):
                plan[key] = value = str(value)
            if getattr(defaults, key) is not None and type(value) is not expected:
                raise InputError(f"plan {number}: {key}={value!r} must be of the kind of {getattr(defaults, key)!r}")
    return given


def _check_names(axes: Mapping[str, list[Any]]) -> None:
    """Refuse what no cell could be answered with, before any is."""
    from simllm.hardware import load_cluster
    from simllm.models import Model
    from simllm.training import Training

    for model in axes["model"]:
        Model.load(model)
    for cluster in axes["cluster"]:
        refusals = []
        for gpus in axes["gpus"]:
            try:
                load_cluster(cluster, gpus)
            except InputError as error:
                refusals.append(error)
        if len(refusals) == len(axes["gpus"]):
            raise refusals[0]
    for seq_len, stack, optimizer, headroom in itertools.product(
        axes["seq_len"], axes["stack"], axes["optimizer"], axes["memory_headroom"]
    ):
        Training(seq_len=seq_len, stack=stack, optimizer=optimizer, memory_headroom=headroom)
