"""The chosen plan in the words of Megatron-LM, DeepSpeed, torchtitan and accelerate, and their words as a plan."""

from simllm.export.formats import FRAMEWORKS, export, read_settings
from simllm.export.job import Exported, Imported, Job

__all__ = ["FRAMEWORKS", "Exported", "Imported", "Job", "export", "read_settings"]
