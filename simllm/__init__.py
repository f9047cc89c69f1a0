"""simllm: what training a large language model costs on a cluster, how to split it, and how sure that is.

The names below are loaded when they are first used, so that ``import simllm`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simllm.hardware import Cluster
    from simllm.models import Model
    from simllm.models.activations import Recompute
    from simllm.network import Group, price
    from simllm.parallel import Plan
    from simllm.planner import compare_methods, finetune, plan
    from simllm.sweeps import sweep
    from simllm.training import Estimate, Training, estimate
    from simllm.training.alignment import align

__version__ = "0.1.0"

_HOME = {
    "Cluster": "simllm.hardware",
    "Estimate": "simllm.training",
    "Group": "simllm.network",
    "Model": "simllm.models",
    "Plan": "simllm.parallel",
    "Recompute": "simllm.models.activations",
    "Training": "simllm.training",
    "align": "simllm.training.alignment",
    "compare_methods": "simllm.planner",
    "estimate": "simllm.training",
    "finetune": "simllm.planner",
    "plan": "simllm.planner",
    "price": "simllm.network",
    "sweep": "simllm.sweeps",
}

__all__ = [
    "Cluster",
    "Estimate",
    "Group",
    "Model",
    "Plan",
    "Recompute",
    "Training",
    "align",
    "compare_methods",
    "estimate",
    "finetune",
    "plan",
    "price",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'simllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
