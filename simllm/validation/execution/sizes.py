"""A model of the same components at a size that a laptop executes."""

from __future__ import annotations

from dataclasses import replace

from simllm.models.spec import AttentionSpec, BlockSpec, LatentSpec, MambaSpec, MLPSpec, ModelSpec, MoESpec, StackSpec

__all__ = ["shrink"]

_HEADS, _EXPERTS, _POSITIONS = 4, 4, 256


def shrink(spec: ModelSpec, layers: int = 4, hidden_size: int = 64, vocab_size: int = 512) -> ModelSpec:
    """The same components with few layers, narrow rows and a small vocabulary.

    Four heads (of keys and values the same share as before, at least one), four experts, a feed-forward layer of the
    same proportion. Which kinds of layers there are is kept: one of each kind first, then the last kind.

    Parameters
    ----------
    spec : ModelSpec
    layers, hidden_size, vocab_size : int
        Layers of each stack.

    Examples
    --------
    >>> from simllm.models import Model
    >>> small = shrink(Model.load("llama-3-70b").spec)
    >>> mixer = small.decoder.layers[0].mixer
    >>> len(small.decoder.layers), mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim
    (4, 4, 1, 16)
    """
    ratio = hidden_size / spec.hidden_size

    def width(size: int) -> int:
        return max(32, round(size * ratio / 32) * 32)

    def mlp(part: MLPSpec) -> MLPSpec:
        return replace(part, intermediate_size=width(part.intermediate_size))

    def mixer(part: AttentionSpec) -> AttentionSpec:
        head_dim = hidden_size // _HEADS
        share = part.num_key_value_heads / part.num_attention_heads
        latent = part.latent
        if latent is not None:
            latent = LatentSpec(
                kv_lora_rank=hidden_size // 2,
                q_lora_rank=None if latent.q_lora_rank is None else hidden_size // 2,
                qk_nope_head_dim=head_dim // 2,
                qk_rope_head_dim=head_dim // 2,
                v_head_dim=head_dim,
            )
        return replace(
            part,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS if part.latent else max(1, round(_HEADS * share)),
            head_dim=head_dim,
            sliding_window=None if part.sliding_window is None else min(part.sliding_window, 16),
            latent=latent,
        )

    def block(part: BlockSpec) -> BlockSpec:
        feed: MLPSpec | MoESpec | None = part.mlp
        if isinstance(feed, MoESpec):
            chosen = min(feed.num_experts_per_tok, 2)
            shared = mlp(feed.shared) if feed.shared else None
            feed = replace(
                feed, num_experts=_EXPERTS, num_experts_per_tok=chosen, expert=mlp(feed.expert), shared=shared
            )
        elif feed is not None:
            feed = mlp(feed)
        own = part.mixer if isinstance(part.mixer, MambaSpec) else mixer(part.mixer)
        return replace(
            part, mixer=own, mlp=feed, cross_attention=mixer(part.cross_attention) if part.cross_attention else None
        )

    def stack(part: StackSpec) -> StackSpec:
        kinds = list(dict.fromkeys(part.layers))[:layers]
        chosen = kinds + [part.layers[-1]] * (layers - len(kinds))
        return replace(
            part,
            layers=tuple(block(one) for one in chosen),
            positions=min(part.positions, _POSITIONS),
        )

    return replace(
        spec,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        vocab_multiple=1,
        decoder=stack(spec.decoder),
        encoder=stack(spec.encoder) if spec.encoder else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
