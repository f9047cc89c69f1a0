"""Measured times of a collective over sizes, on a machine that is described."""

from __future__ import annotations

from dataclasses import dataclass

from simllm.hardware.cluster import Cluster
from simllm.network.group import Group

__all__ = ["Sweep"]


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
