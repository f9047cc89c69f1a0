"""What leaves the device for the host's memory or drives (arXiv:2101.06840, arXiv:2104.07857)."""

from __future__ import annotations

from dataclasses import dataclass

from simllm.errors import InputError, unknown_name

__all__ = ["OFFLOADED", "STATES", "Offload"]

#: What can leave the device. The optimizer takes its update with it: it runs on the host's processors.
STATES = ("optimizer", "gradients", "parameters")
OFFLOADED = (*STATES, "activations")


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where states and activations are kept that are not on the device.

    Attributes
    ----------
    to_cpu, to_nvme : tuple of str
        Names of `OFFLOADED`.

    Examples
    --------
    >>> Offload.parse("optimizer:nvme,gradients")
    Offload(to_cpu=('gradients',), to_nvme=('optimizer',))
    >>> str(Offload.parse("optimizer:nvme,gradients")), Offload.parse("none").anything
    ('optimizer:nvme,gradients', False)
    """

    to_cpu: tuple[str, ...] = ()
    to_nvme: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.to_cpu, *self.to_nvme):
            if name not in OFFLOADED:
                raise unknown_name("state to offload", name, OFFLOADED)
        if twice := set(self.to_cpu) & set(self.to_nvme):
            raise InputError(f"offload={', '.join(sorted(twice))} both to the host's memory and to its drives")
        if "activations" in self.to_nvme:
            raise InputError("offload=activations:nvme is not modelled; activations go to the host's memory")
        if self.moves("gradients") and not self.moves("optimizer"):
            raise InputError("offload=gradients needs the optimizer on the host too: use offload=optimizer,gradients")

    @classmethod
    def parse(cls, text: str) -> Offload:
        """Read ``none``, or names with ``:nvme`` behind what goes to drives."""
        places: dict[str, list[str]] = {"cpu": [], "nvme": []}
        for part in text.split(",") if text != "none" else ():
            name, _, place = part.strip().partition(":")
            if place not in ("", "cpu", "nvme"):
                raise unknown_name("place to offload to", place, ("cpu", "nvme"))
            places[place or "cpu"].append(name)
        return cls(to_cpu=tuple(places["cpu"]), to_nvme=tuple(places["nvme"]))

    def moves(self, name: str) -> bool:
        """Whether something leaves the device."""
        return name in self.to_cpu or name in self.to_nvme

    @property
    def anything(self) -> bool:
        """Whether anything leaves the device."""
        return bool(self.to_cpu or self.to_nvme)

    def __str__(self) -> str:
        words = [f"{name}:nvme" if name in self.to_nvme else name for name in OFFLOADED if self.moves(name)]
        return ",".join(words) or "none"
