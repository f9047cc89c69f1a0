"""Trainable parameters against peft: its published counts, and peft itself on combinations drawn here."""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.finetuning.names import STACKED_EXPERTS, schemes_of
from simllm.models.finetuning.targets import modules_of
from tests.models.test_transformers import CONFIGS, _instantiate

_ROWS = list(
    csv.DictReader((Path(__file__).parents[2] / "published" / "peft.csv").read_text(encoding="utf-8").splitlines())
)


def _option(config: str, key: str, default: str = "") -> str:
    found = re.search(rf"{key}=([^;]*)", config)
    return found.group(1) if found else default


def _targets(config: str) -> tuple[str, ...]:
    """``a+b``, ``all-linear(a+b)``: these; ``'all-linear' keyword``: peft's own reading of it."""
    text = _option(config, "targets")
    if "keyword" in text:
        return ("all-linear",)
    listed = re.search(r"all-linear\((.*)\)", text)
    text = (listed.group(1) if listed else text).split(" (")[0]
    return tuple(text.split("+"))


def _listed(name: str) -> tuple[str, ...]:
    """The modules that a bare ``all-linear`` stands for in the table: those that its LoRA rows list for the model."""
    return next(_targets(row["config"]) for row in _ROWS if row["name"] == name and "all-linear(" in row["config"])


def _question(row: dict[str, str]) -> tuple[str, dict[str, Any]]:
    method, config = row["method"], row["config"]
    if method in ("LoRA", "DoRA", "VeRA"):
        targets = _targets(config)
        if targets == ("all-linear",) and "keyword" not in config:
            targets = _listed(row["name"])
        return method.lower(), {"rank": int(_option(config, "r")), "targets": targets}
    if method == "AdaLoRA":
        return "adalora", {"rank": int(_option(config, "init_r")), "targets": _targets(config)}
    if method == "IA3":
        return "ia3", {"targets": _targets(config), "feedforward": (_option(config, "feedforward"),)}
    if method == "AdaptionPrompt":
        layers = int(_option(config, "adapter_layers"))
        return "llama-adapter", {"adapter_len": int(_option(config, "adapter_len")), "adapter_layers": layers}
    if method.startswith("Adapter"):
        name = "houlsby" if "Houlsby" in method else "pfeiffer"
        return name, {"bottleneck": int(_option(config, "bottleneck")), "train_norms": "LayerNorms trained" in config}
    virtual = {"virtual_tokens": int(_option(config, "num_virtual_tokens"))}
    if method == "PromptTuning":
        return "prompt", virtual
    if method == "P-Tuning":
        return "p-tuning", virtual | {"encoder_hidden_size": 128, "encoder": "lstm" if "LSTM" in config else "mlp"}
    projected = _option(config, "prefix_projection") == "True"
    # encoder_hidden_size=hidden: the width of the model.
    width = Model.load(row["name"]).spec.hidden_size if projected else 0
    return "prefix", virtual | {"projection": projected, "encoder_hidden_size": width}


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: f"{row['name']} {row['method']} {row['config'][:40]}")
def test_published_counts(row: dict[str, str]) -> None:
    name, options = _question(row)
    tuned = Model.load(row["name"]).finetuned(name, **options)
    assert tuned.trainable_parameters == int(row["trainable_params"])
    # Derived totals with trained norms add the norms to a base that holds them already.
    twice = 0
    if options.get("train_norms"):
        twice = 4 * tuned.spec.hidden_size * tuned.spec.num_hidden_layers
    assert tuned.parameters.total == int(row["total_params"]) - twice


# -- the models of transformers --------------------------------------------------------------------------------

KINDS = [kind for kind in CONFIGS if kind in transformers.CONFIG_MAPPING]
_LINEAR = (torch.nn.Linear, Conv1D)


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_have_their_names_and_shapes(kind: str) -> None:
    """Every linear module of transformers' class is a module here: name, rows, columns, how often."""
    built = _instantiate(CONFIGS[kind])
    theirs = Counter(
        (name, *_shape(module))
        for name, module in built.named_modules()
        if isinstance(module, _LINEAR) and not name.endswith(("lm_head", "decoder", "embed_out"))
    )
    ours: Counter[tuple[str, int, int]] = Counter()
    for part, times in Model.from_config(CONFIGS[kind]).graph.parts:
        for module in modules_of(part, schemes_of(Model.from_config(CONFIGS[kind]).spec.model_type)[0]):
            # Stacked experts and their router are parameters in transformers 5, not modules.
            stacked = re.search(r"(^|\.)experts\.(gate_up|down)_proj$|^mlp\.gate$", module.name)
            if module.name != "lm_head" and not stacked:
                ours[module.name, module.in_features, module.out_features] += times * module.experts
    unfound = Counter(ours)
    for (name, rows, columns), times in theirs.items():
        # Switch numbers its experts in the path.
        short = re.sub(r"expert_\d+\.", "", name)
        match = [
            key for key in ours if (short == key[0] or short.endswith(f".{key[0]}")) and key[1:] == (rows, columns)
        ]
        assert match, f"{name} {rows} x {columns}"
        unfound[max(match, key=lambda key: len(key[0]))] -= times
    assert not any(unfound.values()), {key: n for key, n in unfound.items() if n}


def _draw(kind: str, random: Random) -> tuple[str, dict[str, Any], Any]:
    """A method with options, in simllm's and in peft's words."""
    model = Model.from_config(CONFIGS[kind])
    names = [
        module.name
        for part, _ in model.graph.parts
        for module in modules_of(part, schemes_of(model.spec.model_type)[0])
        if module.name not in ("lm_head", "mlp.gate") and not module.is_expert
    ]
    # peft refuses what Mamba's own kernels read, and takes dense names of stacked experts' families for the experts'.
    names = sorted({name for name in names if not (kind in ("mamba", "falcon_mamba") and name.endswith("out_proj"))})
    if model.spec.model_type in STACKED_EXPERTS:
        names = [name for name in names if name.startswith("self_attn")]
    rank = random.choice([1, 2, 3, 8])
    name = random.choice(["lora", "lora", "lora everywhere", "dora", "adalora", "vera", "ia3", "prompt", "p-tuning"])
    if model.spec.architecture == "encoder" and name in ("prompt", "p-tuning"):
        name = "lora everywhere"  # peft's classes with prompts are for generation and classification
    targets = random.sample(names, random.randint(1, len(names)))
    fan = {"fan_in_fan_out": kind in ("gpt2", "openai-gpt", "gpt_bigcode")}
    if "router" in "".join(targets) and name in ("dora", "vera", "ia3"):
        name = "lora"
    if name == "lora everywhere":
        ours = {"rank": rank, "targets": ("all-linear",)}
        return "lora", ours, peft.LoraConfig(r=rank, target_modules="all-linear", **fan)
    if name in ("lora", "dora"):
        config = peft.LoraConfig(r=rank, target_modules=targets, use_dora=name == "dora", **fan)
        return name, {"rank": rank, "targets": tuple(targets)}, config
    if name == "adalora":
        config = peft.AdaLoraConfig(init_r=rank, target_r=1, total_step=10, target_modules=targets, **fan)
        return name, {"rank": rank, "targets": tuple(targets)}, config
    if name == "vera":
        return name, {"rank": rank, "targets": tuple(targets)}, peft.VeraConfig(r=rank, target_modules=targets, **fan)
    if name == "ia3":
        inner = random.sample(targets, random.randint(0, len(targets)))
        # Where nothing is said, simllm takes what ends a feed-forward layer; peft takes nothing.
        if not inner:
            inner = targets[:1]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=inner, **fan)
        return name, {"targets": tuple(targets), "feedforward": tuple(inner)}, config
    virtual, hidden = random.randint(1, 60), random.choice([16, 48])
    # peft asks for a number of heads where a config states none, and does not use it.
    heads = {"num_attention_heads": 1}
    task = "SEQ_2_SEQ_LM" if model.spec.encoder is not None else "CAUSAL_LM"
    if name == "prompt":
        return (
            name,
            {"virtual_tokens": virtual},
            peft.PromptTuningConfig(num_virtual_tokens=virtual, task_type=task, **heads),
        )
    network = random.choice(["mlp", "lstm"])
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=virtual,
        encoder_hidden_size=hidden,
        task_type=task,
        encoder_reparameterization_type=network.upper(),
        **heads,
    )
    return name, {"virtual_tokens": virtual, "encoder_hidden_size": hidden, "encoder": network}, config


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_combinations(kind: str) -> None:
    name, options, config = _draw(kind, Random(kind))
    base = _instantiate(CONFIGS[kind])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, config)
    theirs = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert Model.from_config(CONFIGS[kind]).finetuned(name, **options).trainable_parameters == theirs, (name, options)


def test_experts_have_a_pair_each() -> None:
    """peft puts a pair beside every matrix of a stacked parameter: E r (in + out)."""
    model = Model.load("mixtral-8x7b")
    tuned = model.finetuned("lora", rank=4, targets=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
    assert tuned.trainable_parameters == 32 * 8 * 4 * ((4096 + 2 * 14336) + (14336 + 4096))


def test_biases_are_all_that_bitfit_trains() -> None:
    built = _instantiate(CONFIGS["gpt2"])
    theirs = sum(p.numel() for name, p in built.named_parameters() if name.endswith(".bias"))
    assert Model.from_config(CONFIGS["gpt2"]).finetuned("bitfit").trainable_parameters == theirs


def test_layers_can_be_chosen() -> None:
    one = Model.load("llama-7b").finetuned("lora", rank=8, layers=(31,))
    assert one.trainable_parameters * 32 == 4194304
    assert Model.load("llama-7b").finetuned("freeze", top=2).trainable_parameters == 2 * 202383360


@pytest.mark.parametrize(
    ("model", "method", "options", "message"),
    [
        ("llama-7b", "lora", {"targets": ("query",)}, "its modules: self_attn.q_proj, self_attn.k_proj"),
        ("llama-7b", "lora", {"rank": 5000}, "rank=5000 is larger than self_attn.q_proj, a 4096 x 4096 matrix"),
        ("llama-7b", "galore", {"rank": 5000}, "rank=5000 is larger"),
        ("llama-7b", "lora", {"rank": 0}, "rank=0 must be a whole number"),
        ("llama-7b", "lorra", {}, "did you mean lora"),
        ("llama-7b", "lora", {"bottleneck": 3}, "lora has no option bottleneck; its options: targets"),
        ("llama-7b", "bitfit", {}, "llama-7b has no biases"),
        ("jamba-v0.1", "prefix", {}, "state-space mixers without keys and values"),
        ("deepseek-v3", "prefix", {}, "keys and values as latents"),
        ("t5-base", "llama-adapter", {}, "for decoders only"),
        ("gpt2", "prompt", {"virtual_tokens": 1024}, "virtual_tokens=1024 fill the whole context of gpt2, 1024 tokens"),
        ("llama-7b", "houlsby", {"bottleneck": 5000}, "bottleneck=5000 is wider"),
        ("llama-7b", "freeze", {}, "freeze needs either top=N"),
        ("llama-7b", "qlora", {"block": 63}, "block=63"),
        ("llama-7b", "ia3", {"targets": ("k_proj",), "feedforward": ("down_proj",)}, "not among the targets"),
        ("llama-7b", "lora", {"layers": (32,)}, "layer 32 does not exist"),
    ],
)
def test_what_does_not_go_together(model: str, method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Model.load(model).finetuned(method, **options)
