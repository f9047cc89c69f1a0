"""Bytes that the graph keeps for the backward pass against what autograd keeps of transformers' own layers.

The config of each small model goes through simllm's reader, its layer through transformers. The comparison is one of
integers; what transformers or the CPU's kernels keep beside the graph is a named term, computed from the shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.t5.modeling_t5 import T5Block

from simllm.models.activations import saved_bytes
from simllm.models.build import build_graph
from simllm.models.config import spec_from_config
from simllm.models.graph import Implementation, Layout
from tests.models.torch_blocks import record_saved_bytes

logging.getLogger("transformers").setLevel(logging.ERROR)

#: What transformers' modeling files do: single operators, RMSNorm by way of float32.
EAGER = Implementation(activation="eager", norm="eager", rope="eager", dropout_add="eager")
HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 32, 4, 2, 96, 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    batch: int
    seq_len: int
    source_len: int
    attention: str  # transformers' attn_implementation
    element: int  # bytes of an activation

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.element == 4 else torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def impl(self) -> Implementation:
        kind = "flash" if self.attention == "sdpa" else "unfused"
        return replace(EAGER, attention=kind, activation_bytes=self.element)  # type: ignore[arg-type]

    def stream(self, length: int) -> torch.Tensor:
        return torch.randn(self.batch, length, HIDDEN, dtype=self.dtype, requires_grad=True)

    def causal_mask(self) -> torch.Tensor | None:
        """Additive for eager attention; SDPA has a flag."""
        if self.attention == "sdpa":
            return None
        lowest = torch.finfo(self.dtype).min
        return torch.full((1, 1, self.seq_len, self.seq_len), lowest, dtype=self.dtype).triu(1)

    def graph_bytes(self, config: Any, impl: Implementation, index: int = 0) -> float:
        spec = spec_from_config(config.to_dict(), "small")
        layout = Layout(batch=self.batch, seq_len=self.seq_len, source_len=self.source_len)
        return saved_bytes(build_graph(spec).layers[index], layout, impl)


@pytest.fixture(params=[2, 4], ids=["bf16", "fp32"])
def element(request: pytest.FixtureRequest) -> int:
    torch.manual_seed(0)
    return int(request.param)


SHAPES = [(2, 16, 24), (3, 24, 8)]


def cases(attention: str, element: int) -> list[Case]:
    return [Case(batch=b, seq_len=s, source_len=m, attention=attention, element=element) for b, s, m in SHAPES]


# -- what transformers and the CPU keep, and the graph does not count ------------------------------------------


def layernorm_statistics(case: Case, norms: int) -> int:
    """The CPU keeps mean and 1/deviation in the dtype of the weight, CUDA (and the graph) in float32."""
    return norms * 2 * case.tokens * (case.element - 4)


def dropout_mask(case: Case, elements: int) -> int:
    """The CPU's dropout keeps its mask in the activations' dtype, CUDA's (and the graph) in one byte."""
    return elements * (case.element - 1)


def views_of_a_fused_product(case: Case, width: int) -> int:
    """A view that is kept keeps the whole result of the product it comes from, here ``width`` columns more."""
    return case.tokens * width * case.element


def keys_and_values_of_all_heads(case: Case) -> int:
    """Falcon repeats keys and values to all heads before any attention."""
    return 2 * case.tokens * (HEADS - KV_HEADS) * (HIDDEN // HEADS) * case.element


def list_indices() -> int:
    """Falcon picks keys and values with ``[-2]`` and ``[-1]``: two int64 index tensors of one element."""
    return 2 * 8


def routing(case: Case, k: int, experts: int, implementation: str, renormalised: bool = True) -> int:
    """What the experts of transformers keep beside the graph's choice of experts, order, probabilities and weights.

    Weights divided by their sum: the weights before, and the sum, in float32. ``grouped_mm``: two more int64
    permutations and the int32 ends of the groups. ``eager``: the column of each row's weight as int64, and what
    `index_add_` is given, although its gradient needs no more than the shape.
    """
    rows = case.tokens * k
    shared = renormalised * 4 * (rows + case.tokens)
    if implementation == "grouped_mm":
        return shared + 2 * 8 * rows + 4 * experts
    return shared + 8 * rows + rows * HIDDEN * case.element


def weights_in_float32(case: Case, elements: int) -> int:
    """OLMo 2's norm multiplies with its weight before it goes back to bf16: that input is kept in float32."""
    return elements * (4 - case.element)


# -- the five families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rate", [0.0, 0.1], ids=["no dropout", "dropout"])
def test_gpt2_block(attention: str, rate: float, element: int) -> None:
    """The eager tanh GELU keeps four tensors. SDPA runs without dropout: the CPU's flash kernel has none."""
    for case in cases(attention, element):
        config = transformers.GPT2Config(
            n_embd=HIDDEN,
            n_head=HEADS,
            n_layer=1,
            vocab_size=VOCAB,
            resid_pdrop=rate,
            embd_pdrop=rate,
            attn_pdrop=rate if attention == "eager" else 0.0,
            attn_implementation=attention,
        )
        block = GPT2Block(config, 0).to(case.dtype)
        x, mask = case.stream(case.seq_len), case.causal_mask()
        named = layernorm_statistics(case, 2)
        if rate:
            named += 2 * dropout_mask(case, case.tokens * HIDDEN)
            if attention == "eager":
                named += dropout_mask(case, case.tokens * case.seq_len * HEADS)
        measured = record_saved_bytes(lambda: block(x, attention_mask=mask), block)  # noqa: B023
        assert measured == case.graph_bytes(config, case.impl) + named


@pytest.mark.parametrize(("attention", "rate"), [("sdpa", 0.0), ("eager", 0.0), ("eager", 0.1)])
def test_t5_decoder_block(attention: str, rate: float, element: int) -> None:
    """The second layer of a decoder, which is given its relative bias and the encoder's result.

    SDPA with dropout falls back to unfused float32 attention on a CPU.
    """
    for case in cases(attention, element):
        sizes = {"d_model": HIDDEN, "num_heads": HEADS, "d_kv": 8, "d_ff": FFN, "num_layers": 2, "vocab_size": VOCAB}
        config = transformers.T5Config(**sizes, dropout_rate=rate, attn_implementation=attention)
        decoder = transformers.T5Config(**sizes, dropout_rate=rate, attn_implementation=attention, is_decoder=True)
        block = T5Block(decoder, has_relative_attention_bias=False, layer_idx=1).to(case.dtype)
        x, memory, mask = case.stream(case.seq_len), case.stream(case.source_len), case.causal_mask()
        # The CPU's flash kernel takes no bias that is trained.
        bias = torch.randn(1, HEADS, case.seq_len, case.seq_len, dtype=case.dtype)
        pairs = HEADS * case.seq_len * (case.seq_len + case.source_len)
        named = 0
        if element == 2:
            # T5's norm multiplies its bf16 input, and keeps it beside the float32 copy.
            named += 3 * case.tokens * HIDDEN * element
        if attention == "sdpa":
            # Every layer makes a mask of its own: bias and causal mask, and zeros for the encoder's keys.
            named += pairs * element
        if rate:
            named += dropout_mask(case, 3 * case.tokens * HIDDEN + case.batch * pairs)
            # A dropout inside the feed-forward layer: its mask, and its result beside what ReLU keeps.
            named += 2 * case.tokens * FFN * element
        measured = record_saved_bytes(
            lambda: block(x, attention_mask=mask, position_bias=bias, encoder_hidden_states=memory),  # noqa: B023
            block,
            (memory, bias),
        )
        assert measured == case.graph_bytes(config, case.impl, -1) + named


@pytest.mark.parametrize(
    ("attention", "architecture"),
    [
        ("sdpa", {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}),
        ("eager", {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}),
        ("sdpa", {"multi_query": False}),
        ("eager", {"multi_query": False}),
        # transformers broadcasts the one key head, which keeps the CPU's SDPA from its flash kernel.
        ("eager", {"multi_query": True}),
    ],
)
def test_falcon_layer(attention: str, architecture: dict[str, Any], element: int) -> None:
    """Attention and MLP side by side; two norms in the new architecture, one in the old."""
    for case in cases(attention, element):
        config = transformers.FalconConfig(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=1,
            vocab_size=VOCAB,
            attn_implementation=attention,
            **architecture,
        )
        model = FalconModel(config).to(case.dtype)
        x, mask = case.stream(case.seq_len), case.causal_mask()
        cos_sin = model.rotary_emb(x, torch.arange(case.seq_len)[None])
        new = "new_decoder_architecture" in architecture
        named = layernorm_statistics(case, 2 if new else 1)
        if new or architecture["multi_query"]:
            named += list_indices()
        if attention == "sdpa":
            # In the old architecture the values stay a view of the fused product.
            named += keys_and_values_of_all_heads(case) if new else views_of_a_fused_product(case, 2 * HIDDEN)
        measured = record_saved_bytes(
            lambda: model.h[0](x, None, mask, position_embeddings=cos_sin),  # noqa: B023
            model,
            cos_sin,
        )
        assert measured == case.graph_bytes(config, case.impl) + named


def _llama_like(case: Case, config: Any, model: nn.Module, named: int) -> None:
    """Layers called like Llama's, whose eager attention takes its softmax in float32."""
    x, mask = case.stream(case.seq_len), case.causal_mask()
    cos_sin = model.rotary_emb(x, torch.arange(case.seq_len)[None])
    measured = record_saved_bytes(
        lambda: model.layers[0](x, attention_mask=mask, position_embeddings=cos_sin), model, cos_sin
    )
    assert measured == case.graph_bytes(config, replace(case.impl, softmax="float32")) + named


_SIZES: Mapping[str, int] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
}


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixtral_layer(attention: str, experts: str, element: int) -> None:
    for case in cases(attention, element):
        config = transformers.MixtralConfig(**_SIZES, num_local_experts=4, attn_implementation=attention)
        config._experts_implementation = experts
        model = transformers.MixtralModel(config).to(case.dtype)
        named = routing(case, config.num_experts_per_tok, 4, experts)
        _llama_like(case, config, model, named)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family whose layers are called like Llama's, and its terms."""

    config: str
    model: str
    extra: Mapping[str, Any]
    named: Callable[[Case], int]
    attentions: tuple[str, ...] = ("sdpa", "eager")


def _olmo2(case: Case) -> int:
    rows_of_queries_and_keys = HIDDEN + KV_HEADS * (HIDDEN // HEADS)
    return weights_in_float32(case, case.tokens * (2 * HIDDEN + rows_of_queries_and_keys))


def _qwen2_moe(case: Case) -> int:
    # Its weights go back to bf16 before they meet the experts' results.
    cast = case.tokens * 2 * (case.element - 4)
    return routing(case, 2, 4, "grouped_mm", renormalised=False) + cast


def _deepseek_v3(case: Case) -> int:
    # The latent is a view of a product that also makes the rotated key; in bf16 its norm keeps a float32 copy instead.
    return views_of_a_fused_product(case, 4) if case.element == 4 else 0


LLAMA_LIKE = (
    Family(config="LlamaConfig", model="LlamaModel", extra={}, named=lambda case: 0),
    Family(config="MistralConfig", model="MistralModel", extra={}, named=lambda case: 0),
    Family(config="Qwen2Config", model="Qwen2Model", extra={}, named=lambda case: 0),
    Family(config="Qwen3Config", model="Qwen3Model", extra={"head_dim": 8}, named=lambda case: 0),
    Family(config="Olmo2Config", model="Olmo2Model", extra={}, named=_olmo2),
    Family(
        config="Starcoder2Config",
        model="Starcoder2Model",
        extra={"residual_dropout": 0.0, "embedding_dropout": 0.0},
        named=lambda case: layernorm_statistics(case, 2),
    ),
    Family(
        config="GPTNeoXConfig",
        model="GPTNeoXModel",
        extra={"num_key_value_heads": HEADS},
        named=lambda case: layernorm_statistics(case, 2),
        attentions=("eager",),
    ),
    Family(
        config="Qwen2MoeConfig",
        model="Qwen2MoeModel",
        extra={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
        named=_qwen2_moe,
    ),
    Family(
        config="DeepseekV3Config",
        model="DeepseekV3Model",
        extra={
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": HEADS,
            "first_k_dense_replace": 1,
        },
        named=_deepseek_v3,
        # Keys wider than values keep the CPU's SDPA from its flash kernel.
        attentions=("eager",),
    ),
)


@pytest.mark.parametrize("family", LLAMA_LIKE, ids=lambda family: family.model)
def test_llama_layer_and_its_relatives(family: Family, element: int) -> None:
    for attention in family.attentions:
        for case in cases(attention, element):
            sizes = {**_SIZES, **family.extra}
            config = getattr(transformers, family.config)(**sizes, attn_implementation=attention)
            if "num_experts" in family.extra:
                config._experts_implementation = "grouped_mm"
            model = getattr(transformers, family.model)(config).to(case.dtype)
            _llama_like(case, config, model, family.named(case))
