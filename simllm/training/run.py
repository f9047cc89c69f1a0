"""What is trained: sequence length, software, and the memory that must stay free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simllm.errors import InputError
from simllm.hardware.stack import Stack, load_stack

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, whatever the plan.

    Attributes
    ----------
    seq_len : int
        Tokens in a sequence (of the decoder).
    source_len : int
        Tokens in a sequence of the encoder; 0: as ``seq_len``.
    stack : str or Stack
        Software stack: a name in hardware_profiles/stacks, or a stack of one's own.
    memory_headroom : float
        Fraction of the device memory that must stay free for fragmentation; a plan that needs it does not fit.

    Examples
    --------
    >>> Training(seq_len=8192).software.name
    'megatron-core'
    """

    seq_len: int
    source_len: int = 0
    stack: str | Stack = "megatron-core"
    memory_headroom: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("source_len", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**27:
                raise InputError(f"{name}={value} must be a whole number from {least} to {2**27}")
        if not (math.isfinite(self.memory_headroom) and 0 <= self.memory_headroom < 1):
            raise InputError(f"memory_headroom={self.memory_headroom} must be at least 0 and below 1")
        if isinstance(self.stack, str):
            load_stack(self.stack)

    @property
    def software(self) -> Stack:
        """The software stack."""
        return load_stack(self.stack) if isinstance(self.stack, str) else self.stack

    def expert_tensor_parallel(self, tp: int) -> int:
        """Tensor parallelism inside an expert that goes with a degree of tensor parallelism in this stack."""
        return tp if self.software.expert_tensor_parallel == "tp" else 1
