"""Quantities as people write them, and as simllm prints them.

Inside simllm every quantity is a plain number in SI units (seconds, bytes, FLOP, bytes/s). A person may write
``8k``, ``15T``, ``256MB`` or ``400Gbps``. ``MB`` is 10**6 bytes and ``MiB`` is 2**20 bytes, always; ``8k`` as a
sequence length is 8192 (see `parse_count`), because that is what people mean by it.
"""

from __future__ import annotations

import math
import re

from simllm.errors import InputError

__all__ = [
    "UNITS",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_rate",
    "format_si",
    "parse_bytes",
    "parse_count",
    "parse_positive",
    "parse_seq_len",
    "to_si",
]

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

#: Every unit a profile may use: the dimension it measures and its value in SI.
UNITS: dict[str, tuple[str, float]] = {
    "count": ("count", 1),
    "fraction": ("fraction", 1),
    "ratio": ("ratio", 1),
    "s": ("time", 1),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
    "min": ("time", 60),
    "h": ("time", 3600),
    "B": ("bytes", 1),
    "kB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "TB": ("bytes", 1e12),
    "KiB": ("bytes", 2**10),
    "MiB": ("bytes", 2**20),
    "GiB": ("bytes", 2**30),
    "TiB": ("bytes", 2**40),
    "B/s": ("bytes/s", 1),
    "MB/s": ("bytes/s", 1e6),
    "GB/s": ("bytes/s", 1e9),
    "TB/s": ("bytes/s", 1e12),
    "Gbps": ("bytes/s", 1e9 / 8),
    "Tbps": ("bytes/s", 1e12 / 8),
    "FLOP/s": ("flop/s", 1),
    "GFLOP/s": ("flop/s", 1e9),
    "TFLOP/s": ("flop/s", 1e12),
    "PFLOP/s": ("flop/s", 1e15),
    "TOP/s": ("op/s", 1e12),
    "B/param": ("bytes/param", 1),
    "W": ("power", 1),
    "kW": ("power", 1e3),
    "USD/h": ("money/time", 1 / 3600),
}


def to_si(value: float, unit: str) -> float:
    """The value of a quantity in SI units.

    >>> to_si(400, "Gbps")
    50000000000.0
    >>> to_si(80, "GiB")
    85899345920
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}; known: {', '.join(UNITS)}")
    return value * UNITS[unit][1]


def _parse(text: str | float, what: str, factors: dict[str, float], example: str) -> float:
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", str(text))
        if match is None or match[2] not in factors:
            raise InputError(f"{what}={text} is not a quantity; write it as {example}")
        value = float(match[1].replace("_", "").replace(",", "")) * factors[match[2]]
    if not math.isfinite(value):
        raise InputError(f"{what}={text} is not a finite number; write it as {example}")
    return value


def parse_bytes(text: str | float, what: str = "size") -> int:
    """A number of bytes from ``"256MB"``, ``"1GiB"``, ``"4096"``.

    >>> parse_bytes("256MB"), parse_bytes("8MiB"), parse_bytes("4")
    (256000000, 8388608, 4)
    """
    factors: dict[str, float] = {"": 1, "B": 1}
    for prefix, factor in (*_DECIMAL.items(), *_BINARY.items()):
        if prefix not in ("", "B"):
            factors[prefix] = factors[f"{prefix}B"] = factor
    value = _parse(text, what, factors, "4096, 256MB or 1GiB")
    if value <= 0:
        raise InputError(f"{what}={text} must be above zero; write it as 4096, 256MB or 1GiB")
    if value > 1e18:
        raise InputError(f"{what}={text} is more than 1e18 bytes; give a size between 1 and 1e18 bytes")
    return round(value)


def parse_count(text: str | float, what: str = "count", maximum: float = 1e18) -> int:
    """A positive whole number from ``"512"``, ``"15T"``, ``"1.5B"``; decimal prefixes.

    >>> parse_count("15T"), parse_count("1.5B"), parse_count("2_048")
    (15000000000000, 1500000000, 2048)
    """
    value = _parse(text, what, dict(_DECIMAL), "512, 8k, 1.5B or 15T")
    if value <= 0:
        raise InputError(f"{what}={text} must be above zero")
    if value > maximum:
        raise InputError(f"{what}={text} is absurdly large; at most {format_si(maximum)} is accepted")
    if abs(value - round(value)) > 1e-6:
        raise InputError(f"{what}={text} must be a whole number")
    return round(value)


def parse_seq_len(text: str | float, what: str = "seq_len") -> int:
    """A sequence length; ``8k`` is 8192 and ``1M`` is 1048576, as model cards use them.

    >>> parse_seq_len("8k"), parse_seq_len("4096"), parse_seq_len("1M")
    (8192, 4096, 1048576)
    """
    factors: dict[str, float] = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20, "Ki": 2**10, "Mi": 2**20}
    value = _parse(text, what, factors, "4096 or 8k")
    if value <= 0 or abs(value - round(value)) > 1e-6:
        raise InputError(f"{what}={text} must be a whole number above zero")
    if value > 2**27:
        raise InputError(f"{what}={text} is absurdly large; at most 134217728 tokens are accepted")
    return round(value)


def parse_positive(text: str | float, what: str, maximum: float = math.inf) -> float:
    """A positive finite number, as prices and fractions are.

    >>> parse_positive("2.5", "price")
    2.5
    """
    value = _parse(text, what, {"": 1}, "2.5")
    if value <= 0:
        raise InputError(f"{what}={text} must be above zero")
    if value > maximum:
        raise InputError(f"{what}={text} must be at most {maximum:g}")
    return value


def format_si(value: float, unit: str = "", digits: int = 3) -> str:
    """A number with a decimal prefix.

    >>> format_si(405853388800), format_si(9.9e14, "FLOP/s"), format_si(0)
    ('406G', '990TFLOP/s', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}{unit}"
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor * 0.9995:
            return f"{_round(value / factor, digits)}{prefix}{unit}"
    return f"{_round(value, digits)}{unit}"


def format_count(value: float) -> str:
    """A number of parameters or tokens, with B for 10**9.

    >>> format_count(70553706496), format_count(15e12)
    ('70.6B', '15T')
    """
    return format_si(value).replace("G", "B")


def format_bytes(value: float, digits: int = 3) -> str:
    """A number of bytes in binary units, named as such.

    >>> format_bytes(85899345920), format_bytes(512)
    ('80 GiB', '512 B')
    """
    for unit, factor in (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor * 0.9995:
            return f"{_round(value / factor, digits)} {unit}"
    return f"{_round(value, digits)} B"


def format_rate(value: float) -> str:
    """Bytes per second in decimal units.

    >>> format_rate(450e9)
    '450 GB/s'
    """
    text = format_si(value)
    number, prefix = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return f"{number} {prefix}B/s"


def format_duration(seconds: float) -> str:
    """A duration a person can read.

    >>> format_duration(0.00123), format_duration(16.27), format_duration(93 * 86400)
    ('1.23 ms', '16.3 s', '93.0 days')
    """
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 1e-3:
        return f"{_round(seconds * 1e6)} us"
    if abs(seconds) < 1:
        return f"{_round(seconds * 1e3)} ms"
    if abs(seconds) < 600:
        return f"{_round(seconds)} s"
    if abs(seconds) < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _round(value: float, digits: int = 3) -> str:
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text
