"""Which numbers of GPUs a search looks at."""

from __future__ import annotations

from collections.abc import Sequence

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.planner.space import divisors

__all__ = ["at_most", "exactly"]

#: More whole numbers of nodes than this are thinned out to the divisors of the largest: others leave nodes idle that
#: could hold another replica.
_MOST_SIZES = 64


def exactly(cluster: Cluster, gpus: Sequence[int]) -> list[Cluster]:
    """The cluster with each of several numbers of GPUs, smallest first.

    >>> from simllm.hardware import Cluster
    >>> [c.num_gpus for c in exactly(Cluster.load("dgx-h100", 8), [64, 16])]
    [16, 64]
    """
    return [cluster.resized(size) for size in sorted(set(gpus))]


def at_most(cluster: Cluster) -> list[Cluster]:
    """The cluster and all smaller ones worth trying, smallest first: parts of a node, then whole nodes.

    >>> from simllm.hardware import Cluster
    >>> [c.num_gpus for c in at_most(Cluster.load("dgx-h100", 32))]
    [1, 2, 4, 8, 16, 24, 32]
    """
    node = cluster.gpus_per_node
    if cluster.num_gpus <= node:
        sizes = divisors(cluster.num_gpus)
    else:
        nodes = cluster.num_nodes
        counts = list(range(2, nodes + 1)) if nodes <= _MOST_SIZES else divisors(nodes)[1:]
        sizes = divisors(node) + [n * node for n in counts]
    found = []
    for size in sizes:
        try:
            found.append(cluster.resized(size))
        except InputError:  # a torus has no slice of that many chips
            continue
    return found
