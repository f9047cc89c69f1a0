"""Which protocol NCCL takes for a ring inside a domain: its own model of itself, not what a ring costs.

NCCL estimates ``latency + bytes / bandwidth`` for every protocol before it starts a collective and takes the cheapest
(src/graph/tuning.cc, ncclTopoTuneModel and ncclTopoGetAlgoTime). That is what decides where it changes protocol, and a
poor estimate of the time on either side, so measured times step where it says: an all-gather of 4 H100 from 19 us at
2 MiB to 37 us at 4 MiB, of 4 B200 from 25 us at 4 MiB to 51 us at 8 MiB.

    latency = launch + f (n - 1) step,    bytes / bandwidth = f (n - 1) / n * S / (part * bus)

with f = 2 for all-reduce, 1 for all-gather and reduce-scatter. ``bus`` is what the rings carry that NCCL finds in the
topology; LL reaches no more than a rate of its own on each generation of GPUs. LL128 is enabled over NVLink only. The
constants are those of v2.30, and of v2.8 for the classes of earlier libraries, where an all-reduce in LL was taken to
reach a quarter of the rings and the others a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from simllm.hardware.links import Tuning

__all__ = ["reaches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rated:
    """A protocol as the library's model has it: seconds of a call and of a step, the part of the rings it reaches."""

    launch_s: float
    step_s: float
    part: float
    reduced_part: float | None = None

    def per_byte(self, bus: float, most: float, reduces: bool) -> float:
        part = self.reduced_part if reduces and self.reduced_part is not None else self.part
        return 1 / min(part * bus, most)


_MODELS: Final[Mapping[str, Mapping[str, _Rated]]] = {
    "nccl-nvlink": {
        "LL": _Rated(launch_s=6.6e-6, step_s=0.6e-6, part=1 / 2),
        "LL128": _Rated(launch_s=14e-6, step_s=1.9e-6, part=0.92),
        "Simple": _Rated(launch_s=8.4e-6, step_s=3.4e-6, part=1),
    },
    "nccl-pci": {
        "LL": _Rated(launch_s=6.6e-6, step_s=1.0e-6, part=1 / 2),
        "Simple": _Rated(launch_s=8.4e-6, step_s=5.7e-6, part=1),
    },
    "nccl-2-10-nvlink": {
        "LL": _Rated(launch_s=3.6e-6, step_s=0.47e-6, part=1 / 3, reduced_part=1 / 4),
        "LL128": _Rated(launch_s=10e-6, step_s=1.9e-6, part=0.92),
        "Simple": _Rated(launch_s=8.4e-6, step_s=3.4e-6, part=1),
    },
}


def reaches(tuning: Tuning, size: int, passes: int) -> dict[str, float]:
    """The largest buffer for which NCCL takes each protocol, bytes; a protocol that it never takes is not there.

    Parameters
    ----------
    tuning : Tuning
        Of the scale-up link.
    size : int
        Ranks of the ring.
    passes : int
        2 for all-reduce, 1 for all-gather and reduce-scatter.

    Examples
    --------
    Two A100 gather in LL up to 1.3 MB and never in LL128; eight all-reduce in LL128 from 2 to 24 MB.

    >>> from simllm.hardware.links import load_link
    >>> tuning = load_link("nvlink3").tuning
    >>> [(name, round(most / 1e6, 1)) for name, most in reaches(tuning, 2, 1).items()]
    [('LL', 1.3), ('Simple', inf)]
    >>> [(name, round(most / 1e6, 1)) for name, most in reaches(tuning, 8, 2).items()]
    [('LL', 2.1), ('LL128', 24.3), ('Simple', inf)]
    """
    model = _MODELS[tuning.model]
    bus = tuning.bus if size > 2 or tuning.pair_bus is None else tuning.pair_bus
    most = {"LL": float("inf") if tuning.ll is None else tuning.ll.si}
    wire = passes * (size - 1) / size
    # Straight lines over the size: how high each begins, and how steep it is.
    lines = {
        name: (
            rated.launch_s + passes * (size - 1) * rated.step_s,
            wire * rated.per_byte(bus.si, most.get(name, float("inf")), passes == 2),
        )
        for name, rated in model.items()
    }
    found = {}
    for name, (low, steep) in lines.items():
        crossings = [(other_low - low, steep - other_steep) for other_low, other_steep in lines.values()]
        end = min((higher / steeper for higher, steeper in crossings if steeper > 0), default=float("inf"))
        begin = max((higher / steeper for higher, steeper in crossings if steeper < 0), default=0.0)
        if end > max(begin, 0.0):
            found[name] = end
    return found
