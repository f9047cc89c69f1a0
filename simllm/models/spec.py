"""What a model is: data only, the names of Hugging Face's configs where they have one.

A `ModelSpec` says which components a model has and how large they are. It computes nothing: `simllm.models.build`
turns it into the one graph from which parameters, FLOPs, activations, caches and communication are folded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Architecture",
    "AttentionSpec",
    "BlockSpec",
    "HeadSpec",
    "LatentSpec",
    "MLPSpec",
    "MambaSpec",
    "MoESpec",
    "ModelSpec",
    "NormSpec",
    "StackSpec",
]

Architecture = Literal["causal-decoder", "prefix-decoder", "encoder-decoder", "encoder"]
Mask = Literal["causal", "chunked", "prefix", "bidirectional", "cross"]


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation over the hidden axis.

    ``affine`` False means no weights at all (OLMo 1, Galactica); ``bias`` only exists for LayerNorm.
    """

    kind: Literal["layernorm", "rmsnorm"]
    affine: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): low-rank queries, keys and values.

    ``q_lora_rank`` None means that queries are projected directly.
    """

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention sub-layer. ``head_dim`` is independent of hidden_size / num_attention_heads.

    ``mask`` chunked: causal inside chunks of ``sliding_window`` tokens that do not see each other (Llama 4).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mask: Mask = "causal"
    position: Literal["none", "rope", "alibi", "relative", "transformer-xl"] = "none"
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    #: True: one QK-norm weight per head dimension, shared by the heads (Qwen3); False: over all heads (OLMo 2).
    qk_norm_per_head: bool = True
    sinks: bool = False
    #: Rows of a relative-bias table that this layer alone holds (UMT5); 0: none, or one that the stack shares.
    relative_attention_num_buckets: int = 0
    latent: LatentSpec | None = None

    @property
    def kind(self) -> Literal["MHA", "MQA", "GQA", "MLA"]:
        """The usual name of the head layout."""
        if self.latent is not None:
            return "MLA"
        if self.num_key_value_heads == self.num_attention_heads:
            return "MHA"
        return "MQA" if self.num_key_value_heads == 1 else "GQA"


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """A feed-forward layer: two matrices, or three when ``gated`` (GLU, arXiv:2002.05202)."""

    intermediate_size: int
    activation: str
    gated: bool = False
    bias: bool = False
    #: Gate and linear part are limited to a range before they are multiplied (gpt-oss).
    clamped: bool = False


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A mixture of experts: a router picks ``num_experts_per_tok`` of ``num_experts`` for each token."""

    num_experts: int
    num_experts_per_tok: int
    expert: MLPSpec
    #: Experts that every token takes, as one MLP of their joint width.
    shared: MLPSpec | None = None
    #: A learned scalar gate in front of the shared expert (Qwen1.5-MoE, Qwen2-MoE).
    shared_gate: bool = False
    router_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MambaSpec:
    """A selective state-space mixer (Mamba, arXiv:2312.00752)."""

    inner_size: int
    state_size: int
    conv_kernel: int
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False
    #: Norms on dt, B and C inside the mixer (Jamba, arXiv:2403.19887).
    inner_norm: NormSpec | None = None


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One layer of a stack.

    ``norm_placement``: ``pre`` (before each sub-layer), ``post`` (after the residual sum), ``sandwich`` (before and
    after each sub-layer, Gemma 2), ``output`` (on the sub-layer's output only, OLMo 2).
    ``parallel``: attention and MLP read the same residual and are summed (GPT-J, arXiv:2204.02311 section 2);
    ``shared_norm`` then says whether they also share one norm.
    """

    mixer: AttentionSpec | MambaSpec
    mlp: MLPSpec | MoESpec | None
    norm: NormSpec
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    #: Factor on the residual stream before a branch is added to it (DeepNorm's alpha, arXiv:2203.00555, section 3).
    residual_scale: float = 1.0
    cross_attention: AttentionSpec | None = None
    parallel: bool = False
    shared_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """A stack of layers with what stands before and after it.

    Attributes
    ----------
    layers : tuple of BlockSpec
        In order; equal layers are one object or equal objects.
    positions : int
        Rows of the learned position table (0: none), offsets included.
    sinusoidal : bool
        Positions are added from a table that is computed, not trained (arXiv:1706.03762, section 3.5).
    type_vocab_size : int
        Rows of the token-type table (BERT); 0: none.
    embedding_norm, final_norm : NormSpec or None
    relative_attention_num_buckets : int
        Rows of the one relative-bias table that the layers share (T5: held by the first layer); 0: none.
    """

    layers: tuple[BlockSpec, ...]
    positions: int = 0
    sinusoidal: bool = False
    type_vocab_size: int = 0
    embedding_norm: NormSpec | None = None
    final_norm: NormSpec | None = None
    relative_attention_num_buckets: int = 0


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The output layer over the vocabulary.

    ``transform``: a dense layer with bias, an activation and a norm before it (BERT's masked-LM head).
    """

    tied: bool
    bias: bool = False
    transform: NormSpec | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole model.

    Attributes
    ----------
    vocab_size : int
        Tokens of the vocabulary.
    vocab_multiple : int
        Rows of the token table and the head are padded up to a multiple of this; Megatron-LM takes its
        ``--make-vocab-size-divisible-by`` times the tensor-parallel degree.
    multi_token_prediction : tuple of BlockSpec
        The layer of each multi-token-prediction module (DeepSeek-V3, arXiv:2412.19437, section 2.2). A module has its
        layer, two norms and a projection of its own before it and a norm after it; token table and head are the
        model's.
    embedding_size : int
        Width of the token table when it is not ``hidden_size`` (OPT-350m: 512, with projections in and out).
    hidden_dropout, attention_dropout : float
        Dropout probabilities during training; 0 means that the operator does not exist.
    notes : tuple of str
        What the importer assumed because the config does not say it.
    """

    name: str
    family: str
    model_type: str
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    decoder: StackSpec
    encoder: StackSpec | None = None
    head: HeadSpec = field(default_factory=lambda: HeadSpec(tied=False))
    vocab_multiple: int = 1
    multi_token_prediction: tuple[BlockSpec, ...] = ()
    embedding_size: int | None = None
    context_length: int | None = None
    tokenizer: str = "unknown"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stacks together."""
        return len(self.decoder.layers) + (len(self.encoder.layers) if self.encoder else 0)

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The distinct attentions of all layers, those over the encoder's result included."""
        blocks = dict.fromkeys((*self.decoder.layers, *(self.encoder.layers if self.encoder else ())))
        parts = (part for block in blocks for part in (block.mixer, block.cross_attention))
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, AttentionSpec)))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
