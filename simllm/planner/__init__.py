"""Which plan is best, and why the others are not."""

from simllm.planner.constraints import Constraints
from simllm.planner.search import OBJECTIVES, PlanSearch, plan

__all__ = ["OBJECTIVES", "Constraints", "PlanSearch", "plan"]
