"""What stands in the YAML files of ``hardware_profiles/kernels/``, checked when read.

Every number carries its unit; source and basis stand beside the number or, for the numbers of one fitted curve, once
for the curve.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from simllm.errors import InputError
from simllm.hardware.figures import Basis, Figure
from simllm.hardware.profiles import load_profile, load_profile_file, register_kind
from simllm.units import UNITS, to_si

__all__ = [
    "AttentionDirections",
    "AttentionEntry",
    "FitParameter",
    "FormFile",
    "Fraction",
    "KernelFile",
    "MatmulEntry",
    "Precision",
    "Quantity",
    "Residual",
    "Seconds",
    "read_form",
    "read_kernels",
]


class _Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of everything read from YAML: frozen, named arguments, unknown keys refused."""


class Fraction(Figure, frozen=True):
    """A share of a peak; of a long run against a short one it may pass 1."""

    dimension = "fraction"


class Seconds(Figure, frozen=True):
    """A duration."""

    dimension = "time"


class Quantity(_Data, frozen=True, kw_only=True):
    """A number with its unit, one of several that share a source and a basis."""

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}; known: {', '.join(UNITS)}")
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"value {self.value} must be zero or above")

    def si(self, dimension: str) -> float:
        """The value in SI units, refused if the unit measures something else."""
        found = UNITS[self.unit][0]
        if found != dimension:
            raise ValueError(f"unit {self.unit!r} measures {found}, but {dimension} is wanted")
        return float(to_si(self.value, self.unit))


class Residual(_Data, frozen=True, kw_only=True):
    """How well a fit holds: |predicted / measured - 1| over the rows scored.

    ``held_out`` is the same with the scored shapes left out of the fit (5 folds by shape).
    """

    rows: int
    scored: int
    rule: str
    median: float
    p90: float
    held_out_median: float | None = None
    held_out_p90: float | None = None


class MatmulEntry(_Data, frozen=True, kw_only=True):
    """The curve of dense matmuls in one precision; see `simllm.kernels.matmul` for the formula.

    ``harness`` is what a benchmark that reads the host's clock adds to each call: part of the measured time of such
    rows, not of the kernel's cost.
    """

    rate: Quantity
    wave: Quantity
    overhead_k: Quantity
    memory: Quantity
    droop: Quantity
    launch: Quantity
    quantise_bytes: Quantity | None = None
    quantise_launch: Quantity | None = None
    harness: Quantity | None = None
    basis: Basis
    source: str
    note: str = ""
    libraries: list[str] = msgspec.field(default_factory=list)
    residual: Residual | None = None

    def __post_init__(self) -> None:
        for name, dimension, low, high in (
            ("rate", "fraction", 0.01, 1.0),
            ("wave", "fraction", 0.0, 1.0),
            ("overhead_k", "count", 0.0, math.inf),
            ("memory", "fraction", 0.01, 1.0),
            ("droop", "fraction", 0.0, 1.0),
            ("launch", "time", 0.0, 1.0),
            ("quantise_bytes", "bytes", 0.0, math.inf),
            ("quantise_launch", "time", 0.0, 1.0),
            ("harness", "time", 0.0, 1.0),
        ):
            quantity: Quantity | None = getattr(self, name)
            if quantity is not None and not low <= quantity.si(dimension) <= high:
                raise ValueError(f"{name}={quantity.value} {quantity.unit} must lie between {low:g} and {high:g}")


class AttentionEntry(_Data, frozen=True, kw_only=True):
    """Fused attention in one direction; see `simllm.kernels.attention` for the formula.

    ``rate`` is the share of the peak (of 16-bit formats, or of those that ``precisions`` names) by head size (mean of
    query and value head size) on long sequences without a mask; ``masked`` is what is left of it under a mask that
    keeps half.
    ``harness`` is what the benchmark behind the rows adds to each call (host time, a key-value cache kernel's launch):
    part of the measured time, not of the kernel's cost.
    """

    rate: dict[int, float]
    overhead_tokens: Quantity
    tail_tiles: Quantity
    masked: Quantity
    tile_rows: Quantity
    launch: Quantity
    harness: Quantity | None = None
    precisions: tuple[str, ...] = ("bf16", "fp16")
    basis: Basis
    source: str
    note: str = ""
    libraries: list[str] = msgspec.field(default_factory=list)
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if not self.rate:
            raise ValueError("rate needs at least one head size")
        # Time per score must grow with the head size, or a wider head would be cheaper.
        costs = [size / rate if 0 < rate <= 1 else math.nan for size, rate in sorted(self.rate.items())]
        if any(math.isnan(cost) for cost in costs) or min(self.rate) < 1:
            raise ValueError(f"rate {self.rate} must map head sizes above 0 to fractions above 0 and up to 1")
        # A thousandth is what rounding may cost; pricing takes the running maximum.
        if any(wide < 0.999 * narrow for narrow, wide in pairwise(costs)):
            raise ValueError(f"rate {self.rate} makes a wider head cheaper: head size / rate must not fall")
        for name, dimension, low, high in (
            ("overhead_tokens", "count", 0.0, math.inf),
            ("tail_tiles", "count", 0.0, 10.0),
            ("masked", "fraction", 0.76, 1.0),  # below 0.75 a lighter mask could cost more
            ("tile_rows", "count", 1.0, 1024.0),
            ("launch", "time", 0.0, 1.0),
            ("harness", "time", 0.0, 1.0),
        ):
            quantity: Quantity | None = getattr(self, name)
            if quantity is not None and not low <= quantity.si(dimension) <= high:
                raise ValueError(f"{name}={quantity.value} {quantity.unit} must lie between {low:g} and {high:g}")


class AttentionDirections(_Data, frozen=True, kw_only=True):
    """Both directions of one implementation; a file that borrows may give one of them."""

    forward: AttentionEntry | None = None
    backward: AttentionEntry | None = None


class KernelFile(_Data, frozen=True, kw_only=True):
    """One file of ``hardware_profiles/kernels/``.

    Attributes
    ----------
    borrows : str or None
        File whose entries stand in for those that this one does not hold.
    applies_to, vendors : list of str
        Of a class default: prefixes of accelerator names and vendors it stands in for.
    measured_as : list of str
        What tables of measurements call this accelerator.
    fitted_against : mapping of str to Quantity
        Peaks, bandwidth and compute units that the fitted fractions are of.
    stream_efficiency : mapping of str to Fraction
        What kernels of one kind reach of the memory bandwidth where that was measured, by operator and direction
        (``norm forward``, ``optimizer``); all others reach ``memory_efficiency``.
    stream_residual : mapping of str to Residual
        How well these hold, by the same names.
    """

    kind: Literal["kernels"]
    name: str
    note: str = ""
    borrows: str | None = None
    applies_to: list[str] = msgspec.field(default_factory=list)
    vendors: list[str] = msgspec.field(default_factory=list)
    measured_as: list[str] = msgspec.field(default_factory=list)
    fitted_against: dict[str, Quantity] = msgspec.field(default_factory=dict)
    memory_efficiency: Fraction | None = None
    launch: Seconds | None = None
    stream_efficiency: dict[str, Fraction] = msgspec.field(default_factory=dict)
    stream_residual: dict[str, Residual] = msgspec.field(default_factory=dict)
    sustained_fraction: dict[str, Fraction] = msgspec.field(default_factory=dict)
    matmul: dict[str, MatmulEntry] = msgspec.field(default_factory=dict)
    default_attention: str | None = None
    attention: dict[str, AttentionDirections] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for precision, figure in self.sustained_fraction.items():
            if not 0.1 <= figure.si <= 1.5:
                raise ValueError(f"sustained_fraction of {precision} is {figure.value}; give one between 0.1 and 1.5")


class MatmulForm(_Data, frozen=True, kw_only=True):
    """The matmul formula's common constants."""

    tiles: list[tuple[int, int, float]]
    splits: list[int]
    split_traffic: Quantity
    join_exponent: float
    droop_start: Quantity
    droop_decades: float
    basis: Basis
    source: str
    note: str = ""


class Precision(_Data, frozen=True, kw_only=True):
    """A number format: which peak it runs at, whose curve stands in, bytes per operand and result element."""

    peak: str
    curves: list[str]
    element: Quantity
    output: Quantity
    cast: Quantity | None = None


class AttentionForm(_Data, frozen=True, kw_only=True):
    """The fused attention formula's common constants."""

    join_exponent: float
    backward_work: float
    head_dim_padding: list[tuple[int, int]]
    basis: Basis
    source: str
    note: str = ""


class UnfusedForm(_Data, frozen=True, kw_only=True):
    """Traffic of unfused attention beside its matmuls."""

    score_bytes_forward: Quantity
    score_bytes_backward: Quantity
    eager_bytes_forward: Quantity
    eager_bytes_mask: Quantity
    eager_bytes_backward: Quantity
    basis: Basis
    source: str
    note: str = ""


class FitParameter(_Data, frozen=True, kw_only=True):
    """How one parameter of a curve is fitted: bounds, and a weak pull towards a usual value."""

    unit: str
    low: float
    high: float
    usual: float
    width: float


class FitForm(_Data, frozen=True, kw_only=True):
    """Settings of the fit of kernel curves."""

    matmul: dict[str, FitParameter]
    attention: dict[str, FitParameter]
    pull: float
    soft_l1: float
    small_weight: float
    few_rows: int
    folds: int
    peak_share: float
    note: str


class FormFile(_Data, frozen=True, kw_only=True):
    """``form.yaml``: the shape of the formulas, common to all devices."""

    kind: Literal["kernel-form"]
    name: str
    matmul: MatmulForm
    precisions: dict[str, Precision]
    precisions_note: str
    attention: AttentionForm
    unfused: UnfusedForm
    libraries: dict[str, list[str]]
    harness_libraries: list[str]
    sustained_libraries: list[str]
    quantising_libraries: list[str]
    fit: FitForm


def read_kernels(path: Path) -> KernelFile:
    """One device or default file, checked.

    Raises
    ------
    InputError
        For what `simllm.hardware.profiles.load_profile` refuses, or a name that is not the file's.
    """
    found = load_profile_file(path, KernelFile)
    if found.name != path.stem:
        raise InputError(f"{path}: name is {found.name!r}; it must be the file's name, {path.stem!r}")
    return found


def read_form(path: Path) -> FormFile:
    """``form.yaml``, checked."""
    return load_profile_file(path, FormFile)


def _check(shape: type[msgspec.Struct]) -> Any:
    def checker(path: Path, data: dict[str, Any]) -> list[str]:
        load_profile(data, shape, str(path))
        return []

    return checker


register_kind("kernels", _check(KernelFile))
register_kind("kernel-form", _check(FormFile))
