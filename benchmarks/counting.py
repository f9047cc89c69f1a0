"""How long counting takes. Run: python benchmarks/counting.py

Nothing is taken from a cache but the modules: the config is read, the spec made, the graph built and everything counted
anew each time. The median of several runs is printed with the range; machines are noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from simllm.models import Model, catalog
from simllm.models.activations import Recompute, kept_tensors, saved_bytes
from simllm.models.build import build_graph
from simllm.models.counts import count_flops, count_parameters, kv_cache_bytes_per_token
from simllm.models.graph import Implementation, Layout


def forget() -> None:
    """Empty the caches that would answer the second time."""
    for cached in (build_graph, saved_bytes, catalog._load):
        cached.cache_clear()


def count(model: Model) -> None:
    """Parameters, FLOPs, cache, and what each distinct layer keeps."""
    graph = model.graph
    count_parameters(graph)
    count_flops(graph, Layout(seq_len=4096))
    kv_cache_bytes_per_token(graph)
    for layer, _ in graph.layer_parts:
        kept_tensors(layer, Implementation())
        saved_bytes(layer, Layout(seq_len=4096), Implementation(), Recompute())


def one(name: str) -> Callable[[], None]:
    """Everything about one model whose config has been read."""
    spec = catalog.load_model(name)

    def action() -> None:
        forget()
        count(Model(spec))

    return action


def everything() -> None:
    """Everything about every model of the catalog, their configs included."""
    forget()
    for name in catalog.catalog_names():
        count(Model.load(name))


def show(what: str, action: Callable[[], None], times: int, target: str) -> None:
    """One line of the table."""
    action()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    low, mid, high = (1e3 * value for value in (min(seconds), median(seconds), max(seconds)))
    print(f"{what:<48} {mid:8.3g} ms ({low:.3g} to {high:.3g})   target {target}")


def main() -> None:
    """Time the counts."""
    for name in ("llama-3.1-405b", "deepseek-v3", "jamba-v0.1"):
        show(f"graph and counts of {name}", one(name), 50, "5 ms")
    show(f"configs, graphs and counts of all {len(catalog.catalog_names())} models", everything, 5, "2 s")


if __name__ == "__main__":
    main()
