"""The model that Megatron-LM's arguments describe.

Names, meanings and defaults are those of ``megatron/training/arguments.py`` of Megatron-LM with Megatron-Core 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simllm.errors import InputError, UnsupportedError
from simllm.export.megatron_model import TANH_GELU
from simllm.models import Model
from simllm.models.spec import (
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    LatentSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    StackSpec,
)

__all__ = ["model_from_arguments"]


def _places(text: str, layers: int, name: str) -> list[bool]:
    """Where a pattern says yes: N means the first of every N layers, a list says it for each.

    >>> _places("([0]*1+[1]*3)", 4, "moe-layer-freq"), _places("2", 4, "moe-layer-freq")
    ([False, True, True, True], [True, False, True, False])
    """
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return [layer % int(text) == 0 for layer in range(layers)]
    flags: list[bool] = []
    body = text.replace(" ", "")
    times = 1
    outer = re.fullmatch(r"\((.*)\)\*(\d+)", body)
    if outer:
        body, times = outer[1], int(outer[2])
    for part in body.strip("()").split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", part)
        if match is None:
            raise InputError(f"--{name} {text} is not understood; write it as ([0]*3+[1]*58) or as a number")
        flags += [value == "1" for value in match[1].split(",")] * int(match[2] or 1)
    flags *= times
    if len(flags) != layers:
        raise InputError(f"--{name} {text} is for {len(flags)} layers, but --num-layers says {layers}")
    return flags


def model_from_arguments(args: Mapping[str, Any]) -> Model | None:
    """The model that arguments describe, or None where they describe none.

    Parameters
    ----------
    args : dict of str to value
        Names without dashes; whole numbers and fractions as numbers, switches as True.
    """
    if "num-layers" not in args:
        return None
    missing = [f"--{name}" for name in ("hidden-size", "num-attention-heads", "vocab-size") if name not in args]
    if "padded-vocab-size" in args and "--vocab-size" in missing:
        missing.remove("--vocab-size")
    if missing:
        raise InputError(f"the arguments describe a model without {', '.join(missing)}; add them or give MODEL")
    layers, hidden, heads = args["num-layers"], args["hidden-size"], args["num-attention-heads"]
    if not args.get("kv-channels") and hidden % heads:
        raise InputError(f"--num-attention-heads {heads} does not divide --hidden-size {hidden}; give --kv-channels")
    swiglu = bool(args.get("swiglu"))
    # Without a width Megatron-LM takes four times the model's, two thirds of that with SwiGLU, in multiples of 64.
    width = args.get("ffn-hidden-size") or (int((4 * hidden * 2 / 3) / 64) * 64 if swiglu else 4 * hidden)
    bias = not args.get("disable-bias-linear")
    activation = "silu" if swiglu else "relu2" if args.get("squared-relu") else "gelu"
    if activation == "gelu" and args.get("openai-gelu"):
        activation = TANH_GELU[0]
    dense = MLPSpec(intermediate_size=width, activation=activation, gated=swiglu, bias=bias)
    norm = _norm(args)
    kind = "rope" if args.get("use-rotary-position-embeddings") else args.get("position-embedding-type")
    kind = kind or "learned_absolute"
    if kind not in ("rope", "none", "learned_absolute"):
        raise UnsupportedError(f"--position-embedding-type {kind} is not modelled; rope, none and learned_absolute are")
    attention = _attention(args, heads, hidden, bias, norm, kind)
    places = _places(str(args.get("moe-layer-freq", 1)), layers, "moe-layer-freq")
    windows = [bool(args.get("window-size"))] * layers
    if windows[0] and "window-attn-skip-freq" in args:
        text = str(args["window-attn-skip-freq"])
        # A number N means N - 1 layers with a window and one without.
        windows = (
            [(layer + 1) % int(text) != 0 for layer in range(layers)]
            if text.isdigit() and int(text)
            else _places(text, layers, "window-attn-skip-freq")
        )
    moe = _moe(args, dense)
    blocks = tuple(
        BlockSpec(
            mixer=attention if window else replace(attention, sliding_window=None),
            mlp=moe if moe and place else dense,
            norm=norm,
        )
        for window, place in zip(windows, places, strict=True)
    )
    if kind == "learned_absolute" and "max-position-embeddings" not in args:
        raise InputError("learned positions need --max-position-embeddings")
    spec = ModelSpec(
        name="megatron-arguments",
        family="megatron",
        model_type="megatron",
        architecture="causal-decoder",
        vocab_size=args.get("vocab-size") or args["padded-vocab-size"],
        hidden_size=hidden,
        decoder=StackSpec(
            layers=blocks,
            positions=args["max-position-embeddings"] if kind == "learned_absolute" else 0,
            final_norm=norm,
        ),
        head=HeadSpec(tied=not args.get("untie-embeddings-and-output-weights")),
        multi_token_prediction=(blocks[-1],) * args.get("mtp-num-layers", 0),
        context_length=args.get("max-position-embeddings"),
        hidden_dropout=args.get("hidden-dropout", 0.1),
        attention_dropout=args.get("attention-dropout", 0.1),
    )
    return Model(spec)


def _norm(args: Mapping[str, Any]) -> NormSpec:
    kind = args.get("normalization", "LayerNorm")
    if kind not in ("LayerNorm", "RMSNorm"):
        raise InputError(f"--normalization {kind} is not known; LayerNorm and RMSNorm are")
    return NormSpec(kind="rmsnorm") if kind == "RMSNorm" else NormSpec(kind="layernorm", bias=True)


def _attention(
    args: Mapping[str, Any], heads: int, hidden: int, bias: bool, norm: NormSpec, position: str
) -> AttentionSpec:
    latent = None
    head_dim = args.get("kv-channels") or hidden // heads
    kv_heads = args.get("num-query-groups", 1) if args.get("group-query-attention") else heads
    if args.get("multi-latent-attention"):
        if not args.get("qk-layernorm"):
            raise UnsupportedError("--multi-latent-attention without --qk-layernorm, its norms, is not modelled")
        latent = LatentSpec(
            kv_lora_rank=args.get("kv-lora-rank", 32),
            q_lora_rank=args.get("q-lora-rank"),
            qk_nope_head_dim=args.get("qk-head-dim", 128),
            qk_rope_head_dim=args.get("qk-pos-emb-head-dim", 64),
            v_head_dim=args.get("v-head-dim", 128),
        )
        head_dim, kv_heads = latent.qk_nope_head_dim + latent.qk_rope_head_dim, heads
    softmax = args.get("softmax-type", "vanilla")
    if softmax not in ("vanilla", "learnable"):
        raise UnsupportedError(f"--softmax-type {softmax} is not modelled; vanilla and learnable are")
    window = None
    if "window-size" in args:
        match = re.fullmatch(r"\(?\s*(\d+)\s*,\s*0\s*\)?", str(args["window-size"]))
        if match is None:
            raise UnsupportedError(f"--window-size {args['window-size']} is not a causal window such as (4095,0)")
        window = int(match[1]) + 1
    return AttentionSpec(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        position="rope" if position == "rope" else "none",
        sliding_window=window,
        qkv_bias=bias or bool(args.get("add-qkv-bias")),
        out_bias=bias,
        qk_norm=norm if args.get("qk-layernorm") and latent is None else None,
        sinks=softmax == "learnable",
        latent=latent,
    )


def _moe(args: Mapping[str, Any], dense: MLPSpec) -> MoESpec | None:
    if not args.get("num-experts"):
        return None
    shared = args.get("moe-shared-expert-intermediate-size")
    return MoESpec(
        num_experts=args["num-experts"],
        num_experts_per_tok=args.get("moe-router-topk", 2),
        expert=replace(dense, intermediate_size=args.get("moe-ffn-hidden-size") or dense.intermediate_size),
        shared=replace(dense, intermediate_size=shared) if shared else None,
    )
