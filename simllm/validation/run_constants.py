"""Constants that only whole training runs can teach: which figures they are, and predictions with other values of them.

The list is data, hardware_profiles/run_constants.yaml. A `Constants` holds values for all of them and gives stacks and
clusters that have these values in place of the figures of the profiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.hardware.figures import Figure
from simllm.hardware.profiles import load_profile_file, profiles_dir
from simllm.hardware.stack import Stack, load_stack
from simllm.kernels.profile import load_kernel_profile
from simllm.kernels.schema import read_kernels

__all__ = [
    "QUANTITIES",
    "Constants",
    "Quantity",
    "RunConstant",
    "RunConstants",
    "run_constants",
    "shipped_values",
    "write_values",
]


#: What of a run constants are fitted to: the two are apart, no constant changes both.
Quantity = Literal["step_time", "peak_memory"]
QUANTITIES: tuple[Quantity, ...] = ("step_time", "peak_memory")


class RunConstant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One constant, in the unit of its figures.

    Attributes
    ----------
    spread : float
        How far it usually lies from its prior, or from its parent: one standard deviation.
    low, high : float
        Between which it makes sense.
    figures : tuple of str
        ``folder/profile:key.path`` of every figure that holds it; none: only the parent of others.
    note : str
    prior : float, optional
        What is known of it before any run.
    parent : str, optional
        A constant that it resembles, in place of a prior.
    quantity : {"step_time", "peak_memory"}
        What of a run it is fitted to.
    """

    spread: float
    low: float
    high: float
    figures: tuple[str, ...]
    note: str
    prior: float | None = None
    parent: str | None = None
    quantity: Quantity = "step_time"

    def __post_init__(self) -> None:
        if (self.prior is None) == (self.parent is None):
            raise ValueError("give either a prior or a parent")
        if not self.low < self.high or self.spread <= 0:
            raise ValueError(f"low={self.low} must be below high={self.high}, and spread={self.spread} above zero")


class RunConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: constants by name, parents before their children."""

    kind: str
    constants: dict[str, RunConstant]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name, constant in self.constants.items():
            if constant.parent is not None and constant.parent not in seen:
                raise ValueError(f"the parent {constant.parent!r} of {name!r} must stand above it")
            seen.add(name)

    def prior(self, name: str) -> float:
        """What is known of a constant before any run, from its nearest ancestor with a prior."""
        constant = self.constants[name]
        if constant.prior is not None:
            return constant.prior
        assert constant.parent is not None
        return self.prior(constant.parent)


@lru_cache(maxsize=1)
def run_constants() -> RunConstants:
    """The constants of the catalog."""
    return load_profile_file(profiles_dir() / "run_constants.yaml", RunConstants)


def _place(figure: str) -> tuple[str, str, str]:
    """Folder, profile and key path of a figure."""
    match = re.fullmatch(r"(stacks|kernels)/([\w.-]+):(\w+)\.(\w+)", figure)
    if match is None:
        raise InputError(f"figure {figure!r} is not spelled stacks/NAME:section.key or kernels/NAME:section.key")
    return match[1], match[2], f"{match[3]}.{match[4]}"


@lru_cache(maxsize=256)
def _shipped(figure: str) -> Figure:
    folder, name, key = _place(figure)
    section, field = key.split(".")
    if folder == "stacks":
        found: Figure = getattr(getattr(load_stack(name), section), field)
        return found
    file = read_kernels(profiles_dir() / "kernels" / f"{name}.yaml")
    shares: Mapping[str, Figure] = getattr(file, section)
    return shares[field]


def shipped_values() -> dict[str, float]:
    """The values that the profiles ship with; constants without figures at their prior.

    Raises
    ------
    InputError
        Figures of one constant that differ.
    """
    catalog = run_constants().constants
    values: dict[str, float] = {}
    for name, constant in catalog.items():
        found = {figure: _shipped(figure).value for figure in constant.figures}
        if len(set(found.values())) > 1:
            raise InputError(f"the figures of {name} differ: {found}; write them with `simllm calibrate runs`")
        values[name] = next(iter(found.values()), run_constants().prior(name))
    return values


@dataclass(frozen=True)
class Constants:
    """Values for all run constants, in the units of their figures.

    Attributes
    ----------
    values : mapping of str to float
    used : set of str
        Names of the constants that anything asked for so far depends on.
    """

    values: Mapping[str, float]
    used: set[str] = field(default_factory=set)

    def _by_profile(self, folder: str, name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for constant, value in self.values.items():
            for figure in run_constants().constants[constant].figures:
                place = _place(figure)
                if place[:2] == (folder, name):
                    found[place[2]] = value
                    self.used.add(constant)
        return found

    def load_stack(self, name: str) -> Stack:
        """A stack of the catalog with these values."""
        stack = load_stack(name)
        for key, value in self._by_profile("stacks", name).items():
            section, field = key.split(".")
            part = getattr(stack, section)
            figure = msgspec.structs.replace(getattr(part, field), value=value)
            stack = msgspec.structs.replace(stack, **{section: msgspec.structs.replace(part, **{field: figure})})
        return stack

    def cluster(self, cluster: Cluster) -> Cluster:
        """The cluster with devices whose long runs have these values."""
        card = cluster.accelerator
        profile = load_kernel_profile(card.name, card.vendor)
        shares = {}
        for precision, file in profile.sustained_from.items():
            value = self._by_profile("kernels", file).get(f"sustained_fraction.{precision}")
            if value is not None:
                shares[precision] = value
        return replace(cluster, accelerator=replace(card, sustained=tuple(sorted(shares.items()))))


def write_values(values: Mapping[str, float], digits: int = 3) -> list[Path]:
    """Write values into the figures of the profiles; everything else in the files stays as it is.

    Parameters
    ----------
    values : mapping of str to float
    digits : int
        Significant ones to write.

    Returns
    -------
    list of Path
        The files written.
    """
    texts: dict[Path, str] = {}
    for name, value in values.items():
        for figure in run_constants().constants[name].figures:
            folder, profile, key = _place(figure)
            path = profiles_dir() / folder / f"{profile}.yaml"
            text = texts.get(path) or path.read_text(encoding="utf-8")
            texts[path] = _with_value(text, key, float(f"{value:.{digits}g}"), path)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _with_value(text: str, key: str, value: float, path: Path) -> str:
    section, field = key.split(".")
    pattern = rf"(^{section}:\n(?:[ \t]+.*\n)*?[ \t]+{field}:\s*(?:\{{|\n[ \t]+)value: )[-+.\de]+"
    written, times = re.subn(pattern, rf"\g<1>{value:g}", text, count=1, flags=re.MULTILINE)
    if not times:
        raise InputError(f"{path}: no figure {key} to write")
    return written
