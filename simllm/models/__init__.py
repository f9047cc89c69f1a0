"""What is computed: models as data, and the one graph that everything is counted from."""

from simllm.models.model import Model
from simllm.models.spec import ModelSpec

__all__ = ["Model", "ModelSpec"]
