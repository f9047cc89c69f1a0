"""Which protocol NCCL takes for a ring inside a domain: its own model of itself, not what a ring costs.

NCCL estimates ``latency + bytes / bandwidth`` for every protocol before it starts a collective and takes the cheapest
(src/graph/tuning.cc, ncclTopoTuneModel and ncclTopoGetAlgoTime). That is what decides where it changes protocol, and a
poor estimate of the time on either side, so measured times step where it says: an all-gather of 4 H100 from 19 us at
2 MiB to 37 us at 4 MiB, of 4 B200 from 25 us at 4 MiB to 51 us at 8 MiB.

    latency = launch + f (n - 1) step,    bytes / bandwidth = f (n - 1) / n * S / (part * bus)

with f = 2 for all-reduce, 1 for all-gather and reduce-scatter. ``bus`` is what the rings carry that NCCL finds in the
topology; LL reaches no more than a rate of its own on each generation of GPUs. LL128 is enabled over NVLink only. The
latencies are those of the link classes ``nccl-nvlink`` and ``nccl-pcie``, of v2.30, and ``nccl-2-8-nvlink``, where an
all-reduce in LL was taken to reach a quarter of the rings and the others a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from simllm.hardware.links import Tuning, load_link

__all__ = ["reaches"]


# Part of the rings that each protocol reaches: in all-gather and reduce-scatter, and in all-reduce.
_PARTS: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "nccl-nvlink": {"LL": (1 / 2, 1 / 2), "LL128": (0.92, 0.92), "Simple": (1, 1)},
    "nccl-pcie": {"LL": (1 / 2, 1 / 2), "Simple": (1, 1)},
    "nccl-2-8-nvlink": {"LL": (1 / 3, 1 / 4), "LL128": (0.92, 0.92), "Simple": (1, 1)},
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
    calls = load_link(tuning.model).ring
    bus = tuning.bus if size > 2 or tuning.pair_bus is None else tuning.pair_bus
    most = {"LL": float("inf") if tuning.ll is None else tuning.ll.si}
    wire = passes * (size - 1) / size
    # Straight lines over the size: how high each begins, and how steep it is.
    lines = {
        name: (
            calls.launch_s(name) + passes * (size - 1) * calls.step_s(name),
            wire / min(parts[passes - 1] * bus.si, most.get(name, float("inf"))),
        )
        for name, parts in _PARTS[tuning.model].items()
    }
    found = {}
    for name, (low, steep) in lines.items():
        crossings = [(other_low - low, steep - other_steep) for other_low, other_steep in lines.values()]
        end = min((higher / steeper for higher, steeper in crossings if steeper > 0), default=float("inf"))
        begin = max((higher / steeper for higher, steeper in crossings if steeper < 0), default=0.0)
        if end > max(begin, 0.0):
            found[name] = end
    return found
