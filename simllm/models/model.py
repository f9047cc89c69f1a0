"""`Model`: a spec with its graph and its counts, the object people hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError
from simllm.models.build import build_graph
from simllm.models.components import components
from simllm.models.counts import (
    FlopCounts,
    ParameterCounts,
    count_flops,
    count_parameters,
    count_trainable,
    kv_cache_bytes_per_token,
)
from simllm.models.graph import Layout, ModelGraph
from simllm.models.spec import ModelSpec

if TYPE_CHECKING:
    from simllm.models.finetuning import Method

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """A model: its spec, its graph, and what can be counted without a cluster.

    Attributes
    ----------
    spec : ModelSpec
    config : mapping or None
        The Hugging Face config that the spec was read from; None where there was none.
    method : Method or None
        How it is fine-tuned; None: all of it is trained.

    Examples
    --------
    >>> model = Model.load("llama-3-70b")
    >>> model.parameters.total
    70553706496
    >>> model.kv_cache_bytes_per_token()
    327680.0
    """

    spec: ModelSpec
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    method: Method | None = None

    @classmethod
    def load(cls, name_or_path: str | Path, *, mtp: bool = False, vocab_multiple: int = 1) -> Model:
        """A model of the catalog by name, or a Hugging Face ``config.json`` or a folder holding one.

        Parameters
        ----------
        name_or_path : str or Path
        mtp : bool
            Include the multi-token-prediction modules that the config states (DeepSeek-V3, arXiv:2412.19437, section
            2.2); transformers' classes leave them out.
        vocab_multiple : int
            Pad the vocabulary up to a multiple of this, as Megatron-LM does (128 times the tensor-parallel degree).

        Raises
        ------
        InputError
            The name is unknown, or the config cannot be used.
        """
        from simllm.models.catalog import load_config, load_model

        spec = load_model(name_or_path, mtp=mtp, vocab_multiple=vocab_multiple)
        return cls(spec, load_config(name_or_path))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], name: str = "model", *, mtp: bool = False, vocab_multiple: int = 1
    ) -> Model:
        """A model from the contents of a Hugging Face ``config.json``; the options are those of `load`."""
        from simllm.models.config import spec_from_config

        return cls(spec_from_config(config, name, mtp=mtp, vocab_multiple=vocab_multiple), config)

    @property
    def name(self) -> str:
        """The name it was loaded under."""
        return self.spec.name

    @cached_property
    def graph(self) -> ModelGraph:
        """The one graph everything is folded from."""
        graph = build_graph(self.spec)
        if self.method is None:
            return graph
        from simllm.models.finetuning import finetuned_graph

        return finetuned_graph(graph, self.spec, self.method)

    def finetuned(self, method: Method | str, **options: Any) -> Model:
        """The same model under a fine-tuning method: its graph transformed, everything else follows.

        Parameters
        ----------
        method : Method or str
            A method, or the name of one with its options: full, freeze, bitfit, prompt, p-tuning, p-tuning-v2, prefix,
            houlsby, pfeiffer, llama-adapter, lora, lora+, dora, adalora, vera, ia3, qlora, galore.

        Raises
        ------
        InputError
            The method, its options or its targets do not go with this model.

        Examples
        --------
        >>> Model.load("llama-7b").finetuned("lora", rank=8, targets=("q_proj", "v_proj")).trainable_parameters
        4194304
        """
        from simllm.models.finetuning import method_named

        if self.method is not None:
            raise InputError(f"{self.name} is fine-tuned with {self.method.name} already; start from the model itself")
        tuned = replace(self, method=method_named(method, **options) if isinstance(method, str) else method)
        _ = tuned.graph  # a method that does not go with the model is refused here, not at the first question
        return tuned

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Exact parameter counts."""
        return count_parameters(self.graph)

    @cached_property
    def trainable_parameters(self) -> int:
        """Parameters that have a gradient."""
        return count_trainable(self.graph)

    def flops(self, seq_len: int, batch: int = 1) -> FlopCounts:
        """FLOPs of ``batch`` sequences of ``seq_len`` tokens; a prefix decoder's prefix is half of them."""
        length = seq_len + self.graph.virtual_tokens
        return count_flops(self.graph, Layout(batch=batch, seq_len=length, prefix_len=self.prefix_len(seq_len)))

    def prefix_len(self, seq_len: int) -> int:
        """Tokens of the bidirectional prefix in a sequence: half for prefix decoders, else none.

        Nothing in a config says how long prefixes are; half of the sequence is the mean of a uniformly drawn one.
        """
        return seq_len // 2 if self.spec.architecture == "prefix-decoder" else 0

    def kv_cache_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes of key-value cache per token of context (2 bytes an element: bf16)."""
        return kv_cache_bytes_per_token(self.graph, bytes_per_element)

    def cross_kv_cache_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes that cross-attention keeps per token of the encoder's sequence; 0 without an encoder."""
        return kv_cache_bytes_per_token(self.graph, bytes_per_element, cross=True)

    @cached_property
    def components(self) -> dict[str, str]:
        """The components in words: tokenizer, position, norm, activation, attention, bias, parallel block, ..."""
        return components(self.spec)
