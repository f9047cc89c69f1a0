"""Bytes that the graph keeps for the backward pass against what autograd keeps of the same blocks in plain PyTorch.

Every comparison is one of integers. Where PyTorch keeps something that the graph does not count, the difference is a
named term below, computed from the shapes, with the reason; there is no tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from simllm.models import Model
from simllm.models.activations import Recompute, saved_bytes
from simllm.models.build import build_graph
from simllm.models.catalog import catalog_names
from simllm.models.graph import Implementation, Layout
from simllm.models.spec import AttentionSpec, BlockSpec, HeadSpec, MLPSpec, ModelSpec, MoESpec, StackSpec
from tests.models.torch_blocks import Block, Norm, dropout, record_saved_bytes
from tests.strategies import LAYERNORM, RMSNORM, gpt_spec, specs

FUSED = Implementation()
EAGER = Implementation(activation="eager", norm="eager", rope="eager", dropout_add="eager", softmax="float32")
POLICIES = {
    "none": Recompute(),
    "selective": Recompute(kind="selective"),
    "full": Recompute(kind="full"),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One micro-batch and the sizes of the model."""

    batch: int
    seq_len: int
    source_len: int
    hidden: int
    heads: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = (
    Shape(batch=2, seq_len=16, source_len=24, hidden=32, heads=4),
    Shape(batch=1, seq_len=24, source_len=8, hidden=96, heads=6),
    Shape(batch=3, seq_len=40, source_len=40, hidden=64, heads=8),
)


# -- the models ------------------------------------------------------------------------------------------------


def _spec(block: BlockSpec, shape: Shape, rate: float, encoder: BlockSpec | None = None) -> ModelSpec:
    def stack(one: BlockSpec, buckets: int) -> StackSpec:
        return StackSpec(layers=(one,), final_norm=RMSNORM, relative_attention_num_buckets=buckets)

    return ModelSpec(
        name="plain",
        family="plain",
        model_type="plain",
        architecture="encoder-decoder" if encoder else "causal-decoder",
        vocab_size=97,
        hidden_size=shape.hidden,
        decoder=stack(block, 32 if encoder else 0),
        encoder=stack(encoder, 32) if encoder else None,
        head=HeadSpec(tied=False),
        hidden_dropout=rate,
        attention_dropout=rate,
    )


def _attention(shape: Shape, kv_heads: int, **details: object) -> AttentionSpec:
    return AttentionSpec(
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads,
        head_dim=shape.head_dim,
        **details,  # type: ignore[arg-type]
    )


def _gpt2(shape: Shape, rate: float) -> ModelSpec:
    return gpt_spec(hidden=shape.hidden, heads=shape.heads, dropout=rate)


def _llama(shape: Shape, rate: float) -> ModelSpec:
    mlp = MLPSpec(intermediate_size=3 * shape.hidden, activation="silu", gated=True)
    mixer = _attention(shape, shape.heads // 2, position="rope")
    return _spec(BlockSpec(mixer=mixer, mlp=mlp, norm=RMSNORM), shape, rate)


def _falcon(shape: Shape, rate: float) -> ModelSpec:
    """Falcon-7B: one key head, attention and MLP side by side after one norm."""
    mlp = MLPSpec(intermediate_size=4 * shape.hidden, activation="gelu")
    mixer = _attention(shape, 1, position="rope")
    block = BlockSpec(mixer=mixer, mlp=mlp, norm=LAYERNORM, parallel=True, shared_norm=True)
    return _spec(block, shape, rate)


def _t5(shape: Shape, rate: float) -> ModelSpec:
    mlp = MLPSpec(intermediate_size=4 * shape.hidden, activation="relu")
    heads = shape.heads
    block = BlockSpec(
        mixer=_attention(shape, heads, mask="causal", position="relative"),
        mlp=mlp,
        norm=RMSNORM,
        cross_attention=_attention(shape, heads, mask="cross"),
    )
    encoder = BlockSpec(
        mixer=_attention(shape, heads, mask="bidirectional", position="relative"), mlp=mlp, norm=RMSNORM
    )
    return _spec(block, shape, rate, encoder)


def _mixtral(shape: Shape, rate: float) -> ModelSpec:
    expert = MLPSpec(intermediate_size=2 * shape.hidden, activation="silu", gated=True)
    moe = MoESpec(num_experts=4, num_experts_per_tok=2, expert=expert)
    mixer = _attention(shape, shape.heads // 2, position="rope")
    return _spec(BlockSpec(mixer=mixer, mlp=moe, norm=RMSNORM), shape, rate)


MODELS = {"gpt2": _gpt2, "llama": _llama, "falcon": _falcon, "t5": _t5, "t5 encoder": _t5, "mixtral": _mixtral}


# -- what PyTorch keeps and the graph does not count -----------------------------------------------------------


def _boolean_mask(shape: Shape) -> int:
    """nanoGPT compares a table with zero in every forward pass; `masked_fill` keeps the result, a byte a pair."""
    return shape.seq_len**2


def _views_of_a_fused_product(shape: Shape, kv_heads: int, element: int) -> int:
    """The values are a view of the fused product's result, whose queries and keys stay although rotated copies are."""
    return shape.tokens * (shape.heads + kv_heads) * shape.head_dim * element


def _broadcast_without_a_copy(shape: Shape, element: int) -> int:
    """With one sequence and one key head, PyTorch expands keys and values to all heads without a copy."""
    return -2 * shape.tokens * (shape.heads - 1) * shape.head_dim * element


def _routing(tokens: int, moe: MoESpec, impl: Implementation, renormalised: bool = True) -> int:
    """Beside what the graph counts: int64 permutations of rows and weights, the int32 end of each expert's rows.

    Weights that are divided by their sum are kept in float32 before, with the sum.
    """
    rows = tokens * moe.num_experts_per_tok
    permutations = 1 + (impl.router_weights == "activation")
    return permutations * rows * 8 + moe.num_experts * 4 + renormalised * (rows * 4 + tokens * 4)


def _named_terms(model: str, shape: Shape, impl: Implementation, policy: str, spec: ModelSpec) -> int:
    if policy == "full":
        return 0
    element = impl.activation_bytes
    if model == "gpt2" and impl.attention == "unfused" and policy == "none":
        return _boolean_mask(shape)
    if model == "mixtral":
        moe = spec.decoder.layers[0].mlp
        assert isinstance(moe, MoESpec)
        return _routing(shape.tokens, moe, impl)
    if model == "falcon":
        fused = _views_of_a_fused_product(shape, 1, element)
        if impl.attention == "flash" or policy == "selective":
            return fused
        # The values are copied to all heads, unless there is one sequence.
        return fused + _broadcast_without_a_copy(shape, element) if shape.batch == 1 else 0
    return 0


# -- one rank --------------------------------------------------------------------------------------------------


def _measure(model: str, spec: ModelSpec, shape: Shape, impl: Implementation, recompute: str, **details: object) -> int:
    encodes = model == "t5 encoder"
    block_spec = (spec.encoder if encodes and spec.encoder else spec.decoder).layers[0]
    block = Block(
        block_spec,
        shape.hidden,
        shape.source_len if encodes else shape.seq_len,
        impl,
        spec.hidden_dropout,
        spec.attention_dropout,
        recompute,
        fused_qkv=model in ("gpt2", "falcon"),
        bool_mask=model == "gpt2",
        renormalise=model == "mixtral",
        **details,  # type: ignore[arg-type]
    )

    def stream(length: int) -> torch.Tensor:
        return torch.randn(shape.batch, length, shape.hidden, dtype=block.dtype, requires_grad=True)

    length = shape.source_len if encodes else shape.seq_len
    x = stream(length // block.tp if block.sequence_parallel else length)
    if not model.startswith("t5"):
        return record_saved_bytes(lambda: block(x), block)
    # Other blocks own the encoder's result and the relative bias. A bias that is trained falls back to unfused
    # attention on the CPU, so that the flash kernel is given one that is not.
    memory = None if encodes else stream(shape.source_len)
    bias = torch.randn(1, shape.heads, length, length, dtype=block.dtype)
    bias.requires_grad_(impl.attention == "unfused")
    lent = [bias] if memory is None else [bias, memory]
    return record_saved_bytes(lambda: block(x, memory, bias), block, lent)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("stack", ["fused", "eager"])
@pytest.mark.parametrize("rate", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_a_block_keeps_what_pytorch_keeps(
    model: str, element: int, rate: float, stack: str, attention: str, policy: str
) -> None:
    impl = replace(FUSED if stack == "fused" else EAGER, attention=attention, activation_bytes=element)  # type: ignore[arg-type]
    for shape in SHAPES:
        spec = MODELS[model](shape, rate)
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len, source_len=shape.source_len)
        layer = build_graph(spec).layers[0 if model == "t5 encoder" else -1]
        named = _named_terms(model, shape, impl, policy, spec)
        assert _measure(model, spec, shape, impl, policy) == saved_bytes(layer, layout, impl, POLICIES[policy]) + named


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("part", ["mixer", "mlp"])
def test_listed_operators(model: str, part: str) -> None:
    """A checkpoint around a sub-layer: the graph's ``list`` of its operators."""
    impl = replace(EAGER, attention="unfused")
    for shape in SHAPES:
        spec = MODELS[model](shape, 0.1)
        layer = build_graph(spec).layers[-1]
        mixer = [o.name for o in layer.operators if o.name in ("qkv", "rope", "attention_core", "o")]
        mlp = [o.name for o in layer.operators if o.name in ("gate_up", "up", "act", "down")]
        policy = Recompute(kind="list", operators=tuple(mixer if part == "mixer" else mlp))
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len)
        named = _boolean_mask(shape) if model == "gpt2" and part == "mlp" else 0
        assert _measure(model, spec, shape, impl, part) == saved_bytes(layer, layout, impl, policy) + named


@settings(deadline=None)
@given(
    specs(),
    st.sampled_from(["flash", "unfused"]),
    st.sampled_from([FUSED, EAGER]),
    st.sampled_from([2, 4]),
    st.sampled_from(["output", "activation"]),
    st.sampled_from(list(POLICIES)),
)
def test_random_blocks(
    spec: ModelSpec, attention: str, stack: Implementation, element: int, weights: str, policy: str
) -> None:
    """Whatever a spec can say of norms, heads, positions and experts, two sequences of eight tokens."""
    impl = replace(stack, attention=attention, activation_bytes=element, router_weights=weights)  # type: ignore[arg-type]
    layout = Layout(batch=2, seq_len=8)
    for index, graph in enumerate(build_graph(spec).layers):
        block_spec = spec.decoder.layers[index]
        if index and block_spec == spec.decoder.layers[index - 1]:
            continue
        dropouts = spec.hidden_dropout, spec.attention_dropout
        block = Block(block_spec, spec.hidden_size, 8, impl, *dropouts, policy)
        x = torch.randn(2, 8, spec.hidden_size, dtype=block.dtype, requires_grad=True)
        named = 0
        if isinstance(block_spec.mlp, MoESpec) and policy != "full":
            named = _routing(16, block_spec.mlp, impl, renormalised=False)
        measured = record_saved_bytes(lambda block=block, x=x: block(x), block)  # type: ignore[misc]
        assert measured == saved_bytes(graph, layout, impl, POLICIES[policy]) + named


@pytest.mark.parametrize("stack", ["fused", "eager"])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
def test_router_weights_inside_the_experts(element: int, stack: str) -> None:
    """Megatron-Core weights the activation of an expert, and does not keep its output."""
    base = FUSED if stack == "fused" else EAGER
    impl = replace(base, activation_bytes=element, router_weights="activation")
    for shape in SHAPES:
        spec = _mixtral(shape, 0.0)
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len)
        layer = build_graph(spec).layers[0]
        kept = saved_bytes(layer, layout, impl)
        assert _measure("mixtral", spec, shape, impl, "none") == kept + _named_terms(
            "mixtral", shape, impl, "none", spec
        )
        if stack == "fused":
            outputs = 2 * shape.tokens * shape.hidden * element
            assert saved_bytes(layer, layout, replace(impl, router_weights="output")) - kept == outputs


@pytest.mark.parametrize("name", catalog_names())
def test_names_of_tensors_are_unique_in_a_block(name: str) -> None:
    """A tensor is known by its name: two of one name would be counted once."""
    for block, _ in Model.load(name).graph.parts:
        names = [tensor.name for operator in block.operators for tensor in operator.outputs]
        assert len(names) == len(set(names)), block.name


# -- several ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_tensor_parallel_ranks(model: str, element: int, sequence_parallel: bool, attention: str, policy: str) -> None:
    """A block with its rank's heads, its share of the MLP, and with sequence parallelism its share of the tokens."""
    impl = replace(FUSED, attention=attention, activation_bytes=element)  # type: ignore[arg-type]
    shape = SHAPES[2]
    for tp in (2, 4):
        spec = MODELS[model](shape, 0.1)
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len, tp=tp, sequence_parallel=sequence_parallel)
        named = _boolean_mask(shape) if (model, attention, policy) == ("gpt2", "unfused", "none") else 0
        measured = _measure(model, spec, shape, impl, policy, tp=tp, sequence_parallel=sequence_parallel)
        assert measured == saved_bytes(build_graph(spec).layers[0], layout, impl, POLICIES[policy]) + named


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Four ranks of which one exists: the fake backend moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_pytorchs_own_tensor_parallelism(
    mesh: DeviceMesh, model: str, element: int, attention: str, policy: str
) -> None:
    """`parallelize_module` with sequence parallelism keeps the gathered input of the products (torchtitan's plan)."""
    impl = replace(FUSED, attention=attention, activation_bytes=element, sequence_gather="kept")  # type: ignore[arg-type]
    shape = SHAPES[2]
    spec = MODELS[model](shape, 0.1)
    rates = spec.hidden_dropout, spec.attention_dropout
    block = Block(spec.decoder.layers[0], shape.hidden, shape.seq_len, impl, *rates, policy)
    enter = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan: dict[str, ParallelStyle] = {
        "norms.mixer": SequenceParallel(),
        "norms.mlp": SequenceParallel(),
        "mixer": enter,
        "mlp": enter,
        "mixer.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    split = ("mixer.q", "mixer.k", "mixer.v", "mlp.up", *(["mlp.gate"] if model == "llama" else []))
    parallelize_module(block, mesh, plan | {name: ColwiseParallel() for name in split})
    local = torch.randn(shape.batch, shape.seq_len // 4, shape.hidden, dtype=block.dtype, requires_grad=True)
    layout = Layout(batch=shape.batch, seq_len=shape.seq_len, tp=4, sequence_parallel=True)
    graph = build_graph(spec).layers[0]
    expected = saved_bytes(graph, layout, impl, POLICIES[policy])
    assert record_saved_bytes(lambda: block(local), block) == expected
    megatron = saved_bytes(graph, layout, replace(impl, sequence_gather="again"), POLICIES[policy])
    gathered = 2 * shape.tokens * shape.hidden * element
    assert expected - megatron == (gathered * 3 // 4 if policy == "none" else 0)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_context_parallel_ranks(model: str, policy: str) -> None:
    """Ring attention keeps this rank's queries, keys, values, output and log-sum-exp (arXiv:2310.01889, section 3)."""
    shape = SHAPES[2]
    for cp in (2, 4):
        spec = MODELS[model](shape, 0.1)
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len, cp=cp)
        local = replace(shape, seq_len=shape.seq_len // cp)
        expected = saved_bytes(build_graph(spec).layers[0], layout, FUSED, POLICIES[policy])
        assert _measure(model, spec, local, FUSED, policy) == expected


# -- what stands before and after the layers -------------------------------------------------------------------


class _Head(nn.Module):
    def __init__(self, spec: ModelSpec, impl: Implementation, dtype: torch.dtype) -> None:
        super().__init__()
        assert spec.decoder.final_norm is not None
        self.norm = Norm(spec.decoder.final_norm, spec.hidden_size, impl, dtype)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("stack", ["fused", "eager"])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_head_keeps_what_pytorch_keeps(model: str, element: int, stack: str) -> None:
    """Cross-entropy in float32 keeps the log-probabilities: ``logits_saved_bytes=4``."""
    base = FUSED if stack == "fused" else EAGER
    impl = replace(base, activation_bytes=element, logits_saved_bytes=4.0)
    sum_of_weights = 4  # nll_loss keeps the number of labels as one float32
    for shape in SHAPES:
        spec = MODELS[model](shape, 0.0)
        dtype = torch.float32 if element == 4 else torch.bfloat16
        head = _Head(spec, impl, dtype)
        x = torch.randn(shape.batch, shape.seq_len, shape.hidden, dtype=dtype, requires_grad=True)
        labels = torch.randint(spec.vocab_size, (shape.batch, shape.seq_len))
        layout = Layout(batch=shape.batch, seq_len=shape.seq_len)
        measured = record_saved_bytes(lambda: head(x, labels), head)  # noqa: B023
        assert measured == saved_bytes(build_graph(spec).head, layout, impl) + sum_of_weights


class _Stem(nn.Module):
    def __init__(self, spec: ModelSpec, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.token = nn.Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        self.position = nn.Embedding(positions, spec.hidden_size, dtype=dtype) if positions else None
        buckets = spec.decoder.relative_attention_num_buckets
        attention = spec.decoder.layers[0].mixer
        assert isinstance(attention, AttentionSpec)
        self.relative = nn.Embedding(buckets, attention.num_attention_heads, dtype=dtype) if buckets else None
        self.rate = spec.hidden_dropout

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.token(ids)
        places = torch.arange(ids.shape[1])
        if self.position is not None:
            x = x + self.position(places)
        bias = None
        if self.relative is not None:
            distance = (places[:, None] - places[None, :]).clamp(0, self.relative.num_embeddings - 1)
            bias = self.relative(distance).permute(2, 0, 1)
        return dropout(x, self.rate), bias


@pytest.mark.parametrize("rate", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("element", [2, 4], ids=["bf16", "fp32"])
def test_the_embedding_keeps_what_pytorch_keeps(element: int, rate: float) -> None:
    dtype = torch.float32 if element == 4 else torch.bfloat16
    impl = replace(FUSED, attention="unfused", activation_bytes=element)
    for shape in SHAPES:
        ids = torch.randint(97, (shape.batch, shape.source_len))
        gpt2 = _gpt2(shape, rate)
        learned = replace(gpt2, vocab_size=97, decoder=replace(gpt2.decoder, positions=64))
        position_ids = 8 * shape.source_len  # int64 places of one sequence
        for spec, positions, named in ((learned, 64, position_ids), (_t5(shape, rate), 0, 0)):
            stem = _Stem(spec, positions, dtype)
            layout = Layout(batch=shape.batch, seq_len=shape.source_len)
            measured = record_saved_bytes(lambda: stem(ids), stem)  # noqa: B023
            assert measured == saved_bytes(build_graph(spec).stem, layout, impl) + named


# -- the blocks themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_fused_and_eager_blocks_compute_the_same(model: str) -> None:
    """What the comparison stands on: both ways of writing a block give the same result and gradients."""
    shape = SHAPES[0]
    spec = MODELS[model](shape, 0.0)
    stack = spec.encoder if model == "t5 encoder" and spec.encoder else spec.decoder
    outcomes = []
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.seq_len, shape.hidden)
    memory = torch.randn(shape.batch, shape.source_len, shape.hidden)
    for base, attention in ((FUSED, "flash"), (EAGER, "unfused")):
        impl = replace(base, attention=attention, activation_bytes=4)  # type: ignore[arg-type]
        torch.manual_seed(1)
        block = Block(stack.layers[0], shape.hidden, shape.seq_len, impl, bool_mask=model == "gpt2")
        leaf = x.clone().requires_grad_()
        result = block(leaf, memory if block.cross is not None else None)
        result.square().sum().backward()
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        outcomes.append([result.detach(), leaf.grad, *gradients])
    for fused, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
