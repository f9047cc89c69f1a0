"""The step: models, hardware and plans composed into time, memory, money."""

from simllm.training.estimate import Estimate, estimate
from simllm.training.run import Training

__all__ = ["Estimate", "Training", "estimate"]
