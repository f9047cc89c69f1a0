"""Models as tables and as plain data: the catalog, the counts of one model, several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.models import Model
from simllm.report.text import facts, heading, notes, table
from simllm.units import format_bytes, format_count, format_si

__all__ = ["catalog_rows", "catalog_table", "comparison", "model_dict", "model_report"]

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
}


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
        "context_length": spec.context_length,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "embedding": parameters.embedding,
            "lm_head": parameters.lm_head,
            "non_embedding": parameters.non_embedding,
            "by_component": dict(parameters.by_component),
        },
        "seq_len": seq_len,
        "flops": {
            "forward_full_attention": flops.forward_full_attention,
            "forward_masked": flops.forward_masked,
            "training_full_attention": flops.training_full_attention,
            "training_masked": flops.training_masked,
            "by_component": dict(flops.by_component),
        },
        "kv_cache": {"bytes_per_token": per_token, "bytes_per_sequence": per_token * seq_len},
        "components": dict(model.components),
        "notes": [*spec.notes, *_length_note(model, seq_len)],
    }


def _length_note(model: Model, seq_len: int) -> list[str]:
    limit = model.spec.context_length
    if limit is None or seq_len <= limit:
        return []
    return [f"{seq_len} tokens are more than the context length of {limit} that the model was made for"]


def model_report(model: Model, seq_len: int) -> list[RenderableType]:
    """The counts of one model to read."""
    data = model_dict(model, seq_len)
    parameters, flops, cache = data["parameters"], data["flops"], data["kv_cache"]
    head = f"{data['family']}, {data['architecture']}, {data['num_hidden_layers']} layers"
    head += f", hidden size {data['hidden_size']}, vocabulary {data['vocab_size']}"
    if data["context_length"]:
        head += f", context {data['context_length']}"
    total = parameters["total"]
    rows = [(_words(name), f"{n:,}", f"{n / total:.2%}") for name, n in parameters["by_component"].items()]
    rows.append(("total", f"{total:,}", "100%"))
    last = len(rows) - 1
    for name, key in (("active per token", "active"), ("without tables and head", "non_embedding")):
        rows.append((name, f"{parameters[key]:,}", f"{parameters[key] / total:.2%}"))
    work = [
        ("forward", _flops(flops["forward_masked"]), _flops(flops["forward_full_attention"])),
        ("forward and backward", _flops(flops["training_masked"]), _flops(flops["training_full_attention"])),
        (
            "forward and backward, a token",
            _flops(flops["training_masked"] / seq_len),
            _flops(flops["training_full_attention"] / seq_len),
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
        Text(),
        facts(
            {"key-value cache (bf16)": cached}
            | {name.replace("_", " "): text for name, text in data["components"].items()}
        ),
    ]
    return parts + notes("Notes", data["notes"])


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
        add(f"  {_words(name)}", lambda m, name=name: _count(m["parameters"]["by_component"].get(name)))  # type: ignore[misc]
    add("layers", lambda m: str(m["num_hidden_layers"]))
    add("hidden size", lambda m: str(m["hidden_size"]))
    add("vocabulary", lambda m: str(m["vocab_size"]))
    add("context length", lambda m: str(m["context_length"] or ""))
    add("forward", lambda m: _flops(m["flops"]["forward_masked"]))
    add("training", lambda m: _flops(m["flops"]["training_masked"]))
    add("training, a token", lambda m: _flops(m["flops"]["training_masked"] / m["seq_len"]))
    add("KV cache a token", lambda m: format_bytes(m["kv_cache"]["bytes_per_token"]))
    add("KV cache", lambda m: format_bytes(m["kv_cache"]["bytes_per_sequence"]))
    for name in models[0]["components"]:
        add(name.replace("_", " "), lambda m, name=name: m["components"][name])  # type: ignore[misc]
    columns = ("", *(model["name"] for model in models))
    return table(columns, rows, left=columns, wrap=columns[1:])


def _words(component: str) -> str:
    return _COMPONENTS.get(component, component.replace("_", " "))


def _count(value: int | None) -> str:
    return "" if value is None else format_count(value)


def _flops(value: float) -> str:
    text = format_si(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"
