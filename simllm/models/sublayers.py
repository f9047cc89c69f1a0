"""The sub-layers of a block: attention, latent attention, state-space mixer, feed-forward layer, mixture of experts.

Tensors have the names of the field: q, k, v, context, gate, up. Weights carry the component that tables show
them under.
"""

from __future__ import annotations

from simllm.models.builder import Builder
from simllm.models.graph import Axis, Tensor, Weight
from simllm.models.operators import (
    Activation,
    Attention,
    Combine,
    Conv1d,
    Dispatch,
    GatedActivation,
    GroupedProjection,
    Residual,
    Rope,
    Router,
    Scan,
)
from simllm.models.spec import AttentionSpec, LatentSpec, MambaSpec, MLPSpec, MoESpec, NormSpec

__all__ = ["attention", "feed_forward", "mamba"]

_RMS = NormSpec(kind="rmsnorm")


def attention(b: Builder, spec: AttentionSpec, x: Tensor, prefix: str = "", source: Tensor | None = None) -> Tensor:
    """Attention on ``x``; keys and values come from ``source`` in cross-attention."""
    if spec.latent is not None:
        return _latent_attention(b, spec, spec.latent, x)
    component = "cross_attention" if source else "attention"
    heads = Axis("heads", spec.num_attention_heads * spec.head_dim, spec.num_attention_heads)
    kv_heads = heads
    if spec.num_key_value_heads != spec.num_attention_heads:
        kv_heads = Axis("kv_heads", spec.num_key_value_heads * spec.head_dim, spec.num_key_value_heads)
    names = {"q": (f"{prefix}q", heads), "k": (f"{prefix}k", kv_heads), "v": (f"{prefix}v", kv_heads)}
    if source is None:
        q, k, v = b.project(f"{prefix}qkv", x, names, component, spec.qkv_bias)
    else:
        (q,) = b.project(f"{prefix}q", x, {"q": names["q"]}, component, spec.qkv_bias)
        rest = {"k": names["k"], "v": names["v"]}
        k, v = b.project(f"{prefix}kv", source, rest, component, spec.qkv_bias)
    if spec.qk_norm is not None:
        head = Axis("fixed", spec.head_dim) if spec.qk_norm_per_head else None
        q = b.norm(spec.qk_norm, q, f"{prefix}q_norm", component, head)
        k = b.norm(spec.qk_norm, k, f"{prefix}k_norm", component, head)
    if spec.position == "rope":
        rotated = (Tensor(f"{prefix}q_rope", q.axes), Tensor(f"{prefix}k_rope", k.axes))
        b.add(Rope, f"{prefix}rope", component, (q, k), rotated)
        q, k = rotated
    extra: tuple[Weight, ...] = ()
    if spec.position == "transformer-xl":
        # Relative keys are projected per layer, and two learned query biases per head (arXiv:1901.02860, section 3.3).
        extra = (
            Weight("relative.weight", (b.hidden, heads), component),
            Weight("content_bias", (heads,), component),
            Weight("position_bias", (heads,), component),
        )
    if spec.relative_attention_num_buckets:
        table = (Axis("fixed", spec.relative_attention_num_buckets), Axis("heads", spec.num_attention_heads))
        extra += (Weight("relative_bias.weight", table, "relative_bias"),)
    if spec.sinks:
        extra += (Weight("sinks", (Axis("heads", spec.num_attention_heads),), component),)
    context = _core(b, spec, (q, k, v), spec.head_dim, spec.head_dim, prefix, component, (k, v), extra)
    out = {"o": (f"{prefix}attention_out", b.hidden)}
    return b.project(f"{prefix}o", context, out, component, spec.out_bias)[0]


def _core(
    b: Builder,
    spec: AttentionSpec,
    qkv: tuple[Tensor, Tensor, Tensor],
    head_dim: int,
    v_head_dim: int,
    prefix: str,
    component: str,
    cache: tuple[Tensor, ...],
    weights: tuple[Weight, ...] = (),
) -> Tensor:
    out = Axis("heads", spec.num_attention_heads * v_head_dim, spec.num_attention_heads)
    return b.add(
        Attention,
        f"{prefix}attention_core",
        component,
        qkv,
        (Tensor(f"{prefix}context", (b.tokens, out)),),
        weights,
        mask=spec.mask,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        sliding_window=spec.sliding_window,
        dropout=b.spec.attention_dropout > 0,
        key_axis="source_keys" if spec.mask == "cross" else b.keys,
        cache=cache,
    )


def _latent_attention(b: Builder, spec: AttentionSpec, latent: LatentSpec, x: Tensor) -> Tensor:
    """Low-rank queries and keys-values (arXiv:2405.04434, equations 9 to 19), not absorbed."""
    n, component = spec.num_attention_heads, "attention"
    qk_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    q_axis = Axis("heads", n * qk_dim, n)
    source = x
    if latent.q_lora_rank is not None:
        rank = Axis("fixed", latent.q_lora_rank)
        (compressed,) = b.project("q_a", x, {"q_a": ("q_latent", rank)}, component, spec.qkv_bias)
        source = b.norm(_RMS, compressed, "q_a_norm", component)
    (q,) = b.project("q_b", source, {"q_b": ("q", q_axis)}, component, False)
    down = {
        "kv_a": ("kv_latent", Axis("fixed", latent.kv_lora_rank)),
        "k_rope": ("k_position", Axis("fixed", latent.qk_rope_head_dim)),
    }
    kv_latent, k_position = b.project("kv_a", x, down, component, spec.qkv_bias)
    normed = b.norm(_RMS, kv_latent, "kv_a_norm", component)
    up = {
        "k_b": ("k_content", Axis("heads", n * latent.qk_nope_head_dim, n)),
        "v_b": ("v", Axis("heads", n * latent.v_head_dim, n)),
    }
    k_content, v = b.project("kv_b", normed, up, component, False)
    # The rotated part of the key is copied to every head beside its content part.
    rotated = (Tensor("q_rope", q.axes), Tensor("k", (b.tokens, q_axis)))
    b.add(Rope, "rope", component, (q, k_content, k_position), rotated)
    cache = (kv_latent, k_position)
    context = _core(b, spec, (*rotated, v), qk_dim, latent.v_head_dim, "", component, cache)
    return b.project("o", context, {"o": ("attention_out", b.hidden)}, component, spec.out_bias)[0]


def mamba(b: Builder, spec: MambaSpec, x: Tensor) -> Tensor:
    """The Mamba mixer (arXiv:2312.00752, figure 3)."""
    component = "mamba"
    inner = Axis("inner", spec.inner_size)
    state, dt = Axis("fixed", spec.state_size), Axis("fixed", spec.dt_rank)
    u, z = b.project("in_proj", x, {"x": ("u", inner), "z": ("z", inner)}, component, spec.proj_bias)
    weights: tuple[Weight, ...] = (Weight("conv1d.weight", (inner, Axis("fixed", spec.conv_kernel)), component),)
    if spec.conv_bias:
        weights += (Weight("conv1d.bias", (inner,), component),)
    u = b.add(Conv1d, "conv1d", component, (u,), (Tensor("u_conv", u.axes),), weights)
    u = b.add(Activation, "conv_act", component, (u,), (Tensor("u_act", u.axes),), function="silu")
    parts = {"dt": ("dt_low", dt), "B": ("B", state), "C": ("C", state)}
    dt_low, b_in, c_out = b.project("x_proj", u, parts, component, False)
    if spec.inner_norm is not None:
        dt_low = b.norm(spec.inner_norm, dt_low, "dt_norm", component)
        b_in = b.norm(spec.inner_norm, b_in, "B_norm", component)
        c_out = b.norm(spec.inner_norm, c_out, "C_norm", component)
    (step,) = b.project("dt_proj", dt_low, {"dt_proj": ("dt", inner)}, component, True)
    scan_weights = (Weight("A_log", (inner, state), component), Weight("D", (inner,), component))
    y = b.add(Scan, "scan", component, (u, step, b_in, c_out, z), (Tensor("y", u.axes),), scan_weights)
    return b.project("out_proj", y, {"out": ("mamba_out", b.hidden)}, component, spec.proj_bias)[0]


def feed_forward(b: Builder, spec: MLPSpec | MoESpec, x: Tensor) -> Tensor:
    """A dense feed-forward layer or a mixture of experts."""
    return _moe(b, spec, x) if isinstance(spec, MoESpec) else _mlp(b, spec, x, "", "mlp")


def _mlp(b: Builder, spec: MLPSpec, x: Tensor, prefix: str, component: str) -> Tensor:
    ffn = Axis("ffn", spec.intermediate_size)
    act = (Tensor(f"{prefix}mlp_act", (*x.axes[:-1], ffn)),)
    if spec.gated:
        names = {"gate": (f"{prefix}gate", ffn), "up": (f"{prefix}up", ffn)}
        pair = b.project(f"{prefix}gate_up", x, names, component, spec.bias)
        inner = b.add(GatedActivation, f"{prefix}act", component, pair, act, function=spec.activation)
    else:
        up = b.project(f"{prefix}up", x, {"up": (f"{prefix}up", ffn)}, component, spec.bias)
        inner = b.add(Activation, f"{prefix}act", component, up, act, function=spec.activation)
    return b.project(f"{prefix}down", inner, {"down": (f"{prefix}mlp_out", b.hidden)}, component, spec.bias)[0]


def _moe(b: Builder, spec: MoESpec, x: Tensor) -> Tensor:
    """Router, dispatch, experts, combine, and the shared expert beside them."""
    weights: tuple[Weight, ...] = (Weight("router.weight", (b.hidden, Axis("fixed", spec.num_experts)), "router"),)
    if spec.router_bias:
        weights += (Weight("router.bias", (Axis("fixed", spec.num_experts),), "router"),)
    probabilities = Tensor("router_probabilities", (b.tokens, Axis("fixed", spec.num_experts)), "float32")
    b.add(Router, "router", "router", (x,), (probabilities,), weights, num_experts=spec.num_experts)
    routed = Tensor("routed", (Axis("routed", spec.num_experts_per_tok, spec.num_experts), b.hidden))
    b.add(Dispatch, "dispatch", "experts", (x, probabilities), (routed,))
    out = _experts(b, spec, routed)
    result = b.add(Combine, "combine", "experts", (out, probabilities), (b.stream("experts_out"),))
    if spec.shared is None:
        return result
    component = "shared_experts"
    shared = _mlp(b, spec.shared, x, "shared_", component)
    if spec.shared_gate:
        one = {"shared_gate": ("shared_score", Axis("fixed", 1))}
        (gate,) = b.project("shared_gate", x, one, component, False)
        scaled = (b.stream("shared_scaled"),)
        shared = b.add(GatedActivation, "shared_scale", component, (gate, shared), scaled, function="sigmoid")
    return b.add(Residual, "experts_sum", "experts", (result, shared), (b.stream("moe_out"),))


def _experts(b: Builder, spec: MoESpec, routed: Tensor) -> Tensor:
    expert = spec.expert
    experts, rows = Axis("experts", spec.num_experts), routed.axes[0]
    ffn = Axis("expert_ffn", expert.intermediate_size)
    active = (spec.num_experts_per_tok, spec.num_experts)

    def grouped(name: str, x: Tensor, outputs: dict[str, Axis]) -> tuple[Tensor, ...]:
        weights: list[Weight] = []
        for output, axis in outputs.items():
            weights.append(Weight(f"expert_{output}.weight", (experts, x.axes[-1], axis), "experts", active))
            if expert.bias:
                weights.append(Weight(f"expert_{output}.bias", (experts, axis), "experts", active))
        tensors = tuple(Tensor(f"expert_{output}", (rows, axis)) for output, axis in outputs.items())
        b.add(GroupedProjection, f"expert_{name}", "experts", (x,), tensors, tuple(weights), bias=expert.bias)
        return tensors

    act = (Tensor("expert_act", (rows, ffn)),)
    if expert.gated:
        pair = grouped("gate_up", routed, {"gate": ffn, "up": ffn})
        inner = b.add(
            GatedActivation,
            "expert_act",
            "experts",
            pair,
            act,
            function=expert.activation,
            clamped=expert.clamped,
        )
    else:
        up = grouped("up", routed, {"up": ffn})
        inner = b.add(Activation, "expert_act", "experts", up, act, function=expert.activation)
    return grouped("down", inner, {"down": b.hidden})[0]
