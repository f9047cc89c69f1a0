"""What becomes of the keys of a file that say nothing of a plan: named to the person, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from simllm.errors import UnsupportedError, unknown_name

__all__ = ["KeyRules"]


class KeyRules:
    """Which keys of a framework's file mean what for the cost.

    Parameters
    ----------
    framework : str
    used : iterable of str
        Keys that settings are read from.
    refused : dict of str to str
        Keys that change the cost in a way that is not modelled -> what they do.
    software : iterable of str
        Keys that change the cost, for which the software stack's own behaviour stands in.
    harmless : iterable of str
        Keys, or beginnings of keys where they end in ``*``, without effect on time and memory.
    """

    def __init__(
        self,
        framework: str,
        *,
        used: Iterable[str],
        refused: Mapping[str, str],
        software: Iterable[str],
        harmless: Iterable[str],
    ) -> None:
        self.framework, self.refused = framework, refused
        self.used, self.software = frozenset(used), frozenset(software)
        self.harmless = frozenset(key for key in harmless if not key.endswith("*"))
        self.beginnings = tuple(key[:-1] for key in harmless if key.endswith("*"))

    def notes(self, keys: Iterable[str], stack: str) -> tuple[str, ...]:
        """Every key that no setting was read from, by what stands in for it.

        Raises
        ------
        InputError
            A key is not known and looks like a mistyped one, or changes the cost in a way that is not modelled.
        """
        kinds: dict[str, list[str]] = {"software": [], "harmless": [], "unknown": []}
        for key in keys:
            if key in self.used:
                continue
            if key in self.refused:
                raise UnsupportedError(f"{key}: {self.refused[key]} is not modelled; take it out of the file")
            if key in self.software:
                kinds["software"].append(key)
            elif key in self.harmless or key.startswith(self.beginnings):
                kinds["harmless"].append(key)
            elif get_close_matches(key, self.used, cutoff=0.85):
                raise unknown_name(f"{self.framework} key", key, self.used)
            else:
                kinds["unknown"].append(key)
        texts = {
            "software": f"as the stack {stack} does, whatever the file says",
            "harmless": "without effect on time and memory",
            "unknown": "not known and taken to have no effect on time and memory",
        }
        return tuple(f"{texts[kind]}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)
