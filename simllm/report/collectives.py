"""Prices of collectives as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from simllm.hardware import Cluster
from simllm.network import CollectiveCost, Group
from simllm.report.text import facts, heading, table
from simllm.units import format_bytes, format_duration, format_rate

__all__ = ["collective_dict", "collective_report", "doubling_sizes"]


def doubling_sizes(first: int, last: int) -> list[int]:
    """Sizes from the first to the last, each twice the one before, as nccl-tests steps with ``-f 2``.

    >>> doubling_sizes(1024, 5000)
    [1024, 2048, 4096, 5000]
    """
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return [*sizes, last]


def _cost_dict(cost: CollectiveCost) -> dict[str, Any]:
    return {
        "size_bytes": cost.size_bytes,
        "time_s": cost.time_s,
        "latency_s": cost.latency_s,
        "bandwidth_s": cost.bandwidth_s,
        "algbw_bytes_per_s": cost.algbw,
        "busbw_bytes_per_s": cost.busbw,
        "algorithm": cost.algorithm,
        "protocol": cost.protocol,
        "bottleneck": cost.bottleneck,
        "bottleneck_bandwidth_bytes_per_s": cost.bottleneck_bandwidth,
        "scaleup_bytes_per_gpu": cost.bytes_scaleup,
        "scaleout_bytes_per_gpu": cost.bytes_scaleout,
    }


def collective_dict(cluster: Cluster, group: Group, costs: Sequence[CollectiveCost], sweep: bool) -> dict[str, Any]:
    """The price of the last size as plain data, and with ``sweep`` those of all sizes below it."""
    document = {
        "operation": costs[-1].operation,
        "cluster": cluster.name,
        "gpus": cluster.num_gpus,
        "ranks": group.size,
        "stride": group.stride,
        **_cost_dict(costs[-1]),
    }
    return document | ({"sweep": [_cost_dict(cost) for cost in costs]} if sweep else {})


def collective_report(cluster: Cluster, group: Group, costs: Sequence[CollectiveCost]) -> list[RenderableType]:
    """One price in full, or a table of several."""
    cost = costs[-1]
    stride = f" with stride {group.stride}" if group.stride > 1 else ""
    where = f"{group.size} ranks{stride} of {cluster.num_gpus} GPUs, {cluster.name} ({cluster.num_nodes} nodes)"
    title = heading(cost.operation, where if len(costs) > 1 else f"{format_bytes(cost.size_bytes, 4)}, {where}")
    if len(costs) > 1:
        columns = ("size", "time", "algbw", "busbw", "algorithm", "protocol", "limited by")
        rows = [
            (
                format_bytes(c.size_bytes, 4),
                format_duration(c.time_s),
                format_rate(c.algbw),
                format_rate(c.busbw),
                c.algorithm,
                c.protocol,
                c.bottleneck,
            )
            for c in costs
        ]
        return [title, Text(), table(columns, rows, left=("algorithm", "protocol", "limited by"))]
    spent = f"{format_duration(cost.latency_s)} latency + {format_duration(cost.bandwidth_s)} transfer"
    sent = f"{format_bytes(cost.bytes_scaleup)} inside the domain, {format_bytes(cost.bytes_scaleout)} between domains"
    return [
        title,
        Text(),
        facts(
            {
                "time": f"{format_duration(cost.time_s)} = {spent}",
                "algbw": format_rate(cost.algbw),
                "busbw": format_rate(cost.busbw),
                "algorithm": f"{cost.algorithm}, protocol {cost.protocol}",
                "limited by": f"{cost.bottleneck}, {format_rate(cost.bottleneck_bandwidth)} each way",
                "sent by a GPU": sent,
            }
        ),
    ]
