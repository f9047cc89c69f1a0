"""Models as tables and as plain data: the catalog, the counts of one model, several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.models import Model
from simllm.models.activations import Recompute, saved_bytes, saved_bytes_by_operator
from simllm.models.components import layer_words
from simllm.models.conventions import FLOP_CONVENTIONS, training_flops
from simllm.models.graph import Graph, Implementation, Layout
from simllm.report.text import facts, heading, notes, table
from simllm.units import format_bytes, format_count, format_si

__all__ = [
    "catalog_rows",
    "catalog_table",
    "comparison",
    "component_words",
    "format_flops",
    "model_dict",
    "model_report",
]

#: Models that stand side by side in 100 columns; more go below.
_ABREAST = 4

_COMPONENTS = {
    "embedding": "embedding tables",
    "relative_bias": "relative-bias tables",
    "attention": "attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "router": "routers",
    "experts": "experts",
    "shared_experts": "shared experts",
    "mamba": "state-space mixers",
    "norm": "norms",
    "projection": "embedding projections",
    "head_transform": "head transform",
    "head": "output head",
    "attention_scores": "attention scores (masked)",
    "multi_token_prediction": "MTP norms and projection",
}

#: How attention can be carried out; the other operators are fused, in bf16.
_ATTENTION = {"flash": Implementation(attention="flash"), "unfused": Implementation(attention="unfused")}
_POLICIES = ("none", "selective", "full")


def catalog_rows(models: Sequence[Model]) -> list[dict[str, Any]]:
    """The catalog as plain data."""
    return [
        {
            "name": model.name,
            "family": model.spec.family,
            "parameters": model.parameters.total,
            "active_parameters": model.parameters.active,
            "architecture": model.spec.architecture,
            "context_length": model.spec.context_length,
        }
        for model in models
    ]


def catalog_table(models: Sequence[Model]) -> list[RenderableType]:
    """The catalog as a table."""
    rows = []
    for row in catalog_rows(models):
        active = row["active_parameters"]
        rows.append(
            (
                row["name"],
                row["family"],
                row["architecture"],
                format_count(row["parameters"]),
                format_count(active) if active != row["parameters"] else "",
                str(row["context_length"] or ""),
            )
        )
    columns = ("name", "family", "architecture", "parameters", "active", "context")
    return [table(columns, rows, left=columns[:3]), Text(f"{len(rows)} models")]


def model_dict(model: Model, seq_len: int) -> dict[str, Any]:
    """The counts of one model as plain data: bytes, FLOPs and parameters, not rounded."""
    spec, parameters, flops = model.spec, model.parameters, model.flops(seq_len)
    per_token = model.kv_cache_bytes_per_token()
    return {
        "name": model.name,
        "family": spec.family,
        "architecture": spec.architecture,
        "num_hidden_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "padded_vocab_size": spec.padded_vocab_size,
        "context_length": spec.context_length,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "embedding": parameters.embedding,
            "lm_head": parameters.lm_head,
            "non_embedding": parameters.non_embedding,
            "multi_token_prediction": parameters.multi_token_prediction,
            "by_component": dict(parameters.by_component),
        },
        "seq_len": seq_len,
        "flops": {
            "forward_full_attention": flops.forward_full_attention,
            "forward_masked": flops.forward_masked,
            "training_full_attention": flops.training_full_attention,
            "training_masked": flops.training_masked,
            "by_component": dict(flops.by_component),
            "conventions": {name: training_flops(model, seq_len, name) for name in FLOP_CONVENTIONS},
        },
        "kv_cache": {"bytes_per_token": per_token, "bytes_per_sequence": per_token * seq_len},
        "activations": _activations(model, seq_len),
        "components": dict(model.components),
        "notes": [*spec.notes, *_length_note(model, seq_len)],
    }


def _activations(model: Model, seq_len: int) -> dict[str, Any]:
    """What a layer keeps for its backward pass, by layer kind, recomputation and attention, in bytes a token (bf16)."""
    layout = Layout(seq_len=seq_len, prefix_len=model.prefix_len(seq_len))
    kinds = [{"layer": words, "layers": times, **_kept(graph, layout)} for words, times, graph in _layer_kinds(model)]
    return {
        "layers": kinds,
        "bytes_per_token": {
            attention: {
                policy: sum(kind["layers"] * kind["bytes_per_token"][attention][policy] for kind in kinds)
                for policy in _POLICIES
            }
            for attention in _ATTENTION
        },
    }


def _kept(graph: Graph, layout: Layout) -> dict[str, Any]:
    tokens = layout.seq_len
    return {
        "bytes_per_token": {
            attention: {
                policy: saved_bytes(graph, layout, impl, Recompute.parse(policy)) / tokens for policy in _POLICIES
            }
            for attention, impl in _ATTENTION.items()
        },
        "by_operator": {
            attention: {name: size / tokens for name, size in saved_bytes_by_operator(graph, layout, impl).items()}
            for attention, impl in _ATTENTION.items()
        },
    }


def _layer_kinds(model: Model) -> list[tuple[str, int, Graph]]:
    """Every distinct layer: what is in it, how often it occurs, and its graph."""
    spec, graph = model.spec, model.graph
    encoder = spec.encoder.layers if spec.encoder else ()
    blocks = (*encoder, *spec.decoder.layers, *spec.multi_token_prediction)
    words = {
        id(layer): layer_words(block) for block, layer in zip(blocks, (*graph.layers, *graph.last_layers), strict=True)
    }
    return [(words[id(layer)], times, layer) for layer, times in graph.layer_parts]


def _length_note(model: Model, seq_len: int) -> list[str]:
    limit = model.spec.context_length
    if limit is None or seq_len <= limit:
        return []
    return [f"{seq_len} tokens are more than the context length of {limit} that the model was made for"]


def model_report(
    model: Model, seq_len: int, activations: bool = False, conventions: bool = False
) -> list[RenderableType]:
    """The counts of one model to read.

    Parameters
    ----------
    model : Model
    seq_len : int
        Length of the sequence that is counted.
    activations : bool
        Also what every operator of a layer keeps.
    conventions : bool
        Also the FLOPs of training in every named convention.
    """
    data = model_dict(model, seq_len)
    parameters, flops, cache = data["parameters"], data["flops"], data["kv_cache"]
    head = f"{data['family']}, {data['architecture']}, {data['num_hidden_layers']} layers"
    head += f", hidden size {data['hidden_size']}, vocabulary {data['vocab_size']}"
    if data["context_length"]:
        head += f", context {data['context_length']}"
    total = parameters["total"]
    rows = [(component_words(name), f"{n:,}", f"{n / total:.2%}") for name, n in parameters["by_component"].items()]
    rows.append(("total", f"{total:,}", "100%"))
    last = len(rows) - 1
    for name, key in (
        ("active per token", "active"),
        ("without tables and head", "non_embedding"),
        ("in multi-token prediction", "multi_token_prediction"),
    ):
        if parameters[key]:
            rows.append((name, f"{parameters[key]:,}", f"{parameters[key] / total:.2%}"))
    work = [
        ("forward", format_flops(flops["forward_masked"]), format_flops(flops["forward_full_attention"])),
        (
            "forward and backward",
            format_flops(flops["training_masked"]),
            format_flops(flops["training_full_attention"]),
        ),
        (
            "forward and backward, a token",
            format_flops(flops["training_masked"] / seq_len),
            format_flops(flops["training_full_attention"] / seq_len),
        ),
    ]
    title = f"FLOPs of a sequence of {seq_len} tokens"
    cached = f"{format_bytes(cache['bytes_per_token'])} a token, {format_bytes(cache['bytes_per_sequence'])} for "
    cached += f"{seq_len} tokens"
    parts: list[RenderableType] = [
        heading(model.name, head),
        Text(),
        table(("parameters", "count", "share"), rows, left=("parameters",), bold=last),
        Text(),
        table((title, "attended pairs only", "full attention"), work, left=(title,)),
        *(_convention_table(data) if conventions else ()),
        Text(),
        _kept_table(data["activations"]),
        *(_operator_tables(data["activations"]) if activations else ()),
        Text(),
        facts(
            {"key-value cache (bf16)": cached}
            | {name.replace("_", " "): text for name, text in data["components"].items()}
        ),
    ]
    return parts + notes("Notes", data["notes"])


def _kept_table(activations: dict[str, Any]) -> Table:
    """What a layer keeps, a row a kind of layer."""
    title = "kept for the backward pass (bf16), a token"
    rows = [(f"{kind['layers']} x {kind['layer']}", *_kept_cells(kind)) for kind in activations["layers"]]
    rows.append(("all layers", *_kept_cells(activations)))
    columns = (title, "flash attention", "unfused", "selective", "full recompute")
    return table(columns, rows, left=(title,), wrap=(title,), bold=len(rows) - 1)


def _kept_cells(kind: dict[str, Any]) -> tuple[str, ...]:
    kept = kind["bytes_per_token"]
    cells = (kept["flash"]["none"], kept["unfused"]["none"], kept["unfused"]["selective"], kept["flash"]["full"])
    return tuple(format_bytes(size) for size in cells)


def _operator_tables(activations: dict[str, Any]) -> list[RenderableType]:
    """What every operator keeps, a table a kind of layer; a tensor that two need counts with the first."""
    parts: list[RenderableType] = []
    for kind in activations["layers"]:
        flash, unfused = kind["by_operator"]["flash"], kind["by_operator"]["unfused"]
        rows = [
            (name.replace("_", " "), *(format_bytes(kept[name]) if name in kept else "" for kept in (flash, unfused)))
            for name in dict.fromkeys((*unfused, *flash))
        ]
        title = f"kept by the operators of a layer: {kind['layer']}"
        parts += [Text(), table((title, "flash attention", "unfused"), rows, left=(title,), wrap=(title,))]
    return parts


def _convention_table(data: dict[str, Any]) -> list[RenderableType]:
    """The FLOPs of training as the sources of published figures count them."""
    length, name = data["seq_len"], "training FLOPs as sources count them"
    columns = (name, "a sequence", "a token", "what counts")
    rows = [
        (convention, format_flops(flops), format_flops(flops / length), FLOP_CONVENTIONS[convention].counts)
        for convention, flops in data["flops"]["conventions"].items()
    ]
    return [Text(), table(columns, rows, left=(name, "what counts"), wrap=(name, "what counts"))]


def comparison(models: Sequence[Model], seq_len: int) -> list[RenderableType]:
    """Several models side by side.

    Parameters
    ----------
    models : sequence of Model
    seq_len : int
        Length of the sequence that is counted.
    """
    counted = [model_dict(model, seq_len) for model in models]
    parts: list[RenderableType] = []
    for start in range(0, len(counted), _ABREAST):
        parts += [_side_by_side(counted[start : start + _ABREAST]), Text()]
    return [*parts, Text(f"FLOPs and caches of one sequence of {seq_len} tokens; of attention, attended pairs only.")]


def _side_by_side(models: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = []

    def add(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        values = [value(model) for model in models]
        if any(values):
            rows.append((name, *values))

    add("family", lambda m: m["family"])
    add("architecture", lambda m: m["architecture"])
    add("parameters", lambda m: format_count(m["parameters"]["total"]))
    add("active per token", lambda m: format_count(m["parameters"]["active"]))
    names = list(dict.fromkeys(name for model in models for name in model["parameters"]["by_component"]))
    for name in names:
        add(f"  {component_words(name)}", lambda m, name=name: _count(m["parameters"]["by_component"].get(name)))  # type: ignore[misc]
    add("layers", lambda m: str(m["num_hidden_layers"]))
    add("hidden size", lambda m: str(m["hidden_size"]))
    add("context length", lambda m: str(m["context_length"] or ""))
    add("forward", lambda m: format_flops(m["flops"]["forward_masked"]))
    add("training", lambda m: format_flops(m["flops"]["training_masked"]))
    add("training, a token", lambda m: format_flops(m["flops"]["training_masked"] / m["seq_len"]))
    add("KV cache a token", lambda m: format_bytes(m["kv_cache"]["bytes_per_token"]))
    add("KV cache", lambda m: format_bytes(m["kv_cache"]["bytes_per_sequence"]))
    add("activations a token", lambda m: format_bytes(m["activations"]["bytes_per_token"]["flash"]["none"]))
    for name in dict.fromkeys(name for model in models for name in model["components"]):
        add(name.replace("_", " "), lambda m, name=name: m["components"].get(name, ""))  # type: ignore[misc]
    columns = ("", *(model["name"] for model in models))
    return table(columns, rows, left=columns, wrap=columns[1:])


def component_words(component: str) -> str:
    """A component as tables and pictures call it."""
    return _COMPONENTS.get(component, component.replace("_", " "))


def _count(value: int | None) -> str:
    return "" if value is None else format_count(value)


def format_flops(value: float) -> str:
    """A number of FLOPs with a decimal prefix.

    >>> format_flops(3.42e14), format_flops(0)
    ('342 TFLOP', '0 FLOP')
    """
    text = format_si(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"
