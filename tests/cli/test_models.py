"""``simllm models``: what its options add to an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simllm.models import Model
from simllm.models.activations import Recompute, saved_bytes, saved_bytes_by_operator
from simllm.models.catalog import catalog_names
from simllm.models.conventions import FLOP_CONVENTIONS, training_flops
from simllm.models.graph import Implementation, Layout


def refused(result, *said: str) -> None:
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


@pytest.mark.parametrize(
    "line",
    [
        "models show deepseek-v3 --mtp --activations --conventions",
        "models show gpt-oss-20b --activations --vocab-multiple 1024",
        "models show jamba-v0.1 --conventions",
        "models show switch-c-2048 --activations",
    ],
)
def test_reports_are_text_of_100_columns(cli, line: str) -> None:
    result = cli(line)
    assert (result.status, result.err) == (0, "")
    assert max(map(len, result.out.splitlines())) <= 100
    assert "…" not in result.out


def test_multi_token_prediction(cli) -> None:
    plain, with_modules = (cli(f"models show deepseek-v3 --json {option}").json for option in ("", "--mtp"))
    assert plain["parameters"]["total"] == 671026404352
    assert plain["parameters"]["multi_token_prediction"] == 0
    assert with_modules["parameters"]["total"] == 671026404352 + 11610067968
    assert with_modules["parameters"]["multi_token_prediction"] == 11610067968
    assert with_modules["components"]["multi_token_prediction"] == "1 module"
    assert with_modules["kv_cache"] == plain["kv_cache"]
    text = cli("models show deepseek-v3 --mtp").out
    assert "11,610,067,968   1.70%" in text
    refused(cli("models show gpt2 --mtp"), "gpt2", "num_nextn_predict_layers")


def test_padded_vocabulary(cli) -> None:
    padded = cli("models show gpt2 --vocab-multiple 128 --json").json
    assert (padded["vocab_size"], padded["padded_vocab_size"]) == (50257, 50304)
    assert padded["parameters"]["total"] == 124439808 + 47 * 768
    refused(cli("models show gpt2 --vocab-multiple 0"), "--vocab-multiple=0")
    refused(cli("models show gpt2 --vocab-multiple many"), "--vocab-multiple", "many")


def test_conventions(cli) -> None:
    model = Model.load("mistral-7b")
    answer = cli("models show mistral-7b --seq-len 8k --json").json["flops"]
    assert answer["conventions"] == {name: training_flops(model, 8192, name) for name in FLOP_CONVENTIONS}
    assert answer["conventions"]["full-attention"] == answer["training_full_attention"]
    assert answer["conventions"]["masked"] == answer["training_masked"]
    text = cli("models show mistral-7b --conventions").out
    assert all(f"\n{name} " in text for name in FLOP_CONVENTIONS)
    assert "with-recompute" not in cli("models show mistral-7b").out


def test_activations(cli) -> None:
    answer = cli("models show mixtral-8x7b --seq-len 4k --json").json["activations"]
    (kind,) = answer["layers"]
    assert (kind["layer"], kind["layers"]) == ("GQA, 2 of 8 experts", 32)
    layer, layout = Model.load("mixtral-8x7b").graph.layers[0], Layout(seq_len=4096)
    for attention in ("flash", "unfused"):
        impl = Implementation(attention=attention)  # type: ignore[arg-type]
        for policy in ("none", "selective", "full"):
            kept = saved_bytes(layer, layout, impl, Recompute(kind=policy)) / 4096
            assert kind["bytes_per_token"][attention][policy] == kept
            assert answer["bytes_per_token"][attention][policy] == 32 * kept
        operators = saved_bytes_by_operator(layer, layout, impl)
        assert kind["by_operator"][attention] == {name: size / 4096 for name, size in operators.items()}
        total = pytest.approx(sum(kind["by_operator"][attention].values()))
        assert kind["bytes_per_token"][attention]["none"] == total
    # Of a recomputed layer only its input stays: 4096 values of two bytes.
    assert kind["bytes_per_token"]["flash"]["full"] == 8192
    text, more = cli("models show mixtral-8x7b").out, cli("models show mixtral-8x7b --activations").out
    assert "32 x GQA, 2 of 8 experts" in text
    assert "expert down" not in text
    assert "expert down" in more


def test_layers_of_both_stacks_and_of_modules_are_told_apart(cli) -> None:
    def kinds(line: str) -> list[tuple[int, str]]:
        return [(kind["layers"], kind["layer"]) for kind in cli(line).json["activations"]["layers"]]

    assert kinds("models show t5-base --json") == [(12, "MHA, relu MLP"), (12, "MHA with cross-attention, relu MLP")]
    assert kinds("models show deepseek-v3 --mtp --json") == [
        (3, "MLA, SwiGLU MLP"),
        (59, "MLA, 8 of 256 experts, shared expert"),
    ]
    assert len(kinds("models show gemma-2-2b --json")) == 2


def test_every_model_of_the_catalog_has_a_story(cli) -> None:
    for row in cli("models", "compare", *catalog_names(), "--json").json:
        assert sum(row["parameters"]["by_component"].values()) == row["parameters"]["total"]
        assert sum(kind["layers"] for kind in row["activations"]["layers"]) == row["num_hidden_layers"]
        kept = row["activations"]["bytes_per_token"]
        assert 0 < kept["flash"]["full"] < kept["flash"]["selective"] <= kept["flash"]["none"]
        assert kept["unfused"]["selective"] <= kept["unfused"]["none"]


def test_pictures(cli, tmp_path: Path) -> None:
    picture, drawing = tmp_path / "model.png", tmp_path / "models.svg"
    assert cli(f"models show gpt2 --plot {picture}").out == cli("models show gpt2").out
    assert picture.read_bytes().startswith(b"\x89PNG")
    cli(f"models compare gpt2 t5-base deepseek-v3 --plot {drawing}")
    assert b"<svg" in drawing.read_bytes()
    refused(cli("models show gpt2 --plot a.gif"), "--plot=a.gif")
    refused(cli(f"models compare gpt2 --plot {tmp_path}/none/a.png"), "no folder")


def test_bars_of_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from simllm.report import model_plots

    drawn: list[Figure] = []
    monkeypatch.setattr(model_plots, "_bytes", lambda figure, _: drawn.append(figure) or b"")
    gpt2, llama = Model.load("gpt2"), Model.load("llama-3-8b")
    model_plots.plot_model(llama, 1024, "png")
    model_plots.plot_comparison([gpt2, gpt2, llama], 1024, "png")
    one, several = drawn
    for axes, parts in zip(one.axes, (llama.parameters.by_component, llama.flops(1024).by_component), strict=True):
        assert sorted(bar.get_width() for bar in axes.patches) == sorted(parts.values())
        assert [label.get_text() for label in axes.get_yticklabels()][-1] == "MLP"
    left = several.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["gpt2  124M", "gpt2  124M", "llama-3-8b  8.03B"]
    for row in range(3):
        widths = [bar.get_width() for bar in left.patches if round(bar.get_y() + bar.get_height() / 2) == row]
        assert sum(widths) == pytest.approx(100)


def test_an_unknown_model_type_names_families_and_fields(cli, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "rwkv7", "hidden_size": 2048, "n_layers": 24, "vocab_size": 65536}))
    refused(
        cli("models", "show", str(file)),
        "unknown model_type 'rwkv7'",
        "hidden_size=2048, num_hidden_layers=24, vocab_size=65536",
        "Mixtral (mixtral)",
        "ChatGLM2/3 (chatglm)",
    )
