"""What a person did wrong: what was given, what was expected, what to do.

Library code raises one of these; the command line prints the message on standard error and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["InputError", "UnsupportedError", "unknown_name"]


class InputError(ValueError):
    """The input cannot be used: wrong name, wrong value, contradictory values, unreadable file."""


class UnsupportedError(InputError):
    """The input is understood, but simllm does not model it; refused by name instead of ignored."""


def unknown_name(kind: str, given: str, known: Iterable[str], hint: str = "") -> InputError:
    """An error for a name that is not known, with the nearest known names.

    Parameters
    ----------
    kind : str
        What the name stands for, as a person would say it: ``"model"``, ``"cluster"``.
    given : str
        The name that was given.
    known : iterable of str
        Every name that would have been accepted.
    hint : str
        What else can be given, or where the full list is.

    Examples
    --------
    >>> str(unknown_name("cluster", "dgx-h10", ["dgx-h100", "dgx-a100"]))
    "unknown cluster 'dgx-h10'; did you mean dgx-h100 or dgx-a100?"
    >>> str(unknown_name("schedule", "zzz", ["1f1b", "gpipe"]))
    "unknown schedule 'zzz'; known: 1f1b, gpipe"
    """
    names = sorted(known)
    folded = {name.casefold(): name for name in names}
    near = [folded[match] for match in get_close_matches(given.casefold(), folded, n=3, cutoff=0.6)]
    if near:
        message = f"unknown {kind} {given!r}; did you mean {_either(near)}?"
    elif len(names) <= 30:
        message = f"unknown {kind} {given!r}; known: {', '.join(names)}"
    else:
        message = f"unknown {kind} {given!r}; {len(names)} are known, for example {', '.join(names[:5])}"
    return InputError(f"{message} {hint}".rstrip())


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
