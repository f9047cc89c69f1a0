"""The operators of transformers and state-space models: their work, and what their backward pass keeps.

Bytes are counted as the operands a kernel must read and the results it must write, once each. ``eager`` variants
count what a chain of single PyTorch operators moves instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simllm.models.context import AttentionShape, ContextBytes, attention_kernels, context_copies, repeats
from simllm.models.graph import Axis, Implementation, Layout, Operator, Tensor
from simllm.models.work import Gemm, GroupedGemm, Stream, Work, attended_pairs

__all__ = [
    "Activation",
    "Attention",
    "Combine",
    "Concat",
    "Conv1d",
    "Dispatch",
    "Dropout",
    "Embedding",
    "GatedActivation",
    "GroupedProjection",
    "Loss",
    "Norm",
    "Projection",
    "Residual",
    "Rope",
    "Router",
    "Scan",
]

# Passes over a tensor by RMSNorm written as single operators, in bytes per element: to float32 (2+4), square (4+4),
# mean (4), scale (4+4), back (4+2), weight (2+2); its backward reads and writes about as many tensors twice.
_EAGER_RMSNORM_FORWARD = 36
_EAGER_RMSNORM_BACKWARD = 60
# What pointwise functions keep for their backward pass (PyTorch, derivatives.yaml): most their input, these their
# result, which is often kept by the next operator anyway.
_KEEPS_RESULT = frozenset({"relu", "sigmoid", "tanh"})
# Functions that Hugging Face writes as a chain of single operators: tensors the chain keeps beside the input. gelu_new
# is 0.5 x (1 + tanh(c (x + 0.044715 x^3))), of which 0.5 x, the tanh, and one plus it are kept.
_EAGER_CHAIN = {"gelu_new": 3, "gelu_fast": 6, "quick_gelu": 1}
# The weighted bias of an expert's last product as single operators, in bytes per element of the result. Bias times
# float32 weight (4), sum (2+4+4), the experts side by side (4+4), back to 16 bits (4+2). Backward: to float32 (2+4),
# the product's part back and side by side (4+2, 2+2), products with weight and bias (4+4, 4+4) and their sums (4, 4).
_EAGER_EXPERT_BIAS_FORWARD = 28
_EAGER_EXPERT_BIAS_BACKWARD = 40
# Rotary embedding as single operators on a tensor: negate and concatenate the halves (2+2 and 2+2), two products
# (2+2 each, the tables are small), one sum (4+2).
_EAGER_ROPE = 22


def _kept_by_function(
    function: str, x: Tensor, result: Tensor, impl: Implementation, operator: str
) -> tuple[Tensor, ...]:
    """What a pointwise function keeps, of its input and its result."""
    if function in _KEEPS_RESULT:
        return (result,)
    chain = _EAGER_CHAIN.get(function, 0) if impl.activation == "eager" else 0
    return (x, *(Tensor(f"{operator}.{function}_{step}", x.axes) for step in range(chain)))


def _weighted(result: Tensor, impl: Implementation) -> bool:
    """Whether an expert's activation is multiplied with the router's weight of its token."""
    return impl.router_weights == "activation" and result.axes[0].name == "routed"


def _bytes(layout: Layout, impl: Implementation, *tensors: Tensor) -> float:
    """Bytes of tensors on one rank."""
    return sum(layout.elements(tensor) * impl.bytes_of(tensor) for tensor in tensors)


def _expansion(operator: Operator, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
    """Quantised weights in the compute precision, made anew for each product: read packed, written, a kernel each."""
    return tuple(
        Stream(weight.storage.bytes(elements) + elements * impl.activation_bytes)
        for weight in operator.weights
        if weight.storage is not None
        for elements in (layout.weight_elements(weight),)
    )


def _trains_matrix(operator: Operator, axes: int) -> bool:
    """Whether a matrix among the weights has a gradient; its product with the input's gradient keeps the input."""
    return any(weight.trained for weight in operator.weights if len(weight.axes) >= axes)


def _weight_gradients(
    operator: Operator, bias: bool, products: tuple[Work, ...], layout: Layout, impl: Implementation
) -> tuple[Work, ...]:
    """The products of the matrices' gradients, and the sum over the tokens that is the biases'."""
    matrix = max(len(weight.axes) for weight in operator.weights)
    if bias and any(weight.trained for weight in operator.weights if len(weight.axes) < matrix):
        return (*products, Stream(_bytes(layout, impl, *operator.outputs)))
    return products


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection(Operator):
    """One matrix product with one or several weights side by side: ``y_i = x W_i + b_i``.

    The weights' first axis is contracted. Backward: input gradient and weight gradient are one product each. The
    input is kept for the gradient of a matrix only.
    """

    bias: bool = False

    def _shape(self, layout: Layout) -> tuple[int, int, int]:
        x = self.inputs[0]
        weights = [weight for weight in self.weights if len(weight.axes) > 1]
        # A product whose output or contraction is split over tp works on all tokens of the tp group.
        gathered = any(out.tp_sharded for out in self.outputs) or x.tp_sharded
        m = layout.tokens(x, gathered=gathered)
        k = layout.size(weights[0].axes[0])
        n = sum(layout.size(weight.axes[1]) for weight in weights)
        return m, n, k

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        m, n, k = self._shape(layout)
        return (*_expansion(self, layout, impl), Gemm(m, n, k))

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        m, n, k = self._shape(layout)
        return (*_expansion(self, layout, impl), Gemm(m, k, n))

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        m, _, k = self._shape(layout)
        n = sum(layout.size(weight.axes[1]) for weight in self.weights if len(weight.axes) > 1 and weight.trained)
        return _weight_gradients(self, self.bias, (Gemm(k, n, m),) if n else (), layout, impl)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        x = self.inputs[0]
        if not _trains_matrix(self, 2):
            return ()
        if impl.sequence_gather == "kept" and not x.tp_sharded and any(out.tp_sharded for out in self.outputs):
            return (replace(x, gathered=True),)
        return (x,)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedProjection(Operator):
    """One matrix product whose rows go to the weight matrix of their expert."""

    bias: bool = False

    def _shape(self, layout: Layout) -> tuple[int, int, int, int]:
        weights = [weight for weight in self.weights if len(weight.axes) > 2]
        groups = layout.size(weights[0].axes[0])
        k = layout.size(weights[0].axes[1])
        n = sum(layout.size(weight.axes[2]) for weight in weights)
        return layout.tokens(self.inputs[0]), n, k, groups

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        weighted = self._weighted_bias(layout, impl, _EAGER_EXPERT_BIAS_FORWARD, 2, 2)
        return (*_expansion(self, layout, impl), GroupedGemm(*self._shape(layout)), *weighted)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        tokens, n, k, groups = self._shape(layout)
        weighted = self._weighted_bias(layout, impl, _EAGER_EXPERT_BIAS_BACKWARD, 5, 2)
        return (*_expansion(self, layout, impl), GroupedGemm(tokens, k, n, groups), *weighted)

    def _weighted_bias(
        self, layout: Layout, impl: Implementation, per_element: int, each: int, together: int
    ) -> tuple[Work, ...]:
        """The router's weight on the bias of the last product, where no kernel does it: so many kernels an expert."""
        last = self.outputs[0].axes[-1].name == "hidden"
        if not (self.bias and last and impl.router_weights == "activation" and impl.expert_extras == "eager"):
            return ()
        groups = self._shape(layout)[3]
        return (Stream(layout.elements(self.outputs[0]) * per_element, groups * each + together),)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        tokens, _, k, groups = self._shape(layout)
        n = sum(layout.size(weight.axes[2]) for weight in self.weights if len(weight.axes) > 2 and weight.trained)
        # One (k x n) product per expert, contracted over the expert's own rows.
        products = (Gemm(k, n, max(1, tokens // groups), groups),) if n else ()
        return _weight_gradients(self, self.bias, products, layout, impl)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return self.inputs[:1] if _trains_matrix(self, 3) else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention(Operator):
    """The attention core: ``softmax(q k^T) v`` for each head. Inputs are q, k, v; the output is the context.

    Unfused it also stores the scores' softmax and, with dropout, the mask and the dropped softmax; keys and values
    of grouped queries are first repeated to all heads. Inputs after the third are keys and values of ``virtual_keys``
    learned tokens, which stand before the others and which every query sees.
    """

    mask: str
    head_dim: int
    v_head_dim: int
    sliding_window: int | None = None
    dropout: bool = False
    key_axis: str = "keys"
    cache: tuple[Tensor, ...] = ()
    virtual_keys: int = 0

    def shape(self, layout: Layout) -> AttentionShape:
        """What a tensor-parallel rank attends to, not split by context parallelism."""
        q, k = self.inputs[0], self.inputs[1]
        heads = layout.size(q.axes[1]) // self.head_dim
        kv_heads = layout.size(k.axes[1]) // self.head_dim
        source = layout.encoder_len
        cached = layout.cached if self.key_axis == "keys" else 0
        seq_k = source if self.key_axis == "source_keys" else layout.seq_len + cached
        seq_q = source if q.axes[0].name == "source_tokens" else layout.seq_len
        pairs = attended_pairs(self.mask, seq_q + cached, seq_k, self.sliding_window, layout.prefix_len)
        if cached:
            # The queries of the cached tokens have been asked before.
            pairs -= attended_pairs(self.mask, cached, cached, self.sliding_window, layout.prefix_len)
        if self.virtual_keys:
            seq_k, pairs = seq_k + self.virtual_keys, pairs + seq_q * self.virtual_keys
        return AttentionShape(layout.batch, heads, kv_heads, seq_q, seq_k, self.head_dim, self.v_head_dim, pairs)

    def context_bytes(self, layout: Layout, impl: Implementation) -> ContextBytes:
        """Bytes of what context parallelism moves on a rank."""
        q, k, v = self.inputs[:3]
        times = repeats(self.shape(layout).kv_heads, layout.cp_heads)
        of = [layout.elements(tensor) * impl.activation_bytes for tensor in (q, k, v, self.outputs[0])]
        return ContextBytes(of[0], times * of[1], times * of[2], of[3])

    def _kernels(self, layout: Layout, impl: Implementation, backward: bool) -> tuple[Work, ...]:
        shape, products = self.shape(layout), 4 if backward else 2
        if layout.cp == 1:
            return attention_kernels(shape, layout, products, in_steps=False)
        eager = impl.context_steps == "eager"
        steps = layout.cp_parts > 1 and (eager or not layout.cp_gathers)
        work = attention_kernels(shape, layout, products, in_steps=steps)
        return work + context_copies(self.context_bytes(layout, impl), shape, layout, impl, backward, steps)

    def _score_elements(self, layout: Layout) -> int:
        shape = self.shape(layout)
        return shape.batch * shape.heads * (shape.seq_q // layout.cp) * shape.seq_k

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        work: tuple[Work, ...] = self._kernels(layout, impl, backward=False)
        if impl.attention == "unfused":
            # Beside the products' own operands: softmax reads and writes; dropout reads, writes and stores its mask.
            per_score = impl.activation_bytes * (2 + 2 * self.dropout) + self.dropout
            work += (Stream(self._score_elements(layout) * per_score, 1 + self.dropout),)
        return work

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        work: tuple[Work, ...] = self._kernels(layout, impl, backward=True)
        if impl.attention == "unfused":
            # Softmax reads itself and its gradient and writes; dropout reads, reads its mask and writes.
            per_score = impl.activation_bytes * (3 + 2 * self.dropout) + self.dropout
            work += (Stream(self._score_elements(layout) * per_score, 1 + self.dropout),)
        return work

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        q, k, v, *virtual = self.inputs
        context = self.outputs[0]
        if impl.attention == "flash":
            logsumexp = Tensor(f"{self.name}.logsumexp", (q.axes[0], _per_head(q, self.head_dim)), "float32")
            return (q, k, v, *virtual, context, logsumexp)
        if k.axes[1].units != q.axes[1].units:
            k = Tensor(f"{k.name}.repeated", q.axes)
            v = Tensor(f"{v.name}.repeated", context.axes)
            virtual = [Tensor(f"{t.name}.repeated", (t.axes[0], q.axes[1])) for t in virtual]
        kept = (q, k, v, *virtual, *self._kept_scores(q, Axis(self.key_axis), "", impl))  # type: ignore[arg-type]
        if not self.virtual_keys:
            return kept
        return (*kept, *self._kept_scores(q, Axis("fixed", self.virtual_keys), "virtual_", impl))

    def kept_beside(self, layout: Layout, impl: Implementation) -> float:
        if layout.cp_heads == 1 or impl.attention == "unfused":
            return 0.0
        sizes, times = self.context_bytes(layout, impl), repeats(self.shape(layout).kv_heads, layout.cp_heads)
        kept = sizes.out if impl.context_output == "kept" else 0.0
        return kept + (sizes.k + sizes.v) * (1 - 1 / times)

    def buffers(self, layout: Layout, impl: Implementation) -> float:
        if layout.cp == 1:
            return 0.0
        sizes = self.context_bytes(layout, impl)
        keys = sizes.k + sizes.v
        wide = 4 / impl.activation_bytes if impl.context_steps == "eager" else 1.0
        # What is exchanged is there by tokens and by heads; what goes round a ring is there twice, the part that is
        # attended to and the next one, each with its gradient.
        found = sizes.q + keys + sizes.out * (impl.context_output == "again") if layout.cp_heads > 1 else 0.0
        if layout.cp_parts > 1 and not layout.cp_gathers:
            found += 2 * keys * (1 + wide)
        elif layout.cp_parts > 1:
            found += layout.cp_parts * keys + (layout.cp_parts * keys if wide == 1.0 else 2 * wide * keys)
        return found

    def _kept_scores(self, q: Tensor, keys: Axis, prefix: str, impl: Implementation) -> tuple[Tensor, ...]:
        """What unfused attention keeps of the scores of some keys."""
        scores = (q.axes[0], _per_head(q, self.head_dim), keys)
        name = f"{self.name}.{prefix}"
        softmax = Tensor(f"{name}softmax", scores)
        kept: tuple[Tensor, ...] = ()
        if impl.softmax == "float32" and impl.activation_bytes < 4:
            kept += (Tensor(f"{name}softmax_float32", scores, "float32"),)
        elif self.dropout:
            kept += (softmax,)
        if not self.dropout:
            return (*kept, softmax)
        dropped = Tensor(f"{name}softmax_dropped", scores)
        return (*kept, dropped, Tensor(f"{name}dropout_mask", scores, "mask"))

    def cached(self) -> tuple[Tensor, ...]:
        return self.cache


def _per_head(q: Tensor, head_dim: int) -> Axis:
    heads = q.axes[1]
    return Axis(heads.name, heads.size // head_dim, heads.units)


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm(Operator):
    """LayerNorm or RMSNorm: keeps its input and one or two float32 statistics per row.

    A weight shorter than the row normalises each piece of the row by itself (one head of the queries).
    """

    kind: str = "layernorm"

    def _rows(self) -> tuple[Axis, ...]:
        *rows, last = self.inputs[0].axes
        width = self.weights[0].axes[0].size if self.weights else last.size
        if width == last.size:
            return tuple(rows)
        return (*rows, Axis(last.name, last.size // width, last.units))

    def _eager(self, impl: Implementation) -> bool:
        # PyTorch's LayerNorm is one kernel in every stack.
        return impl.norm == "eager" and self.kind == "rmsnorm"

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        if self._eager(impl):
            return (Stream(layout.elements(self.inputs[0]) * _EAGER_RMSNORM_FORWARD, 6),)
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0])),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        if self._eager(impl):
            return (Stream(layout.elements(self.inputs[0]) * _EAGER_RMSNORM_BACKWARD, 10),)
        # Reads the input and the output's gradient, writes the input's gradient.
        return (Stream(_bytes(layout, impl, self.inputs[0], self.inputs[0], self.outputs[0])),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        x, rows = self.inputs[0], self._rows()
        rstd = Tensor(f"{self.name}.rstd", rows, "float32")
        if self._eager(impl):
            # The copy in float32 is the input itself where activations are float32.
            wide = x if impl.activation_bytes == 4 else Tensor(f"{self.name}.float32", x.axes, "float32")
            trained = any(weight.trained for weight in self.weights)
            normed = (Tensor(f"{self.name}.normed", x.axes),) if trained else ()
            return (wide, rstd, *normed)
        if self.kind == "layernorm":
            return (x, rstd, Tensor(f"{self.name}.mean", rows, "float32"))
        return (x, rstd)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rope(Operator):
    """Rotary position embedding of queries and keys (arXiv:2104.09864): linear, keeps nothing of its inputs."""

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        if impl.rope == "eager":
            return (Stream(sum(layout.elements(x) for x in self.inputs) * _EAGER_ROPE, 5 * len(self.inputs)),)
        return (Stream(_bytes(layout, impl, *self.inputs, *self.outputs)),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)


@dataclass(frozen=True, kw_only=True, eq=False)
class Activation(Operator):
    """A pointwise non-linearity: keeps its input, or its result where that is enough (ReLU)."""

    function: str = "gelu"

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0])),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0], self.inputs[0])),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        x, result = self.inputs[0], self.outputs[0]
        if not _weighted(result, impl):
            return _kept_by_function(self.function, x, result, impl, self.name)
        if impl.activation == "fused":
            return (x,)
        result = Tensor(f"{self.name}.unweighted", result.axes)
        return (*_kept_by_function(self.function, x, result, impl, self.name), result)


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedActivation(Operator):
    """``f(gate) * up``: fused it keeps gate and up; as two operators ``f(gate)``, up, and what ``f`` keeps.

    ``clamped``: gate and up are limited to a range first. Not fused, both are read and written, then put side by side
    again; backward, each limit reads its gradient and its input, and the gradients are put side by side.
    """

    function: str = "silu"
    clamped: bool = False

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        passes, kernels = (3, 1) if impl.activation == "fused" else (5, 2)
        if self.clamped and impl.expert_extras == "eager":
            passes, kernels = passes + 8, kernels + 3
        return (Stream(_bytes(layout, impl, self.outputs[0]) * passes, kernels),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        passes, kernels = (5, 1) if impl.activation == "fused" else (9, 3)
        if self.clamped and impl.expert_extras == "eager":
            passes, kernels = passes + 10, kernels + 3
        return (Stream(_bytes(layout, impl, self.outputs[0]) * passes, kernels),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        if impl.activation == "fused":
            return self.inputs
        gate, up = self.inputs
        result = Tensor(f"{self.name}.{self.function}", gate.axes)
        kept = (*_kept_by_function(self.function, gate, result, impl, self.name), result, up)
        if _weighted(self.outputs[0], impl):
            kept += (Tensor(f"{self.name}.unweighted", self.outputs[0].axes),)
        return kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Dropout(Operator):
    """Dropout on its own (after an embedding): keeps its one-byte mask."""

    def _mask(self) -> Tensor:
        return Tensor(f"{self.name}.mask", self.outputs[0].axes, "mask")

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0], self._mask())),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return (self._mask(),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Residual(Operator):
    """The sum of the residual stream and one or more branches, with dropout on the branches.

    Its backward is the sum of the gradients that meet where the branches left the stream. ``scaled``: the stream is
    multiplied by a constant first, a kernel of its own each way that keeps nothing (DeepNorm, arXiv:2203.00555).
    """

    dropout: bool = False
    scaled: bool = False

    def _mask(self) -> Tensor:
        return Tensor(f"{self.name}.dropout_mask", self.outputs[0].axes, "mask")

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        one = _bytes(layout, impl, self.outputs[0])
        moved = one * (len(self.inputs) + 1)
        kernels = len(self.inputs) - 1
        if self.dropout:
            moved += layout.elements(self.outputs[0])
            if impl.dropout_add == "eager":
                moved += 2 * one
                kernels += 1
        if self.scaled:
            moved += 2 * one
            kernels += 1
        return (Stream(moved, kernels),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        one = _bytes(layout, impl, self.outputs[0])
        moved = 3 * one
        if self.dropout:
            moved += 2 * one + layout.elements(self.outputs[0])
        if self.scaled:
            moved += 2 * one
        return (Stream(moved, 1 + self.dropout + self.scaled),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return (self._mask(),) if self.dropout else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Operator):
    """Rows of one or more tables, summed: token, position and type embeddings.

    ``computed``: tables among them that are not trained (sinusoidal positions): they are read, and have no gradient.
    """

    computed: int = 0

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows = sum(len(weight.axes) > 1 for weight in self.weights) + self.computed
        return (Stream(_bytes(layout, impl, self.outputs[0]) * (rows + 1), rows),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return ()

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows = sum(len(weight.axes) > 1 and weight.trained for weight in self.weights)
        # Each row of the gradient is read and added (read, write) to the table's gradient.
        return (Stream(3 * _bytes(layout, impl, self.outputs[0]) * rows, rows),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        if self.inputs:
            # Ids enter before sequence parallelism splits the tokens.
            return tuple(replace(ids, gathered=True) for ids in self.inputs)
        # A relative bias has no ids: it keeps the bucket of every query and key. Flash attention needs the bias itself
        # again, once for all layers; unfused attention only adds it to the scores.
        bias = self.outputs[0]
        buckets = Tensor(f"{self.name}.buckets", bias.axes[1:], "index")
        return (bias, buckets) if impl.attention == "flash" else (buckets,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat(Operator):
    """Two tensors side by side along the hidden axis: keeps nothing."""

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(2 * _bytes(layout, impl, self.outputs[0])),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss(Operator):
    """Cross-entropy over the vocabulary; what it keeps and moves per logit is the stack's."""

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(layout.elements(self.inputs[0]) * impl.loss_traffic_bytes / 2),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        logits = self.inputs[0]
        return (logits, Tensor(f"{self.name}.labels", logits.axes[:-1], "index", gathered=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Router(Operator):
    """The product with the router's weight, softmax in float32, and the choice of the best experts.

    The output are the probabilities of all experts, which the softmax keeps.
    """

    num_experts: int

    def _rows(self, layout: Layout) -> int:
        return layout.tokens(self.inputs[0])

    def _width(self, layout: Layout) -> int:
        return layout.size(self.weights[0].axes[0])

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows = self._rows(layout)
        # Logits, softmax and the top-k selection each pass over rows x experts in float32.
        return (Gemm(rows, self.num_experts, self._width(layout)), Stream(6 * 4 * rows * self.num_experts, 3))

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        rows = self._rows(layout)
        return (Gemm(rows, self._width(layout), self.num_experts), Stream(4 * 4 * rows * self.num_experts, 2))

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        if not _trains_matrix(self, 2):
            return ()
        return (Gemm(self._width(layout), self.num_experts, self._rows(layout)),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return self.outputs[:1] if not _trains_matrix(self, 2) else (self.inputs[0], self.outputs[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch(Operator):
    """Copies each token to its experts in expert order: a gather, and an all-to-all when experts are spread.

    It keeps which experts each token goes to, and which token each copied row came from.
    """

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(2 * _bytes(layout, impl, self.outputs[0])),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return self.forward(layout, impl)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        rows = self.outputs[0].axes[0]
        chosen = (self.inputs[1].axes[0], Axis("fixed", rows.size))
        return (Tensor(f"{self.name}.order", (rows,), "index"), Tensor(f"{self.name}.experts", chosen, "index"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Combine(Operator):
    """Brings the experts' results back into token order and sums them with the router's weights.

    It keeps the float32 weight of each row, and the experts' results where the weight multiplies these.
    """

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0])),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        routed = self.inputs[0]
        return (Stream(_bytes(layout, impl, self.outputs[0], routed, routed)),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        routed = self.inputs[0]
        weights = Tensor(f"{self.name}.weights", routed.axes[:1], "float32")
        return (weights,) if impl.router_weights == "activation" else (routed, weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv1d(Operator):
    """A causal depth-wise convolution along the tokens with a short kernel."""

    def _flops(self, layout: Layout) -> int:
        channels, kernel = (layout.size(axis) for axis in self.weights[0].axes)
        # As PyTorch's convolution, padded at both ends: every sequence has kernel - 1 results that are cut off again.
        rows = layout.tokens(self.outputs[0], gathered=True) + layout.batch * (kernel - 1)
        return 2 * rows * channels * kernel

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, self.inputs[0], self.outputs[0]), 1, self._flops(layout)),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        moved = _bytes(layout, impl, self.inputs[0], self.outputs[0], self.inputs[0])
        return (Stream(moved, 1, self._flops(layout)),)

    def backward_weight(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        # The kernel that makes the input's gradient makes the weight's with it.
        return (Stream(0.0, 0, self._flops(layout)),) if _trains_matrix(self, 2) else ()

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return self.inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan(Operator):
    """The selective scan of a state-space mixer (Mamba, arXiv:2312.00752, section 3.3): one fused kernel.

    Reads its inputs and writes its output; the state stays on chip and is recomputed in the backward pass. Of its FLOPs
    the product of the state with C counts, the one that is a matrix product; the recurrence is elementwise.
    """

    def _flops(self, layout: Layout) -> int:
        state = self.inputs[3].axes[-1]
        return 2 * layout.elements(self.outputs[0]) * layout.size(state)

    def forward(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        return (Stream(_bytes(layout, impl, *self.inputs, *self.outputs), 1, self._flops(layout)),)

    def backward_input(self, layout: Layout, impl: Implementation) -> tuple[Work, ...]:
        moved = 2 * _bytes(layout, impl, *self.inputs) + _bytes(layout, impl, *self.outputs)
        return (Stream(moved, 1, 2 * self._flops(layout)),)

    def saved(self, impl: Implementation) -> tuple[Tensor, ...]:
        return self.inputs
