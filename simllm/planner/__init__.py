"""Which plan is best, and why the others are not."""

from simllm.planner.constraints import Constraints
from simllm.planner.finetune import FineTuning, compare_methods, finetune
from simllm.planner.search import OBJECTIVES, PlanSearch, plan

__all__ = ["OBJECTIVES", "Constraints", "FineTuning", "PlanSearch", "compare_methods", "finetune", "plan"]
