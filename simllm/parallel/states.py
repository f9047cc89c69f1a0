"""What training keeps per parameter: the compute copy, the gradient, a float32 master, the optimizer's moments.

The copies are the software's (`simllm.hardware.stack.States`), the moments the optimizer's. Some moments depend on the
shape of a weight (Adafactor) or on how large it is (8-bit Adam), so they are a fold over the weights of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from simllm.errors import unknown_name
from simllm.hardware.stack import Stack
from simllm.models.graph import Graph, Layout, Weight

__all__ = [
    "OPTIMIZERS",
    "Optimizer",
    "StateBytes",
    "StateTerm",
    "block_moments",
    "optimizer_named",
    "state_bytes",
    "state_terms",
]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer by what it remembers of each weight.

    Attributes
    ----------
    name : str
    explanation : str
        What the moments are, in words.
    moments : callable
        ``(weight, shape, element_bytes) -> bytes`` of one weight of that shape on a rank; ``element_bytes`` is 4 beside
        a float32 master and 2 where all states are kept in bf16.
    """

    name: str
    explanation: str
    moments: Callable[[Weight, tuple[int, ...], int], float]


def _adam(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    return 2 * element * prod(shape)


def _none(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    return 0.0


def _momentum(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    return element * prod(shape)


def _adafactor(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    """Row and column means of the squared gradient of a matrix (of each expert's), all of it for a vector."""
    if len(shape) < 2:
        return 4.0 * prod(shape)
    *batch, rows, columns = shape
    return 4.0 * prod(batch) * (rows + columns)


#: bitsandbytes quantises in blocks of this many elements with one float32 scale each, and leaves smaller tensors alone.
_ADAM8_BLOCK = 256
_ADAM8_SMALLEST = 4096


def _adam8bit(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    count = prod(shape)
    if count < _ADAM8_SMALLEST:
        return 8.0 * count
    return 2.0 * (count + 4 * ceil(count / _ADAM8_BLOCK))


def _muon(weight: Weight, shape: tuple[int, ...], element: int) -> float:
    """Momentum for the matrices inside the layers; tables, head and vectors stay with Adam."""
    matrix = len(shape) >= 2 and weight.component not in ("embedding", "head", "norm", "relative_bias")
    return (1 if matrix else 2) * element * prod(shape)


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(name="adam", explanation="first and second moment (arXiv:1412.6980)", moments=_adam),
        Optimizer(name="sgd", explanation="nothing", moments=_none),
        Optimizer(name="sgd-momentum", explanation="one moment", moments=_momentum),
        Optimizer(
            name="adafactor",
            explanation="row and column means of the second moment, float32, no first moment (arXiv:1804.04235)",
            moments=_adafactor,
        ),
        Optimizer(
            name="adam-8bit",
            explanation="both moments in one byte with a float32 scale per 256 elements; tensors below 4,096 elements "
            "in float32 (arXiv:2110.02861, bitsandbytes)",
            moments=_adam8bit,
        ),
        Optimizer(
            name="muon",
            explanation="one moment for matrices, Adam's two for tables, head and vectors (arXiv:2502.16982)",
            moments=_muon,
        ),
    )
}


def optimizer_named(name: str) -> Optimizer:
    """An optimizer by name.

    >>> optimizer_named("adam").explanation
    'first and second moment (arXiv:1412.6980)'
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]


@dataclass(frozen=True, slots=True)
class StateTerm:
    """One multiplier of the parameters, with what it is and why."""

    what: str
    bytes_per_parameter: float
    why: str


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes per parameter before sharding, the moments apart: they depend on the weight.

    Attributes
    ----------
    parameter, gradient, master : float
        Compute copy, accumulated gradient, float32 master.
    gathered, gradient_on_wire : float
        Copy that layers compute with under full sharding, and what a gradient reduction sends.
    moment_element : int
        Bytes of one element of an optimizer moment.
    buckets : float
        Bytes of communication buffers beside the gradients.
    """

    parameter: float
    gradient: float
    master: float
    gathered: float
    gradient_on_wire: float
    moment_element: int
    buckets: float = 0.0

    @property
    def update_traffic(self) -> float:
        """Bytes moved per parameter by an optimizer step, the moments apart.

        The update reads the gradients and zeroing writes them. The master is read and written and the compute copy
        written; without a master the parameter itself is read and written.
        """
        return 2 * self.gradient + (2 * self.master + self.parameter if self.master else 2 * self.parameter)

    @property
    def norm_traffic(self) -> float:
        """Bytes read per parameter for the norm of the gradients."""
        return self.gradient

    @property
    def scaling_traffic(self) -> float:
        """Bytes moved per parameter to scale the gradients down: read and written."""
        return 2 * self.gradient

    @property
    def host_update_traffic(self) -> float:
        """Bytes that an update on the host moves per parameter, the moments apart.

        The gradient that came over the link is read once, the float32 parameter read and written, the copy for the
        device written.
        """
        return self.gradient_on_wire + (2 * self.float32_master + self.parameter if self.master else 2 * self.parameter)

    @property
    def float32_master(self) -> float:
        """The master without a gradient shard that some software keeps beside it."""
        return min(self.master, 4.0)


@lru_cache(maxsize=256)
def state_bytes(
    stack: Stack, precision: str, master_weights: bool | None = None, gradient_bytes: int | None = None
) -> StateBytes:
    """The copies that a stack keeps per parameter.

    Parameters
    ----------
    stack : Stack
    precision : str
        In fp32 and tf32 there is one copy only, of 4 bytes.
    master_weights : bool, optional
        False: no float32 copy at all, parameters, gradients and moments in 16 bits. None: as the stack does.
    gradient_bytes : int, optional
        Bytes of an accumulated gradient, 4 or 2; None: as the stack does.
    """
    if precision in ("fp32", "tf32"):
        return StateBytes(4.0, 4.0, 0.0, 4.0, 4.0, 4)
    states = stack.states
    if master_weights is False:
        gradient = float(gradient_bytes or 2)
        return StateBytes(2.0, gradient, 0.0, 2.0, min(gradient, states.gradient_on_wire.si), 2)
    other = states.gradient_bf16 if precision != "fp16" else None
    buffer = other or states.gradient
    buckets = states.gradient_buckets.si if states.gradient_buckets and not other else 0.0
    gradient, wire = buffer.si, states.gradient_on_wire.si
    if gradient_bytes is not None:
        gradient, wire = float(gradient_bytes), min(float(gradient_bytes), wire)
    return StateBytes(states.parameter.si, gradient, states.master.si, states.gathered_parameter.si, wire, 4, buckets)


def state_terms(stack: Stack, states: StateBytes, optimizer: Optimizer, moments: float) -> tuple[StateTerm, ...]:
    """Every multiplier in words: what is kept, in how many bytes, and why.

    Parameters
    ----------
    stack : Stack
    states : StateBytes
    optimizer : Optimizer
    moments : float
        Bytes of moments per parameter, a mean over the weights.
    """
    own = stack.states
    gradient = next((g for g in (own.gradient, own.gradient_bf16) if g and g.si == states.gradient), own.gradient)

    def why(source: str, kept: float, usual: float) -> str:
        return source if kept == usual else "set for this run"

    terms = [
        StateTerm("parameter", states.parameter, why(own.parameter.source, states.parameter, own.parameter.si)),
        StateTerm("gradient", states.gradient, why(gradient.source, states.gradient, gradient.si)),
    ]
    if states.master:
        terms.append(StateTerm("master", states.master, why(own.master.source, states.master, own.master.si)))
    return (*terms, StateTerm("moments", moments, f"{optimizer.name}: {optimizer.explanation}"))


@lru_cache(maxsize=1 << 16)
def block_moments(
    graph: Graph, layout: Layout, optimizer: str, element: int, keep_tied: bool = False, paged: bool = False
) -> tuple[float, float]:
    """Bytes of optimizer moments of the dense and of the expert weights of one block on one rank.

    Those on the device, or with ``paged`` those in pages of the host.
    """
    moments = optimizer_named(optimizer).moments
    dense = expert = 0.0
    for weight in graph.weights:
        if not weight.trained or weight.paged != paged or not weight.stored(keep_tied):
            continue
        shape = tuple(layout.size(axis) for axis in weight.axes)
        size = 0.0
        if weight.moment_rank:
            *batch, rows, columns = shape
            rank = min(weight.moment_rank, rows, columns)
            size += element * prod(batch) * rank * min(rows, columns)
            shape = (*batch, max(rows, columns), rank)
        size += moments(weight, shape, element)
        if weight.is_expert:
            expert += size
        else:
            dense += size
    return dense, expert
