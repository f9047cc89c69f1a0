"""Speed of prices. Run: python benchmarks/collectives.py

One core: prices a second through the array interface, one warm price, a topology of 16,384 GPUs and a price on it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

BUILD = """
import resource, time
started = time.perf_counter()
from simllm import Cluster
from simllm.hardware.topology import build_topology
from simllm.network import Group, price
cluster = Cluster.load("dgx-h100", 16384)
graph = build_topology(cluster)
price("all_reduce", 2**30, cluster, Group(size=16384))
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(graph))
"""


def seconds(action: Callable[[], object], times: int) -> float:
    """The median of several runs, after one that does not count."""
    action()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return median(found)


def main() -> None:
    """Time prices and a large topology."""
    import numpy as np

    from simllm import Cluster
    from simllm.network import Group, price, price_array

    cluster, group = Cluster.load("dgx-h100", 1024), Group(size=1024)
    sizes = np.logspace(0, 11, 1000)
    array = seconds(lambda: price_array("all_reduce", sizes, cluster, group), 50)
    print(f"array interface, 1000 sizes a call   {len(sizes) / array:12,.0f} prices/s   target 100,000")
    short = sizes[:16]
    array = seconds(lambda: price_array("all_reduce", short, cluster, group), 500)
    print(f"array interface, 16 sizes a call     {len(short) / array:12,.0f} prices/s   target 100,000")
    one = seconds(lambda: price("all_reduce", 2**20, cluster, group), 2000)
    print(f"one warm price                       {one * 1e3:12.4f} ms         target 0.2 ms")
    groups = [Group(size=n, stride=s) for n in range(2, 34) for s in (1, 2, 4, 8)]
    fresh = iter([Cluster.load("dgx-h100", 1024 + 8 * i) for i in range(20)])
    cold = seconds(lambda: [price("all_reduce", 2**20, here, g) for here in (next(fresh),) for g in groups], 10)
    print(f"a price of a new group               {cold / len(groups) * 1e3:12.4f} ms")
    built, megabytes, vertices = subprocess.run(
        [sys.executable, "-c", BUILD], check=True, capture_output=True, text=True
    ).stdout.split()
    print(f"16,384 GPUs: import, graph, price    {float(built):12.2f} s          target 1 s ({vertices} vertices)")
    print(f"memory of that process               {float(megabytes):12.0f} MB         target 500 MB")
    print(f"memory of this process               {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:12.0f} MB")


if __name__ == "__main__":
    main()
