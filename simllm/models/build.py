"""From a spec to the one graph: embedding, one graph per distinct layer, multi-token prediction, head."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from simllm.models.builder import Builder
from simllm.models.graph import Axis, AxisName, Graph, ModelGraph, Tensor, Weight
from simllm.models.operators import Activation, Concat, Dropout, Embedding, Loss
from simllm.models.spec import AttentionSpec, BlockSpec, MambaSpec, ModelSpec, NormSpec, StackSpec
from simllm.models.sublayers import attention, feed_forward, mamba

__all__ = ["build_graph"]


@lru_cache(maxsize=512)
def build_graph(spec: ModelSpec) -> ModelGraph:
    """The graph of a model.

    Parameters
    ----------
    spec : ModelSpec

    Returns
    -------
    ModelGraph
        Cached: the same spec gives the same object.
    """
    layers: list[Graph] = []
    bridges: list[tuple[int, Graph]] = []
    if spec.encoder is not None:
        memory = Tensor("memory", (Axis("source_tokens"), Axis("hidden", spec.hidden_size)))
        stem = _embedding(Builder(spec, "source_tokens"), spec.encoder, "embedding", shared=False)
        layers += _layers(spec, spec.encoder.layers, "source_tokens", "encoder layer", None)
        bridges.append((len(layers), _bridge(spec, spec.encoder, memory)))
        layers += _layers(spec, spec.decoder.layers, "tokens", "decoder layer", memory)
    else:
        stem = _embedding(Builder(spec), spec.decoder, "embedding", shared=False)
        # One call for both: a module of multi-token prediction has the same layer as the model.
        layers += _layers(spec, spec.decoder.layers + spec.multi_token_prediction, "tokens", "layer", None)
    number = spec.num_hidden_layers
    return ModelGraph(
        stem=stem,
        layers=tuple(layers[:number]),
        head=_head(spec),
        bridges=tuple(bridges),
        last_layers=tuple(layers[number:]),
        last_extras=_multi_token_prediction(spec),
    )


# -- layers ----------------------------------------------------------------------------------------------------


def _layers(
    spec: ModelSpec, blocks: tuple[BlockSpec, ...], tokens: AxisName, name: str, source: Tensor | None
) -> list[Graph]:
    distinct: dict[BlockSpec, Graph] = {}
    for block in blocks:
        if block not in distinct:
            builder = Builder(spec, tokens)
            end = _block(builder, block, source)
            label = name if not distinct else f"{name} (kind {len(distinct) + 1})"
            borrowed = (source,) if source else ()
            distinct[block] = builder.graph(label, builder.stream("x"), end, borrows=borrowed)
    return [distinct[block] for block in blocks]


def _block(b: Builder, spec: BlockSpec, source: Tensor | None) -> Tensor:
    """The sub-layers of one layer around the residual stream."""
    x = b.stream("x")
    if spec.parallel:
        return _parallel_block(b, spec, x)
    sublayers: list[tuple[str, Callable[[Tensor], Tensor]]] = [("mixer", lambda h: _mixer(b, spec.mixer, h))]
    if spec.cross_attention is not None:
        cross = spec.cross_attention
        sublayers.append(("cross", lambda h: attention(b, cross, h, "cross_", source)))
    if spec.mlp is not None:
        mlp = spec.mlp
        sublayers.append(("mlp", lambda h: feed_forward(b, mlp, h)))
    placement = spec.norm_placement
    for name, sublayer in sublayers:
        h = b.norm(spec.norm, x, f"{name}_norm") if placement in ("pre", "sandwich") else x
        h = sublayer(h)
        if placement in ("sandwich", "output"):
            h = b.norm(spec.norm, h, f"{name}_post_norm")
        x = b.residual(x, (h,), f"{name}_residual", spec.residual_scale)
        if placement == "post":
            x = b.norm(spec.norm, x, f"{name}_norm")
    return x


def _mixer(b: Builder, mixer: AttentionSpec | MambaSpec, x: Tensor) -> Tensor:
    return mamba(b, mixer, x) if isinstance(mixer, MambaSpec) else attention(b, mixer, x)


def _parallel_block(b: Builder, spec: BlockSpec, x: Tensor) -> Tensor:
    h = b.norm(spec.norm, x, "mixer_norm")
    g = h if spec.shared_norm else b.norm(spec.norm, x, "mlp_norm")
    branches: tuple[Tensor, ...] = (_mixer(b, spec.mixer, h),)
    if spec.mlp is not None:
        branches += (feed_forward(b, spec.mlp, g),)
    return b.residual(x, branches, "residual", spec.residual_scale)


# -- embedding ---------------------------------------------------------------------------------------------------


def _bridge(spec: ModelSpec, encoder: StackSpec, memory: Tensor) -> Graph:
    """Between the stacks of an encoder-decoder: the encoder's last norm, then the decoder's embedding."""
    builder = Builder(spec, "source_tokens")
    if encoder.final_norm is not None:
        builder.norm(encoder.final_norm, builder.stream("encoder_x"), "encoder_norm")
    builder.set_tokens("tokens")
    return _embedding(builder, spec.decoder, "decoder embedding", shared=True, lends=(memory,))


def _embedding(b: Builder, stack: StackSpec, name: str, shared: bool, lends: tuple[Tensor, ...] = ()) -> Graph:
    """Token, position and type embeddings; ``shared``: the token table belongs to another stack."""
    spec = b.spec
    width = Axis("hidden", spec.embedding_size or spec.hidden_size)
    ids = Tensor("ids", (b.tokens,), "index")
    tables = [Weight("token.weight", (Axis("vocab", spec.padded_vocab_size), width), "embedding", tied=shared)]
    if stack.positions:
        tables.append(Weight("position.weight", (Axis("fixed", stack.positions), b.hidden), "embedding"))
    if stack.type_vocab_size:
        tables.append(Weight("type.weight", (Axis("fixed", stack.type_vocab_size), b.hidden), "embedding"))
    out = Tensor("embedding", (b.tokens, width))
    x = b.add(Embedding, "embedding", "embedding", (ids,), (out,), tuple(tables), computed=int(stack.sinusoidal))
    if spec.embedding_size:
        (x,) = b.project("project_in", x, {"project_in": ("projected", b.hidden)}, "projection", False)
    if stack.embedding_norm is not None:
        x = b.norm(stack.embedding_norm, x, "embedding_norm")
    if spec.hidden_dropout > 0:
        x = b.add(Dropout, "embedding_dropout", "embedding", (x,), (b.stream("embedding_out"),))
    if stack.relative_attention_num_buckets:
        _relative_bias(b, stack)
    return b.graph(name, ids, x, lends)


def _relative_bias(b: Builder, stack: StackSpec) -> None:
    """The bias of every head, query and key, looked up once per micro-batch (arXiv:1910.10683, section 2.1)."""
    mixer = stack.layers[0].mixer
    assert isinstance(mixer, AttentionSpec)
    heads = Axis("heads", mixer.num_attention_heads)
    buckets = Axis("fixed", stack.relative_attention_num_buckets)
    out = Tensor("relative_bias", (heads, Axis(b.keys), Axis(b.keys)))
    table = Weight("relative_bias.weight", (buckets, heads), "relative_bias")
    b.add(Embedding, "relative_bias", "relative_bias", (), (out,), (table,))


# -- head --------------------------------------------------------------------------------------------------------


def _head(spec: ModelSpec) -> Graph:
    """From the last layer to the loss."""
    b = Builder(spec)
    x = start = b.stream("x")
    if spec.decoder.final_norm is not None:
        x = b.norm(spec.decoder.final_norm, x, "final_norm")
    if spec.head.transform is not None:
        component = "head_transform"
        (x,) = b.project("transform", x, {"transform": ("transformed", b.hidden)}, component, True)
        x = b.add(Activation, "transform_act", component, (x,), (b.stream("transform_act"),))
        x = b.norm(spec.head.transform, x, "transform_norm", component)
    if spec.embedding_size:
        width = Axis("hidden", spec.embedding_size)
        (x,) = b.project("project_out", x, {"project_out": ("projected_out", width)}, "projection", False)
    return b.graph("head", start, _loss(b, x, spec.head.tied))


def _loss(b: Builder, x: Tensor, tied: bool, beside: bool = False) -> Tensor:
    spec = b.spec
    vocab = {"lm_head": ("logits", Axis("vocab", spec.padded_vocab_size))}
    logits = b.project("lm_head", x, vocab, "head", spec.head.bias, tied=tied, beside=beside, dtype="logits")
    return b.add(Loss, "loss", "loss", logits, (Tensor("loss", (Axis("fixed"),), "float32"),))


# -- multi-token prediction --------------------------------------------------------------------------------------

_MTP = "multi_token_prediction"


def _multi_token_prediction(spec: ModelSpec) -> tuple[Graph, ...]:
    """Before and after the layer of each module (DeepSeek-V3, arXiv:2412.19437, equations 21 to 23)."""
    graphs: list[Graph] = []
    norm = spec.decoder.final_norm
    for index, _ in enumerate(spec.multi_token_prediction):
        assert norm is not None
        # On the last pipeline rank the modules share one copy of the token table, with a tied head if there is one.
        graphs.append(_mtp_stem(spec, norm, beside=index > 0 or spec.head.tied))
        b = Builder(spec)
        start = b.stream("x")
        x = b.norm(norm, start, "final_norm", _MTP)
        graphs.append(b.graph("multi-token prediction head", start, _loss(b, x, tied=True, beside=True)))
    return tuple(graphs)


def _mtp_stem(spec: ModelSpec, norm: NormSpec, beside: bool) -> Graph:
    b = Builder(spec)
    x, ids = b.stream("x"), Tensor("next_ids", (b.tokens,), "index")
    table = (Axis("vocab", spec.padded_vocab_size), b.hidden)
    token = Weight("token.weight", table, "embedding", tied=True, beside=beside)
    embedding = b.add(Embedding, "embedding", "embedding", (ids,), (b.stream("next_embedding"),), (token,))
    hidden = b.norm(norm, x, "hidden_norm", _MTP)
    embedded = b.norm(norm, embedding, "embedding_norm", _MTP)
    both = Tensor("next_input", (b.tokens, Axis("hidden", 2 * spec.hidden_size)))
    joined = b.add(Concat, "concat", _MTP, (hidden, embedded), (both,))
    (out,) = b.project("projection", joined, {"projection": ("projected", b.hidden)}, _MTP, False)
    return b.graph("multi-token prediction stem", x, out)
