"""The one graph: axes, tensors, weights, operators, and how large they are on one rank.

A block of a model is a short list of operators with tensors between them. Tensor sizes are symbolic: an axis is
tokens, heads, hidden, experts, ..., and a `Layout` says how long each axis is for one micro-batch on one rank. The
unsharded layout gives the counts of the model; a layout with degrees gives those of a rank. Nothing else in simllm
knows the shape of anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import ClassVar, Literal

from simllm.models.routing import BALANCED, Routing
from simllm.models.work import Work

__all__ = [
    "Axis",
    "Graph",
    "Implementation",
    "Layout",
    "ModelGraph",
    "Operator",
    "Storage",
    "Tensor",
    "Weight",
]

AxisName = Literal[
    "tokens",  # tokens of the (decoder) sequence in one micro-batch; `size` is a multiplier
    "source_tokens",  # tokens of the encoder's sequence
    "routed",  # tokens after routing; `size` is num_experts_per_tok, `units` num_experts
    "keys",  # the sequence as attended to by one query
    "source_keys",
    "hidden",
    "heads",
    "kv_heads",
    "ffn",
    "expert_ffn",
    "inner",  # the channels of a state-space mixer
    "vocab",
    "experts",
    "virtual",  # learned tokens beside those of the sequence; `size` of them in every sequence
    "learned",  # learned tokens before they are copied to every sequence
    "fixed",  # never sharded
]
_TP_AXES = frozenset({"heads", "kv_heads", "ffn", "vocab", "inner"})
_FIXED_BYTES = {"float32": 4, "mask": 1, "index": 8}
_TOKEN_AXES = frozenset({"tokens", "source_tokens", "routed", "virtual", "learned"})


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a tensor: its name decides how it is sharded, ``units`` in how many pieces it can be at most."""

    name: AxisName
    size: int = 1
    units: int = 0

    def __post_init__(self) -> None:
        if not self.units:
            object.__setattr__(self, "units", self.size)


@dataclass(frozen=True)
class Tensor:
    """An activation.

    ``dtype``: activation (the compute precision), float32, mask (1 byte), index (8 bytes), or logits, whose bytes
    depend on how the loss is implemented. ``gathered``: it holds the tokens of the whole tp group, also where sequence
    parallelism would split them.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: Literal["activation", "float32", "mask", "index", "logits"] = "activation"
    gathered: bool = False

    @cached_property
    def tp_sharded(self) -> bool:
        """Whether tensor parallelism splits an axis other than the tokens."""
        return any(axis.name in _TP_AXES for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a frozen weight is kept when not in the compute precision: quantised in blocks, expanded at every use.

    Attributes
    ----------
    name : str
    bits : int
        Of one element.
    block : int
        Consecutive elements that share a scale.
    scale_bytes : float
        Of one scale.
    scales_block : int
        Scales that are themselves quantised together, with a second scale of four bytes; 0: they are not.
    table_bytes : int
        Beside each weight: the values that the codes stand for.
    """

    name: str
    bits: int
    block: int
    scale_bytes: float
    scales_block: int = 0
    table_bytes: int = 0

    def bytes(self, elements: int) -> float:
        """Bytes of a weight with so many elements.

        >>> Storage("nf4", 4, 64, 4.0).bytes(128)
        72.0
        """
        scales = -(-elements // self.block)
        second = 4 * -(-scales // self.scales_block) if self.scales_block else 0
        return -(-elements * self.bits // 8) + scales * self.scale_bytes + second + self.table_bytes


@dataclass(frozen=True)
class Weight:
    """An array of the model. ``active``: the fraction (used, stored) that one token passes through."""

    name: str
    axes: tuple[Axis, ...]
    component: str
    active: tuple[int, int] = (1, 1)
    #: The weight is the same memory as another one (a tied head): it does work, but is counted there.
    tied: bool = False
    #: Tied to a weight that every rank with this one holds in any case, so that no rank needs a copy for it.
    beside: bool = False
    #: Whether it has a gradient, and with it optimizer states.
    trained: bool = True
    #: How it is kept while frozen; None: in the precision that it computes with.
    storage: Storage | None = None
    #: Rank of the projection of its gradient that the optimizer's moments are kept of (GaLore); 0: of the gradient.
    moment_rank: int = 0
    #: Its optimizer states are in pages of the host's memory, and cross the link to the host for every update.
    paged: bool = False
    #: False: a constant that takes memory and work, but is not a parameter (VeRA's random matrices).
    counted: bool = True

    @cached_property
    def is_expert(self) -> bool:
        """Whether expert parallelism splits it."""
        return any(axis.name == "experts" for axis in self.axes)

    def stored(self, keep_tied: bool) -> bool:
        """Whether a rank has memory for it; ``keep_tied``: the weight it is tied to is on another pipeline rank."""
        return not self.tied or (keep_tied and not self.beside)

    @cached_property
    def elements(self) -> int:
        """Elements of the whole weight."""
        return prod(axis.size for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """How the operators are carried out: what is fused, and in how many bytes. Named facts of a software stack.

    Attributes
    ----------
    attention : {"flash", "unfused"}
        ``unfused`` stores the scores (Korthikanti 2022, arXiv:2205.05198, section 4.1); ``flash`` stores q, k, v,
        the output and one float32 log-sum-exp per query and head (Dao 2022, arXiv:2205.14135).
    softmax : {"activation", "float32"}
        Of ``unfused`` attention: ``activation`` keeps the softmax in the compute precision (a fused scale-mask-softmax
        kernel); ``float32`` computes and keeps it in float32 beside the copy that the values are weighted with
        (transformers' and Meta's Llama, Megatron's ``attention_softmax_in_fp32`` without the fused kernel).
    activation : {"fused", "eager"}
        ``fused``: a gated activation is one kernel that keeps only its two inputs, and every other one keeps one
        tensor. ``eager``: the chain of PyTorch operators that transformers writes.
    norm : {"fused", "eager"}
        ``eager``: RMSNorm as separate float32 operators; they keep the input in float32 and the result before the
        weight.
    rope : {"fused", "eager"}
    dropout_add : {"fused", "eager"}
    sequence_gather : {"again", "kept"}
        Under sequence parallelism, the input of a product that is split over its outputs: ``again`` keeps this rank's
        tokens and gathers the others' again in the backward pass (Megatron; Korthikanti 2022, section 4.2.2); ``kept``
        keeps the gathered tokens (PyTorch's DTensor, torchtitan).
    context_output : {"again", "kept"}
        Where context parallelism exchanges tokens for heads, the backward pass of attention needs its output by heads:
        exchanged ``again`` (TransformerEngine), or ``kept`` beside the one by tokens (DeepSpeed Ulysses, where autograd
        keeps it).
    context_steps : {"fused", "eager"}
        How attention to one part of the keys after the other adds up. ``fused``: one kernel a step; gradients of keys
        and values go round the ring with them in the compute precision, or are reduced and scattered where keys and
        values were gathered, and one kernel saw all of them (TransformerEngine). ``eager``: single operators in
        float32; keys and values that were gathered are attended to in parts too, and gradients go round a ring in
        float32 in either case, all the way home (PyTorch's context parallel attention).
    router_weights : {"output", "activation"}
        Where the router's weight of a token multiplies: the expert's ``output``, which is then kept (transformers), or
        its ``activation`` (Megatron-Core's weighted SwiGLU), which has the same effect as long as the expert's last
        product has no bias.
    expert_extras : {"fused", "eager"}
        The limits of a clamped activation and, with weights on the ``activation``, the router's weight on the bias of
        an expert's last product: in the kernels of these, or as chains of PyTorch operators (Megatron-Core's
        ``TEGroupedMLP``).
    activation_bytes : int
        Bytes of one element of an activation.
    logits_saved_bytes : float
        Bytes kept per logit until the loss has gone backward.
    loss_traffic_bytes : float
        Bytes moved per logit by the loss, forward and backward together.
    """

    attention: Literal["flash", "unfused"] = "flash"
    softmax: Literal["activation", "float32"] = "activation"
    activation: Literal["fused", "eager"] = "fused"
    norm: Literal["fused", "eager"] = "fused"
    rope: Literal["fused", "eager"] = "fused"
    dropout_add: Literal["fused", "eager"] = "fused"
    sequence_gather: Literal["again", "kept"] = "again"
    context_output: Literal["again", "kept"] = "again"
    context_steps: Literal["fused", "eager"] = "fused"
    router_weights: Literal["output", "activation"] = "output"
    expert_extras: Literal["fused", "eager"] = "fused"
    activation_bytes: int = 2
    logits_saved_bytes: float = 4.0
    loss_traffic_bytes: float = 20.0

    def bytes_of(self, tensor: Tensor) -> float:
        """Bytes of one element of a tensor."""
        if tensor.dtype == "activation":
            return self.activation_bytes
        return self.logits_saved_bytes if tensor.dtype == "logits" else _FIXED_BYTES[tensor.dtype]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One micro-batch on one rank: how long each axis is there.

    Attributes
    ----------
    batch, seq_len : int
        Sequences in the micro-batch, tokens in a sequence.
    source_len : int
        Tokens in a sequence of the encoder; 0: the same as ``seq_len``.
    tp, cp, ep, etp : int
        Degrees of tensor, context, expert and expert-tensor parallelism.
    cp_heads : int
        Context-parallel ranks that exchange tokens for heads around attention (DeepSpeed Ulysses, arXiv:2309.14509);
        the ``cp // cp_heads`` groups of them split the queries and pass keys and values on.
    cp_gathers : bool
        Those that split the queries gather the keys and values of all (arXiv:2407.21783, section 3.3.2) instead of
        passing them round a ring (arXiv:2310.01889).
    sequence_parallel : bool
        Tokens are also split over tp where no other axis is (Korthikanti 2022, section 4.2.2).
    prefix_len : int
        Tokens of the bidirectional prefix, for prefix decoders.
    vocab_multiple : int
        The vocabulary on each rank is padded to a multiple of this.
    cached : int
        Tokens of every sequence whose keys and values are in a cache: generation asks about ``seq_len`` tokens after
        them.
    routing : Routing
        How tokens spread over the experts; the rank is the busiest one.
    """

    batch: int = 1
    seq_len: int = 1
    source_len: int = 0
    tp: int = 1
    cp: int = 1
    cp_heads: int = 1
    cp_gathers: bool = False
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    prefix_len: int = 0
    vocab_multiple: int = 1
    cached: int = 0
    routing: Routing = BALANCED

    _DEGREE: ClassVar[dict[str, str]] = {
        "heads": "tp",
        "kv_heads": "tp",
        "ffn": "tp",
        "vocab": "tp",
        "inner": "tp",
        "experts": "ep",
        "expert_ffn": "etp",
    }

    def size(self, axis: Axis, split_tokens: bool = False) -> int:
        """Length of an axis on this rank.

        Heads that are fewer than the degree are replicated; other axes are padded up to a whole number of pieces.
        ``split_tokens``: the tensor is in the region where sequence parallelism splits the tokens.
        """
        name = axis.name
        if name == "tokens":
            tokens = axis.size * self.batch * self.seq_len // self.cp
            return tokens // self.tp if split_tokens and self.sequence_parallel else tokens
        if name == "source_tokens":
            tokens = axis.size * self.batch * self.encoder_len // self.cp
            return tokens // self.tp if split_tokens and self.sequence_parallel else tokens
        if name == "routed":
            tokens = self.batch * self.seq_len // self.cp // (self.tp if self.sequence_parallel else 1)
            # The busiest rank receives this many; expert-tensor ranks share their tokens.
            return self.routing.rows(tokens, axis.size, axis.units, self.ep, self.etp)
        if name == "keys":
            return self.seq_len + self.cached
        if name == "source_keys":
            return self.encoder_len
        if name == "virtual":
            return axis.size * self.batch
        attribute = self._DEGREE.get(name)
        if attribute is None:
            return axis.size
        degree: int = getattr(self, attribute)
        if name == "vocab":
            return -(-axis.size // (degree * self.vocab_multiple)) * self.vocab_multiple
        return axis.size if degree == 1 else axis.size // axis.units * -(-axis.units // degree)

    @property
    def cp_parts(self) -> int:
        """In how many parts context parallelism splits the queries of a head."""
        return self.cp // self.cp_heads

    @property
    def encoder_len(self) -> int:
        """Tokens in a sequence of the encoder."""
        return self.source_len or self.seq_len

    def elements(self, tensor: Tensor) -> int:
        """Elements of an activation on this rank."""
        split = not (tensor.tp_sharded or tensor.gathered)
        count = 1
        for axis in tensor.axes:
            count *= self.size(axis, split)
        return count

    def tokens(self, tensor: Tensor, gathered: bool = False) -> int:
        """Rows of an activation seen as a matrix: the product of its token axes."""
        split = not (tensor.tp_sharded or gathered)
        return prod(self.size(axis, split) for axis in tensor.axes if axis.name in _TOKEN_AXES)

    def width(self, axes: Iterable[Axis]) -> int:
        """Product of the lengths of axes that are not tokens."""
        return prod(self.size(axis) for axis in axes if axis.name not in _TOKEN_AXES)

    def weight_elements(self, weight: Weight) -> int:
        """Elements of a weight on this rank."""
        return prod(self.size(axis) for axis in weight.axes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """A node of the graph. Subclasses say what work it is and which tensors its backward pass needs."""

    name: str
    component: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Weight, ...] = ()

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        """The work of the forward pass on one rank."""
        raise NotImplementedError

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        """The work of the gradient of the inputs on one rank."""
        raise NotImplementedError

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        """The work of the gradient of the weights on one rank."""
        return ()

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        """The tensors that the backward pass needs."""
        return ()

    def kept_beside(self, layout: Layout, impl: Implementation) -> float:
        """Bytes kept for the backward pass beside the tensors of the graph: other layouts of them."""
        return 0.0

    def buffers(self, layout: Layout, impl: Implementation) -> float:
        """Bytes of other layouts of its tensors, and of their gradients, at work in the backward pass."""
        return 0.0

    def cached(self) -> tuple[Tensor, ...]:
        """The tensors that generation keeps for later tokens."""
        return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """The operators of one block in order, from ``input`` to ``output``.

    ``lends``: tensors that later blocks read and keep for their backward pass (the encoder's result); they are kept
    once, here. ``borrows``: names of such tensors in the blocks that read them.
    """

    name: str
    operators: tuple[Operator, ...]
    input: Tensor
    output: Tensor
    lends: tuple[Tensor, ...] = ()
    borrows: frozenset[str] = frozenset()
    #: Tensors from outside that nothing trained went into: no gradient is asked of them.
    frozen_inputs: frozenset[str] = frozenset()

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every weight of the block."""
        return tuple(weight for operator in self.operators for weight in operator.weights)

    @cached_property
    def differentiated(self) -> frozenset[str]:
        """Names of the tensors that something trained went into: the backward pass asks for their gradient."""
        produced = {tensor.name for operator in self.operators for tensor in operator.outputs}
        found: set[str] = set()
        for operator in self.operators:
            outside = (t for t in operator.inputs if t.name not in produced and t.dtype != "index")
            found.update(t.name for t in outside if t.name not in self.frozen_inputs)
            if any(w.trained for w in operator.weights) or any(t.name in found for t in operator.inputs):
                found.update(tensor.name for tensor in operator.outputs)
        return frozenset(found)

    def needs_input_gradient(self, operator: Operator) -> bool:
        """Whether the backward pass goes through an operator to what came before it."""
        return any(tensor.name in self.differentiated for tensor in operator.inputs)

    def runs_backward(self, operator: Operator) -> bool:
        """Whether the backward pass has anything to do at an operator."""
        return any(weight.trained for weight in operator.weights) or self.needs_input_gradient(operator)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelGraph:
    """A model as a sequence of blocks.

    Attributes
    ----------
    stem : Graph
        From token ids to the first layer.
    layers : tuple of Graph
        In order, encoder before decoder; equal layers are the same object.
    head : Graph
        From the last layer to the loss.
    bridges : tuple of (int, Graph)
        What stands between layers: for encoder-decoders, the encoder's final norm and the decoder's embedding stand
        before the layer with this index.
    last_layers, last_extras : tuple of Graph
        What stands beside the head without being one of the layers that are dealt out to pipeline ranks: the layers
        of multi-token prediction, and what is around them.
    virtual_tokens : int
        Learned tokens in front of every sequence, which all layers see.
    """

    stem: Graph
    layers: tuple[Graph, ...]
    head: Graph
    bridges: tuple[tuple[int, Graph], ...] = field(default=())
    last_layers: tuple[Graph, ...] = field(default=())
    last_extras: tuple[Graph, ...] = field(default=())
    virtual_tokens: int = 0

    @cached_property
    def parts(self) -> tuple[tuple[Graph, int], ...]:
        """Every distinct block with how often it occurs."""
        outside = ((graph, 1) for graph in (*(bridge for _, bridge in self.bridges), *self.last_extras, self.head))
        return ((self.stem, 1), *self.layer_parts, *outside)

    @cached_property
    def layer_parts(self) -> tuple[tuple[Graph, int], ...]:
        """Every distinct layer with how often it occurs, those of multi-token prediction included."""
        order: list[Graph] = []
        times: dict[int, int] = {}
        for layer in (*self.layers, *self.last_layers):
            if id(layer) not in times:
                order.append(layer)
            times[id(layer)] = times.get(id(layer), 0) + 1
        return tuple((layer, times[id(layer)]) for layer in order)
