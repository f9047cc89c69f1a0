"""Published sweeps of collectives, and what is known of the machines they ran on."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from simllm.hardware.cluster import Cluster, make_cluster
from simllm.network.group import Group

__all__ = ["Sweep", "read_sweeps"]

#: nccl-tests' names of operations.
_OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send_recv",
    "p2p": "send_recv",
}


#: A bus bandwidth printed with two decimals tells the time to ten percent from here on, GB/s.
_FINEST_BUSBW = 0.05


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Measured times of one collective over sizes, on a cluster that is described.

    Parameters
    ----------
    name : str
        Label of the run.
    system : str
        What the source says about the machine.
    operation : str
        One of `simllm.network.OPERATIONS`.
    cluster : Cluster
        The machine.
    group : Group
        The ranks.
    algorithm : str or None
        Algorithm the run forced.
    sizes_bytes, times_s : tuple of float
        The points.
    fitted : bool
        Whether the sweep says something about links; false where a launch or a missing peer path hides them.
    """

    name: str
    system: str
    operation: str
    cluster: Cluster
    group: Group
    algorithm: str | None
    sizes_bytes: tuple[float, ...]
    times_s: tuple[float, ...]
    fitted: bool


def read_sweeps(points: Path, systems: Path) -> tuple[list[Sweep], dict[str, int]]:
    """Sweeps of a table of published points, and how many rows were left out for which reason.

    Parameters
    ----------
    points : Path
        CSV with the columns ``sweep, usable, system, n_nodes, n_gpus, collective, algorithm, message_bytes, time_us``.
    systems : Path
        CSV that describes each ``system``: ``accelerator, gpus_per_node, domain_gpus, scaleout_link,
        scaleout_GBps_per_node``; ``peer_gpus``, how many GPUs reach each other's memory (empty: all; larger groups
        are staged in host memory); ``one_process``, ``yes`` where one process drove all GPUs of a node; and
        ``fit_up_to_gpus``, the largest group that tells about links (empty: any).

    Returns
    -------
    list of Sweep, dict
        The sweeps, and the rows left out by reason.
    """
    described = {row["system"]: row for row in csv.DictReader(systems.open(encoding="utf-8", newline=""))}
    rows: dict[str, list[dict[str, str]]] = {}
    refused: dict[str, int] = {}
    for row in csv.DictReader(points.open(encoding="utf-8", newline="")):
        reason = _refusal(row, described.get(row["system"]))
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
        else:
            rows.setdefault(f"{row['sweep']}/{row['n_nodes']}/{row['algorithm']}", []).append(row)
    return [_sweep(name, members, described[members[0]["system"]]) for name, members in rows.items()], refused


def _refusal(row: dict[str, str], system: dict[str, str] | None) -> str:
    """Why a row cannot be scored; empty if it can."""
    if "acceptance threshold" in row["system"]:
        return "a threshold for acceptance, not a measurement"
    if "2-decimals" in row["notes"] and float(row["busbw_GBps"] or 0) < _FINEST_BUSBW:
        return "the bandwidth is printed too coarsely to tell the time"
    if row["usable"] != "True" or not row["time_us"] or not row["message_bytes"]:
        return "no measured time and size"
    if row["collective"] not in _OPERATIONS:
        return f"{row['collective']} is not priced"
    if row["algorithm"] and row["algorithm"].lower() not in ("ring", "tree", "nvls", "nvlstree"):
        return f"{row['algorithm']} is not an algorithm of the library"
    if system is None or not system["accelerator"]:
        return "the system is not described"
    if not row["n_nodes"] or not row["n_gpus"]:
        return "the number of nodes or GPUs is not stated"
    if float(row["n_nodes"]) > 1 and not system["scaleout_link"]:
        return "the network is not stated"
    return ""


def _sweep(name: str, rows: list[dict[str, str]], system: dict[str, str]) -> Sweep:
    first = rows[0]
    nodes, ranks = int(float(first["n_nodes"])), int(float(first["n_gpus"]))
    per_node = int(system["gpus_per_node"])
    network = system["scaleout_GBps_per_node"]
    cluster = make_cluster(
        accelerator=system["accelerator"],
        num_gpus=nodes * per_node,
        gpus_per_node=per_node,
        domain_gpus=int(system["domain_gpus"]),
        scaleout_bandwidth_per_node=float(network) * 1e9 if network else None,
        scaleout_link=system["scaleout_link"] or None,
    )
    peers = system["peer_gpus"]
    if peers and ranks > int(peers):
        cluster = replace(cluster, scaleup_link="host-staged")
    used = max(ranks // nodes, 1)
    stride = per_node // used if nodes > 1 else 1
    rows = sorted(rows, key=lambda row: float(row["message_bytes"]))
    forced = {"nvlstree": "nvls_tree"}.get(first["algorithm"].lower(), first["algorithm"].lower())
    return Sweep(
        name=name,
        system=first["system"],
        operation=_OPERATIONS[first["collective"]],
        cluster=cluster,
        group=Group(size=ranks, stride=stride, ranks_per_process=used if system["one_process"] == "yes" else 1),
        algorithm=forced or None,
        sizes_bytes=tuple(float(row["message_bytes"]) for row in rows),
        times_s=tuple(float(row["time_us"]) * 1e-6 for row in rows),
        fitted=ranks <= int(system["fit_up_to_gpus"] or ranks),
    )
