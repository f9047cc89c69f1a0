"""What binds a plan: the seconds of a step by the resource that they wait for."""

from __future__ import annotations

from simllm.planner.reasons import GROUPS
from simllm.training import Estimate

__all__ = ["resources"]

#: Causes of time whose resource is the same wherever a plan runs.
_RESOURCES = {
    "matmul": "compute",
    "attention": "compute",
    "recompute": "compute, again",
    "elementwise": "memory bandwidth",
    "optimizer": "memory bandwidth",
    "gradient_clipping": "memory bandwidth",
    "host": "host",
    "offload": "host link",
    "pipeline_bubble": "waiting for other pipeline ranks",
}


def resources(answer: Estimate) -> dict[str, float]:
    """Seconds of a step by the resource that binds them, the largest first; they add up to the step.

    Kernels on the matrix units count as compute, those that stream as memory bandwidth; what shows of a group's
    communication is shared among its links by the unhidden seconds that each of them limits.

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training, estimate
    >>> plan = Plan(tp=8, dp=2, global_batch_size=16, sequence_parallel=True)
    >>> answer = estimate(Model.load("llama-2-7b"), Cluster.load("dgx-h100", 16), plan, Training(seq_len=4096))
    >>> list(resources(answer))
    ['compute', 'nvlink4', 'memory bandwidth', 'infiniband', 'host']
    """
    found: dict[str, float] = {}
    for cause, seconds in answer.time.by_cause.items():
        for resource, share in _shares(answer, cause).items():
            found[resource] = found.get(resource, 0.0) + seconds * share
    return dict(sorted(((name, s) for name, s in found.items() if s > 0), key=lambda item: -item[1]))


def _shares(answer: Estimate, cause: str) -> dict[str, float]:
    if cause in _RESOURCES:
        return {_RESOURCES[cause]: 1.0}
    links: dict[str, float] = {}
    for traffic in answer.communication:
        if traffic.group in GROUPS[cause]:
            links[traffic.bottleneck] = links.get(traffic.bottleneck, 0.0) + traffic.time_s
    total = sum(links.values())
    return {link: seconds / total for link, seconds in links.items()} if total else {"links": 1.0}
