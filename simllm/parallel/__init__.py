"""How it is split: the plan, the collectives it needs, pipeline schedules, memory per rank."""

from simllm.parallel.plan import Plan

__all__ = ["Plan"]
