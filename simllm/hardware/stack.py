"""Software stacks: what a training framework does, as named physical facts.

A stack says which kernels run, what is fused, what overlaps, what is kept in memory and in how many bytes. It holds no
multiplier for a run, a model or a row: only facts that hold wherever the software is used, each with its source.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from simllm.hardware.figures import Bytes, Count, Figure
from simllm.hardware.profiles import figures_of, find_profile, list_profiles, load_profile_file, register_kind
from simllm.hardware.profiles import load_profile as _load_profile

__all__ = ["BytesPer", "Fraction", "Overlap", "Stack", "States", "list_stacks", "load_stack"]


class Fraction(Figure, frozen=True):
    """A share between 0 and 1."""

    dimension: ClassVar[str | None] = "fraction"
    minimum: ClassVar[float | None] = 0.0
    maximum: ClassVar[float | None] = 1.0


class Seconds(Figure, frozen=True):
    """A time, possibly none."""

    dimension: ClassVar[str | None] = "time"
    minimum: ClassVar[float | None] = 0.0


class BytesPer(Figure, frozen=True):
    """Bytes per parameter or per logit, possibly none."""

    dimension: ClassVar[str | None] = "bytes/param"
    minimum: ClassVar[float | None] = 0.0


class Factor(Figure, frozen=True):
    """A ratio of one implementation to the ideal one."""

    dimension: ClassVar[str | None] = "count"


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which kernels run.

    Attributes
    ----------
    attention : str
        ``best``: the fastest fused kernel there is for the device; or ``unfused``, ``flash1``, ``flash2``, ``flash3``,
        ``cudnn``.
    attention_rate : Fraction
        Rate of the stack's attention relative to that kernel's measurements: an older or untuned build.
    norm, activation, rope, dropout_add : str
        ``fused`` or ``eager`` (a chain of single PyTorch operators).
    sequence_gather : str
        Under sequence parallelism the gathered input of a product is gathered ``again`` in the backward pass, or
        ``kept``.
    context_output : str
        Where context parallelism trades tokens for heads, the output of attention by heads is exchanged ``again`` in
        the backward pass, or ``kept``.
    context_steps : str
        Attention to one part of the keys after the other adds up in a ``fused`` kernel a step, in the compute
        precision, or in ``eager`` operators in float32.
    router_weights : str
        Where the router's weight of a token multiplies: the expert's ``output``, which is then kept, or its
        ``activation``.
    expert_extras : str
        What an expert has beside its products and activation, the limits of a clamped activation and the router's
        weight on the bias of the last product: ``fused`` with these, or ``eager``, a chain of single operators.
    """

    attention: Literal["best", "unfused", "flash1", "flash2", "flash3", "cudnn"]
    attention_rate: Fraction
    norm: Literal["fused", "eager"]
    activation: Literal["fused", "eager"]
    rope: Literal["fused", "eager"]
    dropout_add: Literal["fused", "eager"]
    sequence_gather: Literal["again", "kept"]
    context_output: Literal["again", "kept"]
    context_steps: Literal["fused", "eager"]
    router_weights: Literal["output", "activation"]
    expert_extras: Literal["fused", "eager"] = "fused"


class Overlap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of the communication stays visible although it runs beside computation.

    ``*_exposed``: the share of min(communication, computation) that still shows; 1 means one after the other.
    ``context_parallel_exposed`` is that of a ring beside all of attention, ``context_gather_exposed`` that of gathered
    keys and values beside attention to the rank's own. What trades tokens for heads has nothing beside it.
    """

    tensor_parallel_exposed: Fraction
    context_parallel_exposed: Fraction
    context_gather_exposed: Fraction
    expert_parallel_exposed: Fraction
    gradient_exposed: Fraction
    parameter_gather_exposed: Fraction
    fully_sharded_exposed: Fraction
    pipeline_exposed: Fraction


class States(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes kept per parameter in mixed precision, before sharding; the optimizer's moments come on top.

    Attributes
    ----------
    parameter : BytesPer
        The copy the layers are stored in.
    gradient : BytesPer
        The buffer that gradients accumulate in.
    master : BytesPer
        What the optimizer updates besides its moments: a float32 copy of the parameters; sharded from ZeRO stage 1 on.
    gathered_parameter : BytesPer
        The copy that layers compute with under full sharding, while they are gathered.
    gradient_on_wire : BytesPer
        Bytes per parameter that a gradient reduction sends.
    gradient_buckets : Bytes, optional
        Buffers that gradients and parameters pass through on their way to other ranks, where they are not the gradient
        buffer itself; at most a gradient and a parameter of every parameter.
    gradient_bf16 : BytesPer, optional
        The gradient buffer of runs in bf16, where the software has another optimizer for them: without buckets.
    """

    parameter: BytesPer
    gradient: BytesPer
    master: BytesPer
    gathered_parameter: BytesPer
    gradient_on_wire: BytesPer
    gradient_buckets: Bytes | None = None
    gradient_bf16: BytesPer | None = None


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs of the framework around the layers.

    Attributes
    ----------
    host_per_layer_forward : Seconds
        Time the host needs to launch one layer forward; a layer is never faster. The backward takes
        ``host_backward_ratio`` times as long.
    host_join : Factor
        Exponent of the norm that joins the host's time and the device's: 1 one after the other, large the longer one.
    loss_traffic, logits_saved : BytesPer
        Bytes moved (forward and backward) and kept per logit.
    gradient_accumulation : BytesPer
        Bytes moved per parameter to add a micro-batch's gradient to the sum by kernels of their own; 0 where
        the product that makes the gradient also adds it.
    moe_permute_traffic : Factor
        Bytes moved to permute tokens to experts and back, relative to one read and one write.
    context, communicator : Bytes
        Device memory outside the framework's allocator: the CUDA context with its libraries, and NCCL's buffers for
        every group of several ranks that a rank communicates in.
    expert_launch : Seconds, optional
        Where products of experts are launched expert by expert: time for each kernel of each expert. None: one kernel
        works for all experts.
    expert_wait : Seconds, optional
        Where the host waits in every layer of experts until it knows how many tokens each of them gets: time of the
        forward in which the device runs dry before the host is ahead again; the backward has ``host_backward_ratio``
        times as much. None: shapes are known beforehand, or the device reads them itself.
    """

    host_per_layer_forward: Seconds
    host_backward_ratio: Factor
    host_join: Factor
    loss_traffic: BytesPer
    logits_saved: BytesPer
    gradient_accumulation: BytesPer
    moe_permute_traffic: Factor
    context: Bytes
    communicator: Bytes
    expert_launch: Seconds | None = None
    expert_wait: Seconds | None = None


class Stack(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="stack"):
    """One software stack.

    Attributes
    ----------
    name, description : str
    frameworks : tuple of str
        How published tables spell it; the longest one that a framework's name starts with decides.
    expert_tensor_parallel : str
        ``tp``: experts are split like the dense layers; ``one``: expert groups fold over the tensor-parallel ranks.
    cp_comm_type : str
        How context-parallel ranks come to the keys of all tokens unless told otherwise.
    vocab_multiple : Count
        The vocabulary is padded to a multiple of this times tp.
    parameter_exchange : str
        After a sharded update every rank gathers the others' parameters, or receives each rank's by a ``broadcast``
        of its own.
    pipeline_tensor : str
        Without sequence parallelism every tensor-parallel rank holds the same activation. It sends its ``slice`` of it
        to the next stage, whose ranks gather the slices (arXiv:2104.04473, section 4.1), or the ``whole``.
    partial_gradients : str
        Gradients of whole weights that are partial over tp are summed ``together``, once a step in one buffer
        (Megatron-Core's finalize_model_grads), or ``each`` by itself where a micro-batch's are added up (PyTorch's
        distributed tensors, executed).
    """

    name: str
    description: str
    frameworks: tuple[str, ...]
    kernels: Kernels
    overlap: Overlap
    states: States
    costs: Costs
    expert_tensor_parallel: Literal["tp", "one"]
    vocab_multiple: Count
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    parameter_exchange: Literal["all_gather", "broadcast"] = "all_gather"
    pipeline_tensor: Literal["slice", "whole"] = "whole"
    partial_gradients: Literal["together", "each"] = "together"

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure by its key path."""
        return figures_of(self)


def list_stacks() -> tuple[str, ...]:
    """Names of the stacks in the catalog."""
    return list_profiles("stacks")


def load_stack(name: str) -> Stack:
    """A software stack by its name.

    >>> load_stack("megatron-core").states.master.si
    4.0
    """
    return load_profile_file(find_profile("stacks", name, "software stack"), Stack)


def _check(path: object, data: dict[str, object]) -> list[str]:
    _load_profile(data, Stack, str(path))
    return []


register_kind("stack", _check)
