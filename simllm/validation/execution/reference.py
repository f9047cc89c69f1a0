"""The reference transformer: stem, blocks and head in plain PyTorch, built from the same spec as the graph.

A `Transformer` holds the whole model or the part of one pipeline stage; parameters have the same names in both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from simllm.errors import UnsupportedError
from simllm.models.spec import AttentionSpec, BlockSpec, ModelSpec, MoESpec, StackSpec
from simllm.validation.execution.layers import MLP, Attention, LatentAttention, MixtureOfExperts, Norm, Place, Tables

__all__ = ["Block", "Head", "Stem", "Transformer", "check_spec"]

#: What surrounds the forward pass of a part: given the part, a context in which it is observed.
Observer = Callable[[nn.Module, tuple[Any, ...]], AbstractContextManager[None]]


def check_spec(spec: ModelSpec) -> None:
    """Refuse by name what the reference model does not have.

    Raises
    ------
    UnsupportedError
    """
    stacks = [spec.decoder, *([spec.encoder] if spec.encoder else [])]
    refused = {
        "state-space mixers": any(not isinstance(b.mixer, AttentionSpec) for s in stacks for b in s.layers),
        "multi-token prediction": bool(spec.multi_token_prediction),
        "an embedding narrower than the model": spec.embedding_size is not None,
        "token types": any(s.type_vocab_size for s in stacks),
        "sinusoidal positions": any(s.sinusoidal for s in stacks),
        "a transformed head": spec.head.transform is not None,
        "a prefix mask": spec.architecture == "prefix-decoder",
        "layers without a feed-forward part": any(b.mlp is None for s in stacks for b in s.layers),
    }
    for what, there in refused.items():
        if there:
            raise UnsupportedError(f"{spec.name} has {what}, which the reference model in PyTorch does not execute")


class _Observed(nn.Module):
    """A part whose forward pass can be observed from inside of what wraps it."""

    observe: Observer | None = None

    def _watch(self, *inputs: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.observe is None else self.observe(self, inputs)


class Stem(_Observed):
    """Token and position embeddings, and the relative bias that all layers of a stack share."""

    def __init__(self, spec: ModelSpec, stack: StackSpec, place: Place, token: nn.Embedding | None = None) -> None:
        super().__init__()
        self.place, self.stack = place, stack
        self.token = _table(spec.padded_vocab_size, spec.hidden_size) if token is None else token
        self.position = _table(stack.positions, spec.hidden_size) if stack.positions else None
        self.norm = Norm(stack.embedding_norm, spec.hidden_size) if stack.embedding_norm else None
        mixer = stack.layers[0].mixer
        assert isinstance(mixer, AttentionSpec)
        self.causal = mixer.mask != "bidirectional"
        buckets = stack.relative_attention_num_buckets
        self.relative = _table(buckets, mixer.num_attention_heads) if buckets else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._watch(ids):
            x = self.token(ids)
            if self.position is not None:
                x = x + _plain(self.position(self._places(ids)))
            if self.norm is not None:
                x = _plain(self.norm(x))
            return x, self._bias(ids)

    def _places(self, ids: Tensor) -> Tensor:
        """Positions of this rank's tokens."""
        tokens, place = ids.shape[1], self.place
        if not place.sequence_parallel:
            return torch.arange(tokens, device=ids.device)[None]
        own = tokens // place.tp
        return torch.arange(place.tp_rank * own, (place.tp_rank + 1) * own, device=ids.device)[None]

    def _bias(self, ids: Tensor) -> Tensor | None:
        """T5's bias by distance; buckets are the distances themselves, cut off, which costs and keeps the same."""
        if self.relative is None:
            return None
        places = torch.arange(ids.shape[1], device=ids.device)
        distance = places[:, None] - places[None, :]
        distance = distance if self.causal else distance.abs()
        bias = self.relative(distance.clamp(0, self.relative.num_embeddings - 1))
        return _plain(bias).permute(2, 0, 1)


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def _plain(x: Tensor) -> Tensor:
    """The stream between the parts is a plain tensor: this rank's tokens, or all of them."""
    return x.to_local() if isinstance(x, DTensor) else x


class Block(_Observed):
    """One layer around the residual stream; recomputed as a whole where ``again``."""

    def __init__(self, spec: BlockSpec, hidden: int, place: Place, tables: Tables) -> None:
        super().__init__()
        self.spec, self.place, self.again = spec, place, False
        mixer = spec.mixer
        assert isinstance(mixer, AttentionSpec)
        self.mixer: nn.Module
        if mixer.latent is not None:
            self.mixer = LatentAttention(mixer, mixer.latent, hidden, place, tables)
        else:
            self.mixer = Attention(mixer, hidden, place, tables)
        self.cross = Attention(spec.cross_attention, hidden, place, tables) if spec.cross_attention else None
        mlp = spec.mlp
        self.mlp: nn.Module
        if isinstance(mlp, MoESpec):
            self.mlp = MixtureOfExperts(mlp, hidden, place)
        else:
            assert mlp is not None
            self.mlp = MLP(mlp, hidden)
        names = ["mixer", *(["cross"] if self.cross else []), *([] if spec.parallel and spec.shared_norm else ["mlp"])]
        self.norms = nn.ModuleDict({name: Norm(spec.norm, hidden) for name in names})
        after = names if spec.norm_placement == "sandwich" else []
        self.post_norms = nn.ModuleDict({name: Norm(spec.norm, hidden) for name in after})

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with self._watch(x, memory, bias):
            if self.again:
                result: Tensor = checkpoint(self._forward, x, memory, bias, use_reentrant=False)
                return result
            return self._forward(x, memory, bias)

    def _forward(self, x: Tensor, memory: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.spec.parallel:
            h = self.norms["mixer"](x)
            g = h if self.spec.shared_norm else self.norms["mlp"](x)
            branches = self.mixer(h, bias=bias) + self.mlp(g)
            if isinstance(branches, DTensor):
                # Both branches leave partial sums: one reduction for their sum.
                branches = branches.redistribute(placements=self.stream_placements).to_local()
            return self._add(x, branches)
        x = self._sublayer("mixer", x, lambda h: self.mixer(h, bias=bias))
        if self.cross is not None:
            cross = self.cross
            x = self._sublayer("cross", x, lambda h: cross(h, memory))
        return self._sublayer("mlp", x, self.mlp)

    @property
    def stream_placements(self) -> list[Any]:
        """How the residual stream lies over the tensor-parallel ranks."""
        from torch.distributed.tensor import Replicate, Shard

        return [Shard(1) if self.place.sequence_parallel else Replicate()]

    def _sublayer(self, name: str, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        placement = self.spec.norm_placement
        h = sublayer(self.norms[name](x) if placement in ("pre", "sandwich") else x)
        if placement == "sandwich":
            h = self.post_norms[name](h)
        elif placement == "output":
            h = self.norms[name](h)
        x = self._add(x, _plain(h))
        return _plain(self.norms[name](x)) if placement == "post" else x

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x if self.spec.residual_scale == 1.0 else x * self.spec.residual_scale) + branch


class Head(_Observed):
    """Final norm, product with the vocabulary, and the mean cross-entropy in float32."""

    def __init__(self, spec: ModelSpec, token: Tensor | None) -> None:
        super().__init__()
        norm = spec.decoder.final_norm
        self.norm = Norm(norm, spec.hidden_size) if norm else nn.Identity()
        self.lm_head = nn.Linear(spec.hidden_size, spec.padded_vocab_size, bias=spec.head.bias)
        if token is not None:
            self.lm_head.weight = token

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with self._watch(x, labels):
            logits = self.lm_head(self.norm(x)).float()
            loss: Tensor = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return loss  # no view of it: a pipeline could not cut it off from the graph of its forward pass


class Transformer(nn.Module):
    """A model, or the layers ``first`` to ``last`` of it with the stem and the head where they belong.

    Parameters
    ----------
    spec : ModelSpec
        Dropout is left out, so that a parallel run has the same result as a single process.
    chunks : tuple of (int, int), optional
        First layer and the one after the last; None: the whole model.

    Notes
    -----
    ``forward(ids, labels)`` of a whole model is the loss. A stage takes and gives the residual stream.
    """

    def __init__(self, spec: ModelSpec, span: tuple[int, int] | None = None) -> None:
        super().__init__()
        check_spec(spec)
        self.spec, self.place, tables = spec, Place(), Tables()
        blocks = spec.decoder.layers
        first, last = span or (0, len(blocks))
        self.stem: Stem | None = None
        self.encoder: Encoder | None = None
        if first == 0:
            self.encoder = Encoder(spec, spec.encoder, self.place, tables) if spec.encoder else None
            token = self.encoder.stem.token if self.encoder else None
            self.stem = Stem(spec, spec.decoder, self.place, token)
        self.layers = nn.ModuleDict(
            {str(i): Block(blocks[i], spec.hidden_size, self.place, tables) for i in range(first, last)}
        )
        self.head: Head | None = None
        if last == len(blocks):
            # A stage that has no token table holds its own copy of a tied one.
            tied = self.stem.token.weight if spec.head.tied and self.stem else None
            self.head = Head(spec, tied)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        memory = bias = None
        if self.encoder is not None:
            memory = self.encoder(x)
            assert labels is not None
            x = labels  # the decoder predicts every token of its own sequence
        if self.stem is not None:
            x, bias = self.stem(x)
        for layer in self.layers.values():
            x = layer(x, memory, bias)
        return x if self.head is None else self.head(x, labels)


class Encoder(_Observed):
    """The encoder of an encoder-decoder: stem, layers, final norm."""

    def __init__(self, spec: ModelSpec, stack: StackSpec, place: Place, tables: Tables) -> None:
        super().__init__()
        self.stem = Stem(spec, stack, place)
        self.layers = nn.ModuleDict(
            {str(i): Block(block, spec.hidden_size, place, tables) for i, block in enumerate(stack.layers)}
        )
        self.norm = Norm(stack.final_norm, spec.hidden_size) if stack.final_norm else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = self.stem(ids)
        for layer in self.layers.values():
            x = layer(x, None, bias)
        return _plain(self.norm(x))
