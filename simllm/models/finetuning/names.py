"""What the modules of a layer are called in Hugging Face's classes: module -> part of the graph, by ``model_type``.

A part is written ``operator:weight,weight``: the product that the graph makes of a module, and which of its weights the
module holds; several where the module is fused. ``-operator`` or ``+operator`` behind it: only in layers without, or
with, that operator.
Where the public class is not transformers' own, a second scheme has the names of the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["STACKED_EXPERTS", "schemes_of"]

#: Families whose experts were modules in transformers 4 and are one parameter since: ``all-linear`` still means them
#: and the router, as peft reads it.
STACKED_EXPERTS: Final = frozenset(
    {"deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "kimi_k2", "minimax_m2", "mixtral", "olmoe", "qwen3_moe"}
)

Scheme = Mapping[str, str]


def _attention(prefix: str, out: str = "o_proj", names: str = "{}_proj", operators: str = "") -> dict[str, str]:
    """Separate queries, keys and values, and the product behind them."""
    first, rest = (f"{operators}q", f"{operators}kv") if operators else ("qkv", "qkv")
    parts = {"q": f"{first}:q", "k": f"{rest}:k", "v": f"{rest}:v"}
    return {f"{prefix}.{names.format(n)}": part for n, part in parts.items()} | {f"{prefix}.{out}": f"{operators}o:o"}


def _gated(prefix: str, operators: str = "") -> dict[str, str]:
    """Gate, up and down as three modules."""
    return {
        f"{prefix}.gate_proj": f"{operators}gate_up:gate",
        f"{prefix}.up_proj": f"{operators}gate_up:up",
        f"{prefix}.down_proj": f"{operators}down:down",
    }


def _plain(up: str, down: str) -> dict[str, str]:
    """A feed-forward layer of two matrices."""
    return {up: "up:up", down: "down:down"}


def _experts(prefix: str) -> dict[str, str]:
    """Experts as two three-dimensional parameters."""
    return {
        f"{prefix}.gate_up_proj": "expert_gate_up:expert_gate,expert_up",
        f"{prefix}.down_proj": "expert_down:expert_down",
    }


_FUSED: Final = "qkv:q,k,v"

_LLAMA: Final = _attention("self_attn") | _gated("mlp")
_OUTSIDE: Final = {"project_in": "project_in:project_in", "project_out": "project_out:project_out"}
_GPT2: Final = {"attn.c_attn": _FUSED, "attn.c_proj": "o:o"} | _plain("mlp.c_fc", "mlp.c_proj")
_OPT: Final = _attention("self_attn", "out_proj") | _plain("fc1", "fc2")
_BLOOM: Final = {"self_attention.query_key_value": _FUSED, "self_attention.dense": "o:o"} | _plain(
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
)
_NEOX: Final = {"attention.query_key_value": _FUSED, "attention.dense": "o:o"} | _plain(
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
)
_PHI3: Final = {
    "self_attn.qkv_proj": _FUSED,
    "self_attn.o_proj": "o:o",
    "mlp.gate_up_proj": "gate_up:gate,up",
    "mlp.down_proj": "down:down",
}
_GLM: Final = _attention("self_attn") | {"mlp.gate_up_proj": "gate_up:gate,up", "mlp.down_proj": "down:down"}
_CHATGLM: Final = {
    "self_attention.query_key_value": _FUSED,
    "self_attention.dense": "o:o",
    "mlp.dense_h_to_4h": "gate_up:gate,up",
    "mlp.dense_4h_to_h": "down:down",
}
_MPT: Final = {"attn.Wqkv": _FUSED, "attn.out_proj": "o:o"} | _plain("ffn.up_proj", "ffn.down_proj")
_ROUTER: Final = {"mlp.gate": "router:router"}
_LLAMA_MOE: Final = _LLAMA | _experts("mlp.experts")
_SHARED: Final = _gated("mlp.shared_experts", "shared_")
_DEEPSEEK: Final = (
    {
        "self_attn.q_proj": "q_b:q_b -q_a",
        "self_attn.q_a_proj": "q_a:q_a",
        "self_attn.q_b_proj": "q_b:q_b +q_a",
        "self_attn.kv_a_proj_with_mqa": "kv_a:kv_a,k_rope",
        "self_attn.kv_b_proj": "kv_b:k_b,v_b",
        "self_attn.o_proj": "o:o",
    }
    | _gated("mlp")
    | _SHARED
    | _ROUTER
    | _experts("mlp.experts")
)
_QWEN2_MOE: Final = (
    _LLAMA_MOE | _gated("mlp.shared_expert", "shared_") | {"mlp.shared_expert_gate": "shared_gate:shared_gate"}
)
_MAMBA: Final = {
    "in_proj": "in_proj:x,z",
    "x_proj": "x_proj:dt,B,C",
    "dt_proj": "dt_proj:dt_proj",
    "out_proj": "out_proj:out",
}
_T5: Final = (
    _attention("SelfAttention", "o", "{}")
    | _attention("EncDecAttention", "o", "{}", "cross_")
    | {
        "DenseReluDense.wi": "up:up",
        "DenseReluDense.wi_0": "gate_up:gate",
        "DenseReluDense.wi_1": "gate_up:up",
        "DenseReluDense.wo": "down:down",
    }
)
_SWITCH: Final = (
    _attention("SelfAttention", "o", "{}")
    | _attention("EncDecAttention", "o", "{}", "cross_")
    | {
        "mlp.wi": "up:up",
        "mlp.wo": "down:down",
        "mlp.router.classifier": "router:router",
        "mlp.experts.wi": "expert_up:expert_up",
        "mlp.experts.wo": "expert_down:expert_down",
    }
)
_BART: Final = (
    _attention("self_attn", "out_proj")
    | _attention("encoder_attn", "out_proj", operators="cross_")
    | _plain("fc1", "fc2")
)
_BERT: Final = {
    "attention.self.query": "qkv:q",
    "attention.self.key": "qkv:k",
    "attention.self.value": "qkv:v",
    "attention.output.dense": "o:o",
    "intermediate.dense": "up:up",
    "output.dense": "down:down",
}
_STARCODER2: Final = _attention("self_attn") | _plain("mlp.c_fc", "mlp.c_proj")
_LLAMA4: Final = (
    _attention("self_attn")
    | _gated("feed_forward")
    | _gated("feed_forward.shared_expert", "shared_")
    | {"feed_forward.router": "router:router"}
)
#: Models without a public class: the graph's own names.
_OWN: Final = (
    _attention("attention", "o", "{}")
    | {"mlp.gate": "gate_up:gate", "mlp.gated_up": "gate_up:up", "mlp.up": "up:up", "mlp.down": "down:down"}
    | {"experts.gate_up": "expert_gate_up:expert_gate,expert_up", "experts.down": "expert_down:expert_down"}
)

_SCHEMES: Final[Mapping[str, tuple[Scheme, ...]]] = {
    "baichuan": ({"self_attn.W_pack": _FUSED, "self_attn.o_proj": "o:o"} | _gated("mlp"),),
    "bart": (_BART,),
    "bert": (_BERT | {"predictions.transform.dense": "transform:transform"},),
    "bloom": (_BLOOM,),
    "chatglm": (_GLM, _CHATGLM, _NEOX),
    "codegen": ({"attn.qkv_proj": _FUSED, "attn.out_proj": "o:o"} | _plain("mlp.fc_in", "mlp.fc_out"),),
    "dbrx": ({"attn.Wqkv": _FUSED, "attn.out_proj": "o:o", "ffn.router.layer": "router:router"},),
    "deepseek": (_LLAMA_MOE | _SHARED,),
    "deepseek_v2": (_DEEPSEEK,),
    "deepseek_v3": (_DEEPSEEK,),
    "dots1": (_LLAMA_MOE | _SHARED | _ROUTER,),
    "falcon": (_BLOOM,),
    "falcon_mamba": ({f"mixer.{name}": part for name, part in _MAMBA.items()},),
    "glm": (_GLM,),
    "glm-130b": (_NEOX,),
    "glm4": (_GLM,),
    "glm4_moe": (_LLAMA_MOE | _SHARED | _ROUTER,),
    "gpt2": (_GPT2,),
    "gpt_bigcode": (_GPT2,),
    "gpt_neo": (_attention("attn.attention", "out_proj") | _plain("mlp.c_fc", "mlp.c_proj"),),
    "gpt_neox": (_NEOX,),
    "gpt_oss": (_attention("self_attn") | _experts("mlp.experts"),),
    "gptj": (_attention("attn", "out_proj") | _plain("mlp.fc_in", "mlp.fc_out"),),
    "granitemoe": (_attention("self_attn"),),
    "internlm2": (
        {
            "attention.wqkv": _FUSED,
            "attention.wo": "o:o",
            "feed_forward.w1": "gate_up:gate",
            "feed_forward.w3": "gate_up:up",
            "feed_forward.w2": "down:down",
        },
    ),
    "jamba": (
        {f"mamba.{name}": part for name, part in _MAMBA.items()}
        | _gated("feed_forward")
        | _experts("feed_forward.experts")
        | _attention("self_attn"),
    ),
    "kimi_k2": (_DEEPSEEK,),
    "llama4": (_LLAMA4,),
    "llama4_text": (_LLAMA4,),
    "m2m_100": (_BART,),
    "mamba": ({f"mixer.{name}": part for name, part in _MAMBA.items()},),
    "mbart": (_BART,),
    "minimax_m2": (_attention("self_attn") | _ROUTER | _experts("mlp.experts"),),
    "mixtral": (_attention("self_attn") | _ROUTER | _experts("mlp.experts"),),
    "mosaic_gpt": (_MPT,),
    "mpt": (_MPT,),
    "mt5": (_T5,),
    "nemotron": (_attention("self_attn") | _plain("mlp.up_proj", "mlp.down_proj"),),
    "olmoe": (_attention("self_attn") | _ROUTER | _experts("mlp.experts"),),
    "openai-gpt": (_GPT2,),
    "opt": (_OPT | _OUTSIDE,),
    "phi": (_attention("self_attn", "dense") | _plain("mlp.fc1", "mlp.fc2"),),
    "phi3": (_PHI3,),
    "phimoe": (_attention("self_attn") | _experts("mlp.experts") | {"mlp.router": "router:router"},),
    "qwen": (
        {
            "attn.c_attn": _FUSED,
            "attn.c_proj": "o:o",
            "mlp.w1": "gate_up:up",
            "mlp.w2": "gate_up:gate",
            "mlp.c_proj": "down:down",
        },
    ),
    "qwen2_moe": (_QWEN2_MOE,),
    "qwen3_moe": (_LLAMA_MOE | _ROUTER,),
    "roberta": (_BERT | {"lm_head.dense": "transform:transform"},),
    "starcoder2": (_STARCODER2,),
    "switch_transformers": (_SWITCH,),
    "t5": (_T5,),
    "umt5": (_T5,),
    "xglm": (_OPT,),
    "xlm-roberta": (_BERT | {"lm_head.dense": "transform:transform"},),
} | dict.fromkeys(("palm", "lamda", "gopher", "chinchilla", "glam", "grok-1"), (_OWN,))


def schemes_of(model_type: str) -> tuple[Scheme, ...]:
    """The schemes of names for a ``model_type``, transformers' own first; LLaMA's for the many that share them.

    >>> schemes_of("llama")[0]["self_attn.q_proj"]
    'qkv:q'
    """
    return _SCHEMES.get(model_type, (_LLAMA,))
