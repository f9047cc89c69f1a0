"""What an all-to-all gets out of a cube mesh, where GPUs hand on messages between others.

In the hybrid cube mesh of a DGX-1V a GPU has wires to four of its seven peers. A message to one of the others takes two
hops, through a GPU that has wires to both (NVIDIA/nccl v2.9 src/graph/paths.cc, PATH_NVB), and shares both wires with
the messages between their own ends. Where several shortest paths exist, each hop is drawn with the bandwidth of its
wire as weight; the expected visits of that walk to every GPU solve ``visits = sources + visits @ hops``, one small
linear system for every destination (Kemeny and Snell, "Finite Markov Chains", 1960, chapter 3), and the busiest wire
decides.

It cannot beat the worst cut: 16 of the messages each way go between the halves of a DGX-1V over 6 links, which is
16/6 slots a link; the routes above load the busiest with more than that.
"""

from __future__ import annotations

from functools import lru_cache

from simllm.errors import InputError

__all__ = ["slots_per_link"]


@lru_cache(maxsize=1024)
def slots_per_link(wires: tuple[tuple[int, int, int], ...], corners: int, members: tuple[int, ...]) -> float:
    """Slots that the busiest link carries one way when every member sends one to every other.

    Parameters
    ----------
    wires : tuple of (int, int, int)
        Device, device and the links between them.
    corners : int
        Devices of the domain; those that are no members hand on messages too.
    members : tuple of int
        Devices that exchange messages.

    Raises
    ------
    InputError
        When the wires do not join two members.

    Examples
    --------
    A square: each of 4 GPUs has wires to 2, and half of what it has for the opposite corner goes each way around.

    >>> slots_per_link(((0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 0, 1)), 4, (0, 1, 2, 3))
    2.0
    """
    import numpy as np

    links = np.zeros((corners, corners))
    for a, b, count in wires:
        if max(a, b) < corners:
            links[a, b] = links[b, a] = count
    hops = np.where(links > 0, 1.0, np.inf)
    np.fill_diagonal(hops, 0.0)
    for middle in range(corners):  # Floyd and Warshall
        hops = np.minimum(hops, hops[:, [middle]] + hops[[middle], :])
    if np.isinf(hops[np.ix_(members, members)]).any():
        raise InputError(f"the wires of the cube mesh do not join all of its devices {list(members)}; add wires")
    carried = np.zeros_like(links)
    for target in members:
        nearer = np.where(hops[:, target][None, :] == hops[:, target][:, None] - 1, links, 0.0)
        chance = nearer / np.maximum(nearer.sum(axis=1, keepdims=True), 1.0)
        sources = np.zeros(corners)
        sources[[rank for rank in members if rank != target]] = 1.0
        visits = np.linalg.solve(np.eye(corners) - chance.T, sources)
        carried += visits[:, None] * chance
    return float(np.max(carried[links > 0] / links[links > 0]))
