"""Who sends how many bytes to whom: the messages of each algorithm, rank by rank.

The second derivation of the prices. A schedule is a list of phases that wait for each other; the messages of a phase
are pipelined, so only their sum over each link counts. Bytes are per byte of the collective's buffer. Ranks are GPUs
of the topology; ``("switch", d)`` is the switch of domain d and ``("network", r)`` that of rail r.

Domains are blocks of `g` consecutive ranks. What leaves a domain is spread over `channels` of it: channel c crosses by
member c, as NCCL's channels do (src/graph/connect.cc).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, product

from simllm.errors import InputError

__all__ = [
    "Endpoint",
    "Phase",
    "all_to_all_schedule",
    "broadcast_schedule",
    "collnet_schedule",
    "cube_rings",
    "double_tree",
    "exchange_schedule",
    "hierarchical_schedule",
    "nvls_schedule",
    "pat_schedule",
    "pxn_schedule",
    "ring_schedule",
    "torus_schedule",
    "tree_schedule",
]

Endpoint = int | tuple[str, int]
Phase = dict[tuple[Endpoint, Endpoint], float]


def _path(g: int, first: int) -> list[int]:
    """An order of the members of a domain. Those of all firsts use every pair of an even number once each way.

    >>> _path(6, 0)
    [0, 1, 5, 2, 4, 3]
    """
    if g % 2:
        return [(first + i) % g for i in range(g)]
    return [(first + (i + 1) // 2 * (1 if i % 2 else -1)) % g for i in range(g)]


def _orders(n: int, g: int, channels: int) -> list[list[int]]:
    """Ring of every channel. It enters and leaves a domain on the same rails, so every other domain runs backwards."""
    found = []
    for channel in range(channels):
        forward = _path(g, channel * g // channels)
        found.append(
            [
                domain * g + local
                for domain in range(n // g)
                for local in (forward if domain % 2 == 0 else forward[::-1])
            ]
        )
    return found


def ring_schedule(n: int, g: int, passes: int, channels: int | None = None) -> list[Phase]:
    """Rings of all channels: every edge carries ``passes (n - 1)/n`` of the channel's part.

    >>> ring_schedule(4, 4, 2, channels=1)[0][0, 1]
    1.5
    """
    phase: Phase = defaultdict(float)
    orders = _orders(n, g, channels or g)
    for order in orders:
        for i, rank in enumerate(order):
            phase[rank, order[(i + 1) % n]] += passes * (n - 1) / n / len(orders)
    return [phase]


def broadcast_schedule(n: int, g: int, channels: int | None = None) -> list[Phase]:
    """From rank 0 along the ring of every channel, all bytes over n - 1 of its edges."""
    phase: Phase = defaultdict(float)
    orders = _orders(n, g, channels or g)
    for order in orders:
        start = order.index(0)
        for i in range(n - 1):
            phase[order[(start + i) % n], order[(start + i + 1) % n]] += 1 / len(orders)
    return [phase]


def exchange_schedule(n: int, passes: int) -> list[Phase]:
    """Every rank sends one slot to every other in each pass: rings over all links of a full mesh at once."""
    return [{(a, b): passes / n for a, b in product(range(n), repeat=2) if a != b}]


def all_to_all_schedule(n: int) -> list[Phase]:
    """Every rank sends its part of the buffer to every other."""
    return exchange_schedule(n, 1)


def pxn_schedule(n: int, g: int) -> list[Phase]:
    """All-to-all by way of the member of the own domain on the rail of the destination."""
    phase: Phase = defaultdict(float)
    for a, b in product(range(n), repeat=2):
        relay = a // g * g + b % g
        for first, second in ((a, relay), (relay, b)):
            if first != second:
                phase[first, second] += 1 / n
    return [phase]


def double_tree(n: int) -> list[list[tuple[int, int]]]:
    """Child and parent of every edge of NCCL's two binary trees (src/graph/trees.cc).

    >>> double_tree(4)
    [[(1, 2), (2, 0), (3, 2)], [(2, 1), (1, 3), (0, 1)]]
    """
    one = []
    for rank in range(1, n):
        bit = rank & -rank
        parent = (rank ^ bit) | (bit << 1)
        one.append((rank, parent if parent < n else rank ^ bit))
    # The second tree is the first one mirrored, or shifted by one where the number is odd: inner nodes become leaves.
    other = [tuple((n - 1 - x) if n % 2 == 0 else (x + 1) % n for x in edge) for edge in one]
    return [one, [(child, parent) for child, parent in other]]


def tree_schedule(n: int, g: int, channels: int | None = None) -> list[Phase]:
    """Double binary tree of the domains, entered by another member in every channel, and a chain inside each domain."""
    phase: Phase = defaultdict(float)
    count = channels or g
    for channel in range(count):
        head = channel * g // count
        for domain, (i, j) in product(range(n // g), pairwise(_path(g, head))):
            a, b = domain * g + i, domain * g + j
            phase[a, b] += 1 / count
            phase[b, a] += 1 / count
        _across(phase, n // g, head, g, 1 / count)
    return [phase]


def _across(phase: Phase, domains: int, local: int, g: int, part: float) -> None:
    """A double binary tree between the members ``local`` of all domains."""
    for edges in double_tree(domains):
        for child, parent in edges:
            a, b = child * g + local, parent * g + local
            phase[a, b] += part / 2
            phase[b, a] += part / 2


def nvls_schedule(n: int, g: int, channels: int | None = None) -> list[Phase]:
    """Reduction and multicast in the switch of every domain, and a double tree along every rail between them."""
    phase: Phase = defaultdict(float)
    for rank in range(n):
        switch = ("switch", rank // g)
        # Up: all that this GPU adds, and the sum of its own part. Down: that sum, and all sums of the multicast.
        phase[rank, switch] += 1 + 1 / g
        phase[switch, rank] += 1 + 1 / g
    if n > g:
        count = channels or g
        for channel in range(count):
            _across(phase, n // g, channel * g // count, g, 1 / count)
    return [phase]


def collnet_schedule(n: int, g: int) -> list[Phase]:
    """Reduction inside every domain by its switch, and of each rail in the network."""
    (phase,) = nvls_schedule(g, g)
    found: Phase = defaultdict(float)
    for (a, b), part in phase.items():
        for domain in range(n // g):
            found[_moved(a, domain, g), _moved(b, domain, g)] += part
    for rank in range(n):
        found[rank, ("network", rank % g)] += 1 / g
        found[("network", rank % g), rank] += 1 / g
    return [found]


def _moved(end: Endpoint, domain: int, g: int) -> Endpoint:
    return ("switch", domain) if isinstance(end, tuple) else end + domain * g


def hierarchical_schedule(n: int, g: int, passes: int) -> list[Phase]:
    """Rings inside every domain, then a ring along every rail; with two passes the inner ones scatter and gather."""
    domains = n // g
    inside: Phase = defaultdict(float)
    for domain in range(domains):
        for (a, b), part in ring_schedule(g, g, passes)[0].items():
            inside[_moved(a, domain, g), _moved(b, domain, g)] += part
    rails: Phase = defaultdict(float)
    for rank in range(n):
        rails[rank, (rank + g) % n] += passes * (domains - 1) / domains / g
    return [inside, rails]


def pat_schedule(n: int) -> list[Phase]:
    """All-gather by shifted binomial trees: in round k every rank passes on what it has to the rank ``2**k`` away."""
    phase: Phase = defaultdict(float)
    have = 1
    while have < n:
        parts = min(have, n - have)
        for rank in range(n):
            phase[rank, (rank + have) % n] += parts / n
        have += parts
    return [phase]


def torus_schedule(shape: tuple[int, ...], passes: int) -> list[Phase]:
    """Rings along all closed axes at once, both ways: each part of the buffer visits the axes in another order.

    The parts are sized so that every axis carries the same, which one rotation of the axes for each of them allows.
    """
    import numpy as np

    axes, n = len(shape), int(np.prod(shape))
    loads = np.zeros((axes, axes))
    for turn in range(axes):
        gathered = 1
        for axis in (*range(turn, axes), *range(turn)):
            loads[axis, turn] = (shape[axis] - 1) * gathered / n
            gathered *= shape[axis]
    system = np.vstack([loads[1:] - loads[:-1], np.ones(axes)])
    parts = np.linalg.solve(system, np.append(np.zeros(axes - 1), 1.0))
    if (parts < 0).any():
        raise InputError(f"no way to share a torus of {shape} evenly between its axes")
    each = loads @ parts
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(axes)]
    phase: Phase = defaultdict(float)
    for rank, (axis, stride) in product(range(n), enumerate(strides)):
        at, length = rank // stride % shape[axis], shape[axis]
        for step in (1, -1):
            phase[rank, rank + ((at + step) % length - at) * stride] += passes * float(each[axis]) / 2
    return [phase]


def cube_rings(wires: tuple[tuple[int, int, int], ...], n: int, passes: int) -> list[Phase]:
    """As many rings as the wires among the first n corners of a cube mesh allow, each wire in one ring each way."""
    left: dict[frozenset[int], int] = {frozenset((a, b)): links for a, b, links in wires if a < n and b < n}
    rings: list[list[int]] = []

    def closed(path: list[int]) -> Iterator[list[int]]:
        if len(path) == n:
            if left.get(frozenset((path[-1], 0)), 0) > 0:
                yield path
            return
        for nxt in range(n):
            wire = frozenset((path[-1], nxt))
            if nxt not in path and left.get(wire, 0) > 0:
                yield from closed([*path, nxt])

    def search(wanted: int) -> bool:
        if wanted == 0:
            return True
        for ring in list(closed([0])):
            edges = [frozenset((ring[i], ring[(i + 1) % n])) for i in range(n)]
            for edge in edges:
                left[edge] -= 1
            if min(left.values()) >= 0 and search(wanted - 1):
                rings.append(ring)
                return True
            for edge in edges:
                left[edge] += 1
        return False

    most = min(sum(links for a, b, links in wires if rank in (a, b) and a < n and b < n) for rank in range(n)) // 2
    if not search(most):
        raise InputError(f"the wires among {n} devices hold no {most} rings")
    phase: Phase = defaultdict(float)
    for ring in rings:
        for order in (ring, ring[::-1]):
            for i, rank in enumerate(order):
                phase[rank, order[(i + 1) % n]] += passes * (n - 1) / n / (2 * most)
    return [phase]
