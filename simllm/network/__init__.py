"""What one collective costs on one group of one cluster, and which link limits it."""

from __future__ import annotations

from simllm.network.group import Group
from simllm.network.price import OPERATIONS, CollectiveCost, bus_factor, price, price_array, sweep

__all__ = ["OPERATIONS", "CollectiveCost", "Group", "bus_factor", "price", "price_array", "sweep"]
