"""What is trained: sequence length, software, and the memory that must stay free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from simllm.errors import InputError, unknown_name
from simllm.hardware.stack import Stack, load_stack
from simllm.models import Model
from simllm.models.context import CpCommType
from simllm.models.conventions import FLOP_CONVENTIONS
from simllm.models.routing import Routing
from simllm.parallel.states import StateBytes, optimizer_named, state_bytes

__all__ = ["Training", "check_experts"]


#: Above this an imbalance or a capacity factor is a slip: no model has as many experts.
_MOST_ROWS = 10**5


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, whatever the plan.

    Attributes
    ----------
    seq_len : int
        Tokens in a sequence; of an encoder-decoder, in that of the encoder and in that of the decoder.
    stack : str or Stack
        Software stack: a name in hardware_profiles/stacks, or a stack of one's own.
    memory_headroom : float
        Fraction of the device memory that must stay free for fragmentation; a plan that needs it does not fit.
    optimizer : str
        adam, sgd, sgd-momentum, adafactor, adam-8bit or muon.
    master_weights : bool, optional
        False: no float32 copy, all states in 16 bits. None: as the software does.
    gradient_precision : {"fp32", "bf16"}, optional
        Of accumulated gradients; None: as the software does.
    gradient_clipping : bool
        Gradients are scaled down to a largest norm over all parameters, as frameworks do unless told otherwise.
    expert_imbalance : float or "random"
        Rows of the busiest expert-parallel rank over the mean: 1 as most benchmarks force it, ``random`` for what
        chance gives (`simllm.models.routing.random_imbalance`).
    capacity_factor : float, optional
        Rows of an expert over its mean share, padded up to it; what exceeds it is dropped. None: nothing is.
    flop_convention : str
        How model FLOPs are counted for utilisation, a name in `simllm.models.conventions`.

    Examples
    --------
    >>> Training(seq_len=8192).software.name
    'megatron-core'
    """

    seq_len: int
    stack: str | Stack = "megatron-core"
    memory_headroom: float = 0.05
    optimizer: str = "adam"
    master_weights: bool | None = None
    gradient_precision: Literal["fp32", "bf16"] | None = None
    gradient_clipping: bool = True
    expert_imbalance: float | Literal["random"] = 1.0
    capacity_factor: float | None = None
    flop_convention: str = "full-attention"

    def __post_init__(self) -> None:
        if isinstance(self.seq_len, bool) or not isinstance(self.seq_len, int) or not 1 <= self.seq_len <= 2**27:
            raise InputError(f"seq_len={self.seq_len} must be a whole number from 1 to {2**27}")
        if not (math.isfinite(self.memory_headroom) and 0 <= self.memory_headroom < 1):
            raise InputError(f"memory_headroom={self.memory_headroom} must be at least 0 and below 1")
        if isinstance(self.stack, str):
            load_stack(self.stack)
        optimizer_named(self.optimizer)
        if self.flop_convention not in FLOP_CONVENTIONS:
            raise unknown_name("FLOP convention", self.flop_convention, FLOP_CONVENTIONS)
        if self.gradient_precision not in (None, "fp32", "bf16"):
            raise unknown_name("gradient precision", str(self.gradient_precision), ("fp32", "bf16"))
        self._check_routing()

    def _check_routing(self) -> None:
        imbalance, capacity = self.expert_imbalance, self.capacity_factor
        if imbalance != "random" and not (_is_number(imbalance) and 1 <= imbalance <= _MOST_ROWS):
            raise InputError(
                f"expert_imbalance={imbalance} must be random, or the busiest rank's tokens over the mean: at least 1"
            )
        if capacity is not None and not (_is_number(capacity) and 0 < capacity <= _MOST_ROWS):
            raise InputError(f"capacity_factor={capacity} must be above 0; 1 gives every expert its mean share")

    @property
    def routing(self) -> Routing:
        """How tokens spread over the experts."""
        return Routing(self.expert_imbalance, self.capacity_factor)

    @cached_property
    def software(self) -> Stack:
        """The software stack."""
        return load_stack(self.stack) if isinstance(self.stack, str) else self.stack

    def states(self, precision: str) -> StateBytes:
        """Bytes kept per parameter with matrix products of a precision, the optimizer's moments apart."""
        width = {None: None, "fp32": 4, "bf16": 2}[self.gradient_precision]
        return state_bytes(self.software, precision, self.master_weights, width)

    def expert_tensor_parallel(self, tp: int) -> int:
        """Tensor parallelism inside an expert that goes with a degree of tensor parallelism in this stack."""
        return tp if self.software.expert_tensor_parallel == "tp" else 1

    def context_kind(self, cp: int) -> CpCommType:
        """How this stack's context-parallel ranks come to the keys of all tokens unless told otherwise."""
        return self.software.cp_comm_type if cp > 1 else "p2p"


def check_experts(model: Model, training: Training) -> None:
    """Refuse an imbalance or a capacity of experts for a model that has none.

    Raises
    ------
    InputError
    """
    if "experts" in model.parameters.by_component:
        return
    for name, usual in (("expert_imbalance", 1.0), ("capacity_factor", None)):
        value = getattr(training, name)
        if value != usual:
            raise InputError(f"{name}={value}: {model.name} has no experts; leave it out")
