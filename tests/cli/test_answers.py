"""What the commands answer: the keys that scripts rely on, the numbers behind them, exit statuses, files."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest

from simllm import Model, Plan, Recompute, Training, estimate
from simllm.hardware import load_cluster

ESTIMATE = "estimate llama-3-8b --cluster dgx-h100 --gpus 16 --tp 2 --pp 2 --global-batch-size 64"
PLAN = "plan llama-3-8b --cluster dgx-h100 --gpus 16 --global-batch-size 64 --tokens 1T"
ESTIMATE_KEYS = {
    "step_time_s",
    "step_time_interval_s",
    "tokens_per_s_per_gpu",
    "model_tflops_per_gpu",
    "mfu",
    "hfu",
    "fits",
    "memory",
    "time",
    "communication",
    "assumptions",
}
NOTHING_FITS = "plan llama-3-70b --cluster dgx-h100 --gpus 8 --global-batch-size 8"

TABLES = (
    "models list",
    "models list --family Llama-3",
    "models show deepseek-v3 --seq-len 1M",
    "models show t5-11b",
    "models compare gpt2 llama-3-70b mixtral-8x7b deepseek-v3 jamba-v0.1 t5-11b",
    "hardware list",
    "hardware show gb200-nvl72",
    "hardware show h100-sxm",
    "hardware show h100-sxm --kind kernels",
    "hardware show megatron-core",
    "hardware show nvlink4",
    "hardware show rail-optimised-ndr",
    "collective all_reduce --size 1GiB --cluster dgx-h100 --gpus 64",
    "collective all_to_all --size 8GiB --cluster gb200-nvl72 --gpus 576 --sweep",
    ESTIMATE + " --tokens 15T",
    "estimate llama-3.1-405b --cluster dgx-h100 --gpus 16384 --tp 8 --pp 16 --vpp 4 --global-batch-size 2048",
    "estimate mixtral-8x7b --cluster dgx-h100 --gpus 64 --ep 8 --zero hsdp --global-batch-size 64",
    PLAN,
    "plan mixtral-8x7b --cluster dgx-h100 --gpus 16 --global-batch-size 4 --objective cost",
    NOTHING_FITS,
)


@pytest.mark.parametrize("line", TABLES)
def test_tables_fit_into_100_columns(cli, line: str) -> None:
    result = cli(line)
    assert result.status == (1 if line == NOTHING_FITS else 0)
    assert result.err == ""
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in result.out
    assert "…" not in result.out  # nothing cut off
    assert not any(line != line.rstrip() for line in lines)


def test_models_list(cli) -> None:
    rows = {row["name"]: row for row in cli("models list --json").json}
    assert rows["llama-3-70b"]["parameters"] == 70553706496
    assert rows["llama-3-70b"]["family"] == "Llama-3"
    assert rows["mixtral-8x7b"]["active_parameters"] == 12879925248
    only = cli("models list --family qwen3-moe --json").json
    assert [row["name"] for row in only] == ["qwen3-30b-a3b"]


def test_models_show(cli) -> None:
    shown = cli("models show llama-3-70b --seq-len 4k --json").json
    assert shown["name"] == "llama-3-70b"
    assert shown["architecture"] == "causal-decoder"
    assert shown["seq_len"] == 4096
    parameters = shown["parameters"]
    assert parameters["total"] == parameters["active"] == 70553706496
    assert parameters["embedding"] == 128256 * 8192
    assert parameters["non_embedding"] == 70553706496 - 2 * 128256 * 8192
    assert sum(parameters["by_component"].values()) == parameters["total"]
    flops = shown["flops"]
    assert flops["training_masked"] == 3 * flops["forward_masked"]
    # 80 layers, 4 x S^2 x hidden_size FLOPs of scores and values; the mask keeps S (S + 1) / 2 of S^2 pairs
    kept = 80 * 4 * 8192 * (4096 * 4096 - 4096 * 4097 // 2)
    assert flops["forward_full_attention"] - flops["forward_masked"] == kept
    assert shown["kv_cache"]["bytes_per_token"] == 80 * 2 * 8 * 128 * 2
    assert {"tokenizer", "position", "norm", "activation", "attention", "bias", "parallel_block"} <= set(
        shown["components"]
    )


def test_models_show_default_length(cli) -> None:
    assert cli("models show gpt2 --json").json["seq_len"] == 1024
    assert cli("models show llama-3.1-405b --json").json["seq_len"] == 8192
    assert cli("models show lamda-137b --json").json["seq_len"] == 2048


def test_models_show_says_when_a_sequence_is_too_long(cli) -> None:
    assert "context length of 1024" in cli("models show gpt2 --seq-len 2k").out
    assert "context length" not in cli("models show gpt2 --seq-len 1k").out


def test_models_show_own_config(cli, tmp_path: Path) -> None:
    config = json.loads((Path(Model.load.__globals__["__file__"]).parent / "configs" / "gpt2.json").read_text())
    folder = tmp_path / "[bold]mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, folder / "config.json"):
        assert cli("models", "show", str(path), "--json").json["parameters"]["total"] == 124439808
    assert cli("models", "show", str(folder)).out.startswith("[bold]mine  ")


def test_models_compare(cli) -> None:
    rows = cli("models compare gpt2 llama-2-7b t5-base --json").json
    assert [row["name"] for row in rows] == ["gpt2", "llama-2-7b", "t5-base"]
    assert [row["seq_len"] for row in rows] == [512] * 3  # the shortest of the defaults
    assert [row["architecture"] for row in rows] == ["causal-decoder", "causal-decoder", "encoder-decoder"]
    text = cli("models compare gpt2 llama-2-7b").out
    assert "124M" in text
    assert "6.74B" in text


def figures_are_complete(figures: dict) -> None:
    assert figures
    for figure in figures.values():
        assert isinstance(figure["value"], int | float)
        assert figure["unit"]
        assert figure["source"]


def test_hardware_list(cli) -> None:
    catalog = cli("hardware list --json").json
    assert len(catalog["accelerators"]) >= 40
    assert len(catalog["systems"]) >= 40
    assert "megatron-core" in catalog["stacks"]
    for entry in (*catalog["accelerators"], *catalog["systems"]):
        figures_are_complete(entry["figures"])
    assert set(cli("hardware list --kind links --json").json) == {"systems", "accelerators", "links"}


@pytest.mark.parametrize(
    "name",
    [
        "dgx-h100",
        "h100-sxm",
        "H100-SXM5-80GB",
        "nvswitch-gen3",
        "infiniband",
        "megatron-core",
        "h100-sxm --kind kernels",
    ],
)
def test_hardware_show(cli, name: str) -> None:
    figures_are_complete(cli(f"hardware show {name} --json").json["figures"])


def test_hardware_show_figures(cli) -> None:
    shown = cli("hardware show h100-sxm --json").json
    assert (shown["name"], shown["kind"]) == ("h100-sxm", "accelerator")
    assert shown["figures"]["peak_flops.bf16"]["value"] == 989.4
    assert shown["figures"]["peak_flops.bf16"]["unit"] == "TFLOP/s"
    curves = cli("hardware show h100-sxm --kind kernels --json").json["figures"]
    assert 0 < curves["attention.flash3.forward.rate.128"]["value"] < 1
    assert curves["matmul.bf16.rate"]["source"]
    text = cli("hardware show h100-sxm").out
    assert "989.4" in text
    assert shown["figures"]["price"]["source"][:40] in text


def test_hardware_check(cli, tmp_path: Path) -> None:
    from simllm.hardware.profiles import profiles_dir

    good = cli("hardware", "check", str(profiles_dir() / "systems" / "dgx-h100.yaml"), "--json")
    assert (good.status, good.json["ok"], good.json["problems"]) == (0, True, [])
    kernels = cli("hardware", "check", str(profiles_dir() / "kernels" / "h100-sxm.yaml"))
    assert kernels.status == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: link\nname: x\nbandwith: 3\n")
    result = cli("hardware", "check", str(bad), "--json")
    assert (result.status, result.json["ok"]) == (1, False)
    assert "bandwith" in result.json["problems"][0]
    assert "bandwith" in cli("hardware", "check", str(bad)).out


def test_collective(cli) -> None:
    from simllm.network import Group, price

    answer = cli("collective all_reduce --size 1GiB --cluster dgx-h100 --gpus 64 --json").json
    cost = price("all_reduce", 2**30, load_cluster("dgx-h100", 64), Group(size=64))
    assert answer["time_s"] == cost.time_s
    assert answer["algbw_bytes_per_s"] == pytest.approx(2**30 / answer["time_s"])
    assert answer["busbw_bytes_per_s"] == pytest.approx(answer["algbw_bytes_per_s"] * 2 * 63 / 64)
    assert (answer["algorithm"], answer["protocol"], answer["bottleneck"]) == (
        cost.algorithm,
        cost.protocol,
        cost.bottleneck,
    )
    assert "sweep" not in answer


def test_collective_of_a_group(cli) -> None:
    line = "collective all_gather --size 1GiB --cluster dgx-h100 --gpus 64 --stride 8"
    assert cli(f"{line} --json").json["ranks"] == 8
    assert cli(f"{line} --ranks 4 --json").json["ranks"] == 4
    assert "8 ranks with stride 8" in cli(line).out


def test_collective_sweep(cli) -> None:
    line = "collective all_reduce --size 1MiB --min-size 1KiB --cluster dgx-h100 --gpus 8 --sweep"
    answer = cli(f"{line} --json").json
    assert [entry["size_bytes"] for entry in answer["sweep"]] == [1024 * 2**n for n in range(11)]
    times = [entry["time_s"] for entry in answer["sweep"]]
    assert times == sorted(times)
    assert answer["time_s"] == times[-1]
    assert len(cli(line).out.splitlines()) == 2 + 2 + 11


def test_estimate(cli) -> None:
    answer = cli(f"{ESTIMATE} --json").json
    assert set(answer) >= ESTIMATE_KEYS | {"plan"}
    plan = Plan(tp=2, pp=2, dp=4, global_batch_size=64, sequence_parallel=True)
    expected = estimate(Model.load("llama-3-8b"), load_cluster("dgx-h100", 16), plan, Training(seq_len=8192))
    by_resource = answer["time"].pop("by_resource")
    assert sum(by_resource.values()) == pytest.approx(expected.step_time_s, rel=1e-12)
    assert answer == json.loads(json.dumps(expected.to_dict()))
    assert sum(answer["time"]["by_cause"].values()) == pytest.approx(answer["step_time_s"])
    memory = answer["memory"]
    assert sum(memory["by_kind"].values()) == pytest.approx(memory["peak_bytes"])
    assert max(stage["peak_bytes"] for stage in memory["per_stage"]) == memory["peak_bytes"]
    assert "training_run" not in answer


def test_estimate_every_option_arrives(cli) -> None:
    line = (
        "estimate mixtral-8x7b --cluster dgx-h100 --gpus 64 --tp 2 --pp 2 --vpp 2 --cp 2 --ep 4 --etp 2 --dp 8 --zero 1"
        " --micro-batch-size 2 --global-batch-size 64 --seq-len 4k --precision fp8 --recompute every:2"
        " --stack megatron-lm --memory-headroom 0.1 --json"
    )
    answer = cli(line).json
    given = {
        "tp": 2,
        "pp": 2,
        "vpp": 2,
        "cp": 2,
        "ep": 4,
        "etp": 2,
        "dp": 8,
        "zero": "1",
        "hsdp_shard": 0,
        "sequence_parallel": True,
        "micro_batch_size": 2,
        "global_batch_size": 64,
        "num_micro_batches": 4,
        "recompute": "every:2",
        "precision": "fp8",
        "schedule": "interleaved",
    }
    assert {name: answer["plan"][name] for name in given} == given
    assert (answer["seq_len"], answer["stack"]) == (4096, "megatron-lm")
    memory = answer["memory"]
    assert memory["usable_bytes"] == pytest.approx(0.9 * memory["capacity_bytes"])


def test_estimate_kinds_of_context_parallelism(cli) -> None:
    line = "estimate llama-3-70b --cluster dgx-h100 --gpus 64 --tp 4 --cp 8 --global-batch-size 8 --seq-len 64k"
    found = {}
    for kind in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        answer = cli(f"{line} --cp-comm-type {kind} --json").json
        assert answer["plan"]["cp_comm_type"] == kind
        found[kind] = {(t["group"], t["operation"]) for t in answer["communication"] if t["group"].startswith("cp")}
    assert found == {
        "p2p": {("cp", "send_recv")},
        "all_gather": {("cp", "all_gather"), ("cp", "reduce_scatter")},
        "a2a": {("cp", "all_to_all")},
        "a2a+p2p": {("cp_heads", "all_to_all"), ("cp_ring", "send_recv")},
    }
    # Two levels nobody chose: pairs that share a node beside tp=4.
    assert cli(f"{line} --cp-comm-type a2a+p2p --json").json["plan"]["cp_a2a"] == 2
    assert cli(f"{line} --cp-comm-type a2a+p2p --cp-a2a 4 --json").json["plan"]["cp_a2a"] == 4
    # What the software does unless told otherwise.
    assert cli(f"{line} --json").json["plan"]["cp_comm_type"] == "p2p"
    assert cli(f"{line} --stack torchtitan --json").json["plan"]["cp_comm_type"] == "all_gather"
    text = cli(f"{line} --cp-comm-type a2a+p2p").out
    assert "cp_comm_type=a2a+p2p cp_a2a=2" in text
    assert "context parallel, heads" in text


def test_estimate_uneven_layers(cli) -> None:
    line = "estimate deepseek-v3 --cluster dgx-h200 --gpus 256 --pp 16 --ep 16 --global-batch-size 256 --json"
    assert cli(line).status == 2
    answer = cli(f"{line} --uneven-layers").json
    assert answer["plan"]["uneven_layers"] is True
    assert len(answer["memory"]["per_stage"]) == 16


def test_estimate_hsdp_and_sequence_parallel(cli) -> None:
    answer = cli(f"{ESTIMATE} --pp 1 --zero hsdp --hsdp-shard 4 --no-sequence-parallel --json").json
    assert answer["plan"]["zero"] == "hsdp"
    assert answer["plan"]["hsdp_shard"] == 4
    assert answer["plan"]["sequence_parallel"] is False
    assert cli(f"{ESTIMATE} --recompute full --json").json["plan"]["recompute"] == str(Recompute.parse("full"))


def test_estimate_experts_follow_the_stack(cli) -> None:
    line = "estimate mixtral-8x7b --cluster dgx-h100 --gpus 64 --tp 2 --ep 4 --global-batch-size 64 --json --stack"
    assert cli(f"{line} megatron-core").json["plan"]["etp"] == 1
    assert cli(f"{line} megatron-lm").json["plan"]["etp"] == 2
    assert cli(f"{ESTIMATE} --stack megatron-lm --json").json["plan"]["etp"] == 1  # no experts


def test_estimate_of_a_run(cli) -> None:
    answer = cli(f"{ESTIMATE} --tokens 1T --json").json
    run = answer["training_run"]
    seconds = 1e12 / (64 * 8192) * answer["step_time_s"]
    assert run["time_s"] == pytest.approx(seconds)
    assert run["days"] == pytest.approx(seconds / 86400)
    assert run["gpu_hours"] == pytest.approx(seconds / 3600 * 16)
    assert run["usd_per_gpu_hour"] == 3.9
    assert run["usd"] == pytest.approx(run["gpu_hours"] * 3.9)
    assert run["price_source"]
    own = cli(f"{ESTIMATE} --tokens 1T --price 2 --json").json["training_run"]
    assert own["usd"] == pytest.approx(run["gpu_hours"] * 2)
    assert own["price_source"] is None


def test_estimate_without_a_price(cli) -> None:
    line = "estimate llama-3-8b --cluster dgx-b300 --gpus 8 --zero 3 --global-batch-size 8 --tokens 1T"
    run = cli(f"{line} --json").json["training_run"]
    assert run["usd"] is None
    assert "no price is known" in cli(line).out


def test_estimate_that_does_not_fit_is_an_answer(cli) -> None:
    line = "estimate llama-3-70b --cluster dgx-h100 --gpus 8 --tp 8 --global-batch-size 8"
    answer = cli(f"{line} --json")
    assert answer.status == 0
    assert answer.json["fits"] is False
    text = cli(line).out
    assert "DOES NOT FIT" in text


def test_estimate_text_names_the_parts(cli) -> None:
    text = cli(f"{ESTIMATE} --tokens 1T").out
    for words in ("tp=2 pp=2", "MFU", "GPU-hours", "USD", "matrix products", "optimizer states", "Assumptions"):
        assert words in text


def test_plan(cli) -> None:
    result = cli(f"{PLAN} --top 3 --json")
    assert result.status == 0
    answer = result.json
    assert set(answer) >= {"plans", "searched", "feasible", "rejected", "evaluations_per_s"}
    assert len(answer["plans"]) == 3
    times = [entry["step_time_s"] for entry in answer["plans"]]
    assert times == sorted(times)
    for entry in answer["plans"]:
        assert set(entry) >= ESTIMATE_KEYS | {"plan", "training_run"}
        assert entry["fits"]
    assert answer["searched"] == answer["feasible"] + sum(answer["rejected"].values())
    assert math.isfinite(answer["evaluations_per_s"])


def test_plan_text(cli) -> None:
    text = cli(PLAN).out
    for words in (
        "The best plan",
        "where the time goes",
        "limited by",
        "memory of",
        "GPU-hours",
        "Why the others lose",
        "rejected because",
        "Assumptions",
    ):
        assert words in text
    assert "\n2. " in text
    assert "Why the others lose" not in cli(f"{PLAN} --top 1").out


def test_plan_objectives(cli) -> None:
    fewest = cli(f"{PLAN} --objective gpus --json").json["plans"][0]
    cheapest = cli(f"{PLAN} --objective cost --json").json["plans"][0]
    fastest = cli(f"{PLAN} --json").json["plans"][0]
    assert fewest["gpus"] <= cheapest["gpus"] <= fastest["gpus"] == 16
    assert cheapest["training_run"]["gpu_hours"] <= fastest["training_run"]["gpu_hours"]


def test_plan_that_does_not_exist(cli) -> None:
    result = cli(f"{NOTHING_FITS} --json")
    assert result.status == 1
    answer = result.json
    assert answer["plans"] == []
    assert answer["feasible"] == 0
    assert answer["nearest"]["memory"]["peak_bytes"] > answer["nearest"]["memory"]["usable_bytes"]
    text = cli(NOTHING_FITS).out
    assert "No plan fits" in text
    assert "nearest to fitting" in text
    assert "out of memory" in text


RUNS = """\
id,tier,gpu,n_gpus,layers,hidden,ffn_hidden,heads,vocab,seq_len,tp,pp,dp,zero,micro_batch,global_batch_seqs,framework,step_time_s
R1,A,a100-sxm-80gb,512,80,10240,40960,80,51200,2048,8,8,8,0,1,512,Megatron-LM,20
R2,A,a100-sxm-80gb,512,80,10240,40960,80,51200,2048,8,8,,0,1,512,Megatron-LM,10
R3,B,abacus,8,32,4096,,32,32000,2048,8,1,1,0,1,8,Megatron-LM,1
"""


def test_validate_runs(cli, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(RUNS)
    answer = cli("validate", "runs", str(file), "--json").json
    assert [row["id"] for row in answer["rows"]] == ["R1", "R2", "R3"]
    for row in answer["rows"]:
        assert set(row) >= {
            "id",
            "status",
            "reason",
            "measured_step_time_s",
            "predicted_step_time_s",
            "measured_peak_memory_bytes",
            "predicted_peak_memory_bytes",
            "assumptions",
        }
    first, _, last = answer["rows"]
    assert first["status"] == "ok"
    assert first["measured_step_time_s"] == 20
    assert last["status"] == "unsupported"
    assert "abacus" in last["reason"]
    summary = answer["summary"]
    keys = {
        "count",
        "mean_absolute_percentage_error",
        "median_absolute_percentage_error",
        "p90_absolute_percentage_error",
        "bias",
        "spearman",
    }
    assert set(summary["overall"]) >= keys
    assert summary["overall"]["count"] == 2
    for group, name in (("gpu", "a100-sxm-80gb"), ("framework", "Megatron-LM"), ("tier", "A")):
        assert set(summary[group][name]) >= keys
    text = cli("validate", "runs", str(file)).out
    assert "3 rows: 2 priced, 1 unsupported" in text
    assert "step time by framework" in text
    assert "abacus" in text
    assert max(map(len, text.splitlines())) <= 100


def test_output_is_the_same_answer_in_a_file(cli, tmp_path: Path) -> None:
    printed = cli(ESTIMATE).out
    document = cli(f"{ESTIMATE} --json").out
    text, named, asked = tmp_path / "a.txt", tmp_path / "b.json", tmp_path / "c.out"
    assert cli(f"{ESTIMATE} --output {text}").out == ""
    cli(f"{ESTIMATE} -o {named}")
    cli(f"{ESTIMATE} --json --output {asked}")
    assert text.read_text() == printed
    assert named.read_text() == asked.read_text() == document
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.json", "c.out"]


def test_output_keeps_links_and_modes(cli, tmp_path: Path) -> None:
    place, link = tmp_path / "real.json", tmp_path / "link.json"
    place.write_text("old")
    place.chmod(0o640)
    link.symlink_to(place)
    cli("models", "show", "gpt2", "--output", str(link), "--overwrite")
    assert link.is_symlink()
    assert json.loads(place.read_text())["name"] == "gpt2"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640


def test_output_to_a_device(cli) -> None:
    assert cli("models show gpt2 --output /dev/null").status == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_no_plan_is_still_written(cli, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert cli(f"{NOTHING_FITS} --output {file}").status == 1
    assert json.loads(file.read_text())["plans"] == []


def test_plots(cli, tmp_path: Path) -> None:
    picture, drawing = tmp_path / "a.png", tmp_path / "b.svg"
    assert cli(f"{ESTIMATE} --plot {picture}").out == cli(ESTIMATE).out
    assert picture.read_bytes().startswith(b"\x89PNG")
    cli(f"collective all_reduce --size 1GiB --cluster dgx-h100 --gpus 64 --sweep --plot {drawing} --json")
    assert "<svg" in drawing.read_text()
