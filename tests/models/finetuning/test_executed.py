"""Bytes, FLOPs and parameters of fine-tuned models against peft's, executed by PyTorch on a CPU.

Saved bytes are integers. What PyTorch, the CPU's kernels or peft keep beside the graph is a named term, computed from
the shapes, with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simllm.models import Model
from simllm.models.activations import saved_bytes
from simllm.models.finetuning.qlora import nf4
from simllm.models.graph import Graph, Implementation, Layout
from simllm.parallel.stages import block_frozen_bytes, block_weights
from tests.models.torch_blocks import record_saved_bytes

logging.getLogger("transformers").setLevel(logging.ERROR)

EAGER = Implementation(activation="eager", norm="eager", rope="eager", dropout_add="eager")
BATCH, SEQ, HIDDEN, HEADS, KV, FFN, VOCAB, HEAD = 2, 16, 32, 4, 2, 96, 128, 8
TOKENS, KV_WIDTH, RANK, VIRTUAL = BATCH * SEQ, KV * HEAD, 4, 5
LLAMA_MODULES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV_WIDTH),
    "v_proj": (HIDDEN, KV_WIDTH),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, FFN),
    "up_proj": (HIDDEN, FFN),
    "down_proj": (FFN, HIDDEN),
}
GPT2_MODULES = {
    "c_attn": (HIDDEN, 3 * HIDDEN),
    "attn.c_proj": (HIDDEN, HIDDEN),
    "c_fc": (HIDDEN, 4 * HIDDEN),
    "mlp.c_proj": (4 * HIDDEN, HIDDEN),
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A small model."""

    kind: str
    modules: Mapping[str, tuple[int, int]]
    attention: str
    element: int

    def config(self, layers: int) -> Any:
        if self.kind == "llama":
            return transformers.LlamaConfig(
                hidden_size=HIDDEN,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
                intermediate_size=FFN,
                vocab_size=VOCAB,
                num_hidden_layers=layers,
                attn_implementation=self.attention,
            )
        return transformers.GPT2Config(
            n_embd=HIDDEN,
            n_head=HEADS,
            n_layer=layers,
            vocab_size=VOCAB,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            attn_implementation=self.attention,
        )

    @property
    def impl(self) -> Implementation:
        return replace(
            EAGER,
            attention="flash" if self.attention == "sdpa" else "unfused",
            softmax="float32" if self.kind == "llama" else "activation",
            activation_bytes=self.element,
        )


def bases() -> list[Base]:
    return [
        Base(kind=kind, modules=modules, attention=attention, element=element)
        for kind, modules in (("llama", LLAMA_MODULES), ("gpt2", GPT2_MODULES))
        for attention in ("eager", "sdpa")
        for element in (4, 2)
    ]


# -- what peft and the CPU keep, and the graph does not count --------------------------------------------------


def layernorm_statistics(base: Base, tokens: int) -> int:
    """The CPU keeps mean and 1/deviation of LayerNorm in the dtype of the weight; CUDA and the graph in float32."""
    return 2 * 2 * tokens * (base.element - 4) if base.kind == "gpt2" else 0


def dropout_masks(base: Base) -> int:
    """The CPU's dropout keeps its mask in the activations' dtype; CUDA's and the graph in one byte."""
    return sum(TOKENS * rows * (base.element - 1) for rows, _ in base.modules.values())


def decomposed_weights(base: Base) -> int:
    """DoRA sends an identity through A and B: kept until the norm is taken, and freed before the layer is over."""
    return sum((rows * rows + rows * RANK) * base.element for rows, _ in base.modules.values())


def copied_factors(base: Base, names: tuple[str, ...], inner: str) -> int:
    """IA3's factors are multiplied with one first, and the product is kept beside the parameter."""
    width = sum(base.modules[name][0 if name == inner else 1] for name in names)
    return width * base.element


def singular_values(base: Base, names: tuple[str, ...]) -> int:
    """AdaLoRA keeps the product of A and E and the divisor; its orthogonality loss two r x r matrices and norms."""
    return sum(base.modules[name][0] * RANK * 4 + 4 + 2 * (RANK * RANK + 1) * 4 for name in names)


def masked_sdpa(base: Base) -> int:
    """With a prefix SDPA is given a mask, which it keeps, and keys and values of all heads."""
    if base.attention != "sdpa":
        return 0
    mask = BATCH * SEQ * (SEQ + VIRTUAL) * base.element
    if base.kind == "llama":
        return mask + 2 * BATCH * (SEQ + VIRTUAL) * (HIDDEN - KV_WIDTH) * base.element
    # GPT-2's queries stay a view of the fused product.
    return mask + TOKENS * 2 * HIDDEN * base.element


# -- the methods -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method in peft's words and in simllm's."""

    config: type
    theirs: Mapping[str, Any] = field(default_factory=dict)
    name: str
    ours: Mapping[str, Any] = field(default_factory=dict)


def method(case: str, base: Base) -> tuple[Method, int]:
    """The method, and the named terms of one layer."""
    llama = base.kind == "llama"
    queries = ("q_proj", "v_proj") if llama else ("c_attn",)
    fan = {} if llama else {"fan_in_fan_out": True}
    if case.startswith("lora"):
        targets = "all-linear" if case != "lora" else list(queries)
        rate = 0.1 if case.endswith("dropout") else 0.0
        return Method(
            config=peft.LoraConfig,
            theirs={"r": RANK, "target_modules": targets, "lora_dropout": rate, **fan},
            name="lora",
            ours={
                "rank": RANK,
                "targets": ("all-linear",) if case != "lora" else queries,
                "dropout": rate,
            },
        ), dropout_masks(base) if rate else 0
    if case == "dora":
        return Method(
            config=peft.LoraConfig,
            theirs={"r": RANK, "target_modules": "all-linear", "use_dora": True},
            name="dora",
            ours={"rank": RANK, "targets": ("all-linear",)},
        ), decomposed_weights(base)
    if case == "adalora":
        return Method(
            config=peft.AdaLoraConfig,
            theirs={"init_r": RANK, "target_r": 2, "total_step": 10, "target_modules": list(queries), **fan},
            name="adalora",
            ours={"rank": RANK, "targets": queries},
        ), singular_values(base, queries)
    if case == "vera":
        return Method(
            config=peft.VeraConfig,
            theirs={"r": 8, "target_modules": list(queries[:1])},
            name="vera",
            ours={"rank": 8, "targets": queries[:1]},
        ), 0
    if case == "ia3":
        names = ("k_proj", "v_proj", "down_proj") if llama else ("c_attn", "mlp.c_proj")
        return Method(
            config=peft.IA3Config,
            theirs={"target_modules": list(names), "feedforward_modules": [names[-1]], **fan},
            name="ia3",
            ours={"targets": names},
        ), copied_factors(base, names, names[-1])
    if case == "prompt":
        return Method(
            config=peft.PromptTuningConfig,
            theirs={"num_virtual_tokens": VIRTUAL},
            name="prompt",
            ours={"virtual_tokens": VIRTUAL},
        ), 0
    if case == "p-tuning":
        return Method(
            config=peft.PromptEncoderConfig,
            theirs={"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 16},
            name="p-tuning",
            ours={"virtual_tokens": VIRTUAL, "encoder_hidden_size": 16},
        ), 0
    projection = case == "prefix projected"
    extra = {"encoder_hidden_size": 24} if projection else {}
    return Method(
        config=peft.PrefixTuningConfig,
        theirs={"num_virtual_tokens": VIRTUAL, "prefix_projection": projection, **extra},
        name="prefix",
        ours={"virtual_tokens": VIRTUAL, "projection": projection, **extra},
    ), masked_sdpa(base)


CASES = (
    "lora",
    "lora everywhere",
    "lora dropout",
    "dora",
    "adalora",
    "vera",
    "ia3",
    "prompt",
    "p-tuning",
    "prefix",
    "prefix projected",
)


def executed(base: Base, chosen: Method, layers: int) -> nn.Module:
    torch.manual_seed(0)
    dtype = torch.float32 if base.element == 4 else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(base.config(layers)).to(dtype)
    config = chosen.config(task_type="CAUSAL_LM", **chosen.theirs)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype).train()


def predicted(base: Base, chosen: Method, layers: int) -> Model:
    return Model.from_config(base.config(layers).to_dict()).finetuned(chosen.name, **chosen.ours)


def run(model: nn.Module) -> Any:
    ids = torch.arange(TOKENS).reshape(BATCH, SEQ) % VOCAB
    return model(input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", bases(), ids=lambda b: f"{b.kind} {b.attention} {b.element}")
def test_saved_bytes_of_a_layer(base: Base, case: str) -> None:
    """Three layers less two: a layer behind others, whose input has a gradient."""
    if case == "dora" and base.kind == "gpt2":
        pytest.skip("peft's Conv1D keeps more of DoRA's temporary weight")
    if case == "adalora" and base.element == 2:
        pytest.skip("peft promotes AdaLoRA's product to float32 in bf16")
    chosen, named = method(case, base)
    three, two = (executed(base, chosen, layers) for layers in (3, 2))
    measured = record_saved_bytes(lambda: run(three), three) - record_saved_bytes(lambda: run(two), two)
    graph = predicted(base, chosen, 3).graph
    layout = Layout(batch=BATCH, seq_len=SEQ + graph.virtual_tokens)
    named += layernorm_statistics(base, BATCH * layout.seq_len)
    assert measured == saved_bytes(graph.layers[-1], layout, base.impl) + named


# In the first layer, eager attention skips the products whose gradient nobody asks for; a flash kernel makes them all.
_SKIPPED = {"lora": 1, "vera": 2, "adalora": 1, "ia3": 1}


@pytest.mark.parametrize("case", CASES)
def test_flops_and_parameters_of_a_model(case: str) -> None:
    base = bases()[0]
    chosen, _ = method(case, base)
    model, ours = executed(base, chosen, 2), predicted(base, chosen, 2)
    with FlopCounterMode(display=False) as counter:
        loss = run(model).loss
        forward = counter.get_total_flops()
        loss.backward()
    keys = SEQ + (VIRTUAL if case.startswith("prefix") else 0)
    product = 2 * BATCH * HEADS * SEQ * keys * HEAD
    skipped = product * _SKIPPED.get(case, 1 if case.startswith("prefix") else 0)
    # AdaLoRA's loss holds A and B against orthogonality: one product with their transposes each, two backward.
    gram = 2 * RANK * RANK * sum(sum(LLAMA_MODULES[n]) for n in ("q_proj", "v_proj")) * 2 if case == "adalora" else 0
    counts = ours.flops(SEQ, BATCH)
    assert forward == counts.forward_full_attention + gram
    assert counter.get_total_flops() == counts.training_full_attention - skipped + 3 * gram
    assert ours.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours.parameters.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", ["lora", "lora everywhere", "ia3", "vera"])
def test_first_layer_keeps_nothing_before_its_first_trained_weight(case: str) -> None:
    """The whole of two layers with flash attention: named are rotary tables and the mean of the loss."""
    base = replace(bases()[0], attention="sdpa")
    chosen, named = method(case, base)
    model, graph = executed(base, chosen, 2), predicted(base, chosen, 2).graph
    rotary, mean = 2 * SEQ * HEAD * 4, 4
    layout = Layout(batch=BATCH, seq_len=SEQ)
    ours = sum(saved_bytes(part, layout, base.impl) * times for part, times in graph.parts)
    # Factors are kept for the gradient of what they scale: not those of the first keys and values.
    absent = 2 * KV_WIDTH * base.element if case == "ia3" else 0
    assert record_saved_bytes(lambda: run(model), model) == ours + rotary + mean + 2 * named - absent
    assert len({id(layer) for layer in graph.layers}) == 2


# -- adapters and quantised storage, as plain PyTorch --------------------------------------------------------------


class Adapter(nn.Module):
    """Houlsby's adapter behind a linear module."""

    def __init__(self, linear: nn.Module, bottleneck: int) -> None:
        super().__init__()
        self.linear, width = linear, HIDDEN
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        result: Tensor = h + self.up(torch.relu(self.down(h)))
        return result


def _layer_difference(build: Any) -> int:
    counts = []
    for layers in (3, 2):
        model = build(layers)
        counts.append(record_saved_bytes(lambda: run(model), model))  # noqa: B023
    return counts[0] - counts[1]


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
def test_adapters(name: str) -> None:
    for base in (b for b in bases() if b.kind == "llama"):

        def build(layers: int) -> nn.Module:
            dtype = torch.float32 if base.element == 4 else torch.bfloat16  # noqa: B023
            model = transformers.AutoModelForCausalLM.from_config(base.config(layers))  # noqa: B023
            model.requires_grad_(False)
            for layer in model.model.layers:
                if name == "houlsby":
                    layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj, 6)
                layer.mlp.down_proj = Adapter(layer.mlp.down_proj, 6)
            return model.to(dtype).train()

        ours = Model.from_config(base.config(3).to_dict()).finetuned(name, bottleneck=6)
        measured = _layer_difference(build)
        assert measured == saved_bytes(ours.graph.layers[-1], Layout(batch=BATCH, seq_len=SEQ), base.impl)
        assert ours.trainable_parameters == sum(p.numel() for p in build(3).parameters() if p.requires_grad)


class _FourBit(torch.autograd.Function):
    """A product with a weight that is expanded for it, forward and again backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FourBitLinear) -> Tensor:
        ctx.module = module
        return x @ module.expanded().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.module.expanded(), None


class FourBitLinear(nn.Linear):
    """A linear module whose weight is kept in four bits with doubly quantised scales."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.in_features * linear.out_features
        self.dtype = linear.weight.dtype
        scales = -(-count // 64)
        self.register_buffer("packed", torch.zeros(-(-count // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.ones(-(-scales // 256)))
        self.register_buffer("codes", torch.zeros(16))
        self.register_buffer("codes_of_scales", torch.zeros(256))
        self.register_buffer("mean_of_scales", torch.zeros(1))
        self.bias = None

    def expanded(self) -> Tensor:
        return torch.ones(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _FourBit.apply(x, self)
        return result


def _quantised(base: Base, layers: int) -> nn.Module:
    dtype = torch.float32 if base.element == 4 else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(base.config(layers)).to(dtype)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    four = FourBitLinear(child)
                    four.A = nn.Linear(child.in_features, RANK, bias=False, dtype=dtype)
                    four.B = nn.Linear(RANK, child.out_features, bias=False, dtype=dtype)
                    setattr(parent, name, _WithLora(four))
    return model.train()


class _WithLora(nn.Module):
    def __init__(self, four: FourBitLinear) -> None:
        super().__init__()
        self.four = four

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.four(x) + self.four.B(self.four.A(x)) * 2.0
        return result


def test_quantised_storage() -> None:
    """What is kept for the backward pass is LoRA's; what stays in memory is the packed weights."""
    for base in (b for b in bases() if b.kind == "llama"):
        ours = Model.from_config(base.config(3).to_dict()).finetuned("qlora", rank=RANK)
        layer, layout = ours.graph.layers[-1], Layout(batch=BATCH, seq_len=SEQ)
        measured = _layer_difference(lambda layers: _quantised(base, layers))  # noqa: B023
        assert measured == saved_bytes(layer, layout, base.impl)
        module = _quantised(base, 1).model.layers[0]
        persistent = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        assert persistent == _persistent(layer, layout, base.element)


def _persistent(layer: Graph, layout: Layout, element: int) -> float:
    return sum(block_frozen_bytes(layer, layout, element)) + sum(block_weights(layer, layout)) * element


def test_double_quantisation_saves_what_the_paper_says() -> None:
    """0.5 bits an element for the scales become 0.127 (Dettmers 2023, section 3)."""
    count = 64 * 256 * 1000
    single, double = nf4(double=False), nf4()
    assert 8 * (single.bytes(count) - single.table_bytes) / count == 4.5
    assert 8 * (double.bytes(count) - double.table_bytes) / count == pytest.approx(4.127, abs=5e-4)
