"""``simllm plan``: constraints, comparisons, what to change, and every wrong question."""

from __future__ import annotations

import pytest

from simllm.planner.search import PlanSearch

SMALL = "plan llama-3-8b --cluster dgx-h100 --global-batch-size 64 --seq-len 4096 --cp 1 --micro-batch-size 1,2"
QUESTION = f"{SMALL} --gpus 16"
HUGE = "plan llama-3.1-405b --cluster dgx-h100 --gpus 16384 --global-batch-size 2048 --seq-len 8192"


def test_the_published_405b_run_is_compared(cli) -> None:
    """Llama 3 (arXiv:2407.21783, table 4): tp 8, pp 16, dp 128, no context parallelism for 8k tokens."""
    found = cli(f"{HUGE} --top 3 --json --compare tp=8,pp=16,vpp=4 --compare tp=8,pp=16").json
    best = found["plans"][0]["plan"]
    assert best["pp"] == 16
    assert best["tp"] in (4, 8)
    assert any(entry["plan"]["tp"] == 8 and entry["plan"]["pp"] == 16 for entry in found["plans"])
    assert found["evaluations"] > 50_000
    interleaved, plain = found["comparisons"]
    assert interleaved["estimate"]["plan"]["dp"] == plain["estimate"]["plan"]["dp"] == 128
    assert 1 < interleaved["rank"] < plain["rank"] <= interleaved["of"] == found["feasible"]
    assert any("pipeline bubble" in line for line in plain["why"])
    # Without interleaving the bubble is (16 - 1) / 16 micro-batches' time, and costs most of the difference.
    causes = plain["estimate"]["time"]["by_cause"]
    assert causes["pipeline_bubble"] == max(s for cause, s in causes.items() if cause != "matmul")


def test_json_keys(cli) -> None:
    found = cli(f"{QUESTION} --json").json
    assert {"plans", "searched", "feasible", "rejected", "evaluations_per_s", "fixes", "pareto", "comparisons"} <= set(
        found
    )
    assert found["searched"] == found["feasible"] + sum(found["rejected"].values())
    times = [point["step_time_s"] for point in found["pareto"]]
    free = [point["free_memory_bytes"] for point in found["pareto"]]
    assert times == sorted(times)
    assert free == sorted(free)
    assert found["pareto"][0]["step_time_s"] == pytest.approx(found["plans"][0]["step_time_s"], rel=1e-9)
    first = found["pareto"][0]
    assert first["usd_per_step"] == pytest.approx(first["step_time_s"] * 16 * 3.90 / 3600)
    own = cli(f"{QUESTION} --json --tokens 1B --price 2").json["pareto"][0]
    assert own["usd_per_step"] == pytest.approx(own["step_time_s"] * 16 * 2 / 3600)


def test_degrees_are_fixed_by_options(cli) -> None:
    found = cli(f"{QUESTION} --tp 2,4 --pp 2 --zero 1 --schedule 1f1b --recompute none,full --json --top 50").json
    plans = [entry["plan"] for entry in found["plans"]]
    assert {plan["tp"] for plan in plans} == {2, 4}
    assert {(plan["pp"], plan["zero"], plan["schedule"]) for plan in plans} == {(2, "1", "1f1b")}
    assert {plan["recompute"] for plan in plans} <= {"none", "full"}


def test_kinds_of_context_parallelism_to_choose_from(cli) -> None:
    line = (
        "plan llama-3-8b --cluster dgx-h100 --gpus 32 --global-batch-size 4 --seq-len 128k --cp 8,16 --json --top 200"
    )
    one, several = cli(line).json, cli(f"{line} --cp-comm-type p2p,a2a,a2a+p2p,all_gather").json
    kinds = {entry["plan"]["cp_comm_type"] for entry in several["plans"]}
    assert {entry["plan"]["cp_comm_type"] for entry in one["plans"]} == {"p2p"}
    assert kinds == {"p2p", "a2a", "a2a+p2p", "all_gather"}
    assert several["plans"][0]["step_time_s"] <= one["plans"][0]["step_time_s"]
    assert several["searched"] > 3 * one["searched"]
    # Every one of them is a plan that estimate takes, with the same answer.
    best = next(entry for entry in several["plans"] if entry["plan"]["cp_comm_type"] == "a2a+p2p")
    plan = best["plan"]
    words = " ".join(
        f"--{name.replace('_', '-')} {plan[name]}" for name in ("tp", "pp", "vpp", "cp", "zero", "recompute")
    )
    again = cli(
        f"estimate llama-3-8b --cluster dgx-h100 --gpus 32 --seq-len 128k --global-batch-size 4 {words} --json "
        f"--cp-comm-type a2a+p2p --micro-batch-size {plan['micro_batch_size']} --schedule {plan['schedule']} "
        f"--{'' if plan['sequence_parallel'] else 'no-'}sequence-parallel"
    ).json
    assert again["plan"]["cp_a2a"] == plan["cp_a2a"]
    assert again["step_time_s"] == pytest.approx(best["step_time_s"], rel=1e-9)


def test_several_numbers_of_gpus(cli) -> None:
    listed = cli(f"{SMALL} --gpus 8,16 --objective cost --json --top 100").json
    assert {entry["gpus"] for entry in listed["plans"]} == {8, 16}
    most = cli(f"{SMALL} --max-gpus 16 --objective gpus --json --top 1").json
    assert most["plans"][0]["gpus"] < 8


def test_precisions_to_choose_from(cli) -> None:
    one, both = (cli(f"{QUESTION} --precision {names} --json --top 1").json for names in ("fp8", "fp8,bf16"))
    assert both["searched"] == 2 * one["searched"]
    assert both["plans"][0]["plan"]["precision"] == "fp8"
    assert both["plans"][0]["step_time_s"] == one["plans"][0]["step_time_s"]


def test_multi_token_prediction(cli) -> None:
    line = "plan deepseek-v3 --cluster dgx-h100 --gpus 256 --global-batch-size 256 --seq-len 4096 --tp 1 --cp 1 --json"
    line += " --ep 64 --pp 2,4 --micro-batch-size 1 --top 1"
    without, with_modules = cli(line).json, cli(f"{line} --mtp").json
    assert with_modules["plans"][0]["step_time_s"] > without["plans"][0]["step_time_s"]


def test_nothing_keeps_the_limit(cli) -> None:
    result = cli(f"{QUESTION} --tokens 1T --max-days 1")
    assert result.status == 1
    assert "No plan that fits keeps the limits." in result.out
    assert "What would help" in result.out
    assert "without max_days=1" in result.out


def test_nothing_fits_with_these_degrees(cli) -> None:
    result = cli(
        "plan llama-3-70b --cluster dgx-h100 --gpus 64 --global-batch-size 64 --seq-len 4096 --tp 1 --pp 1 --zero 0,1"
    )
    assert result.status == 1
    assert "No plan fits." in result.out
    assert "without zero=0,1" in result.out
    assert "out of memory: the model and optimizer states alone" in result.out


def test_offload_is_a_choice(cli) -> None:
    line = "plan llama-3-70b --cluster dgx-h100 --gpus 8 --global-batch-size 32 --seq-len 4096 --cp 1"
    without = cli(f"{line} --json")
    assert without.status == 1
    assert any(change["change"] == "with offload=optimizer" for change in without.json["changes"])
    found = cli(f"{line} --json --offload none --offload optimizer,gradients --top 1").json
    assert found["plans"][0]["plan"]["offload"] == "optimizer,gradients"
    assert "fits with offload=optimizer,gradients" in {
        change for changes in found["fixes"].values() for change in changes
    }
    refused = cli(f"{line} --offload moments")
    assert refused.status == 2
    assert "'moments'" in refused.err


def test_report_says_what_the_search_knows(cli) -> None:
    text = cli(f"{QUESTION} --compare tp=8,pp=1").out
    assert "Compared: tp=8 pp=1 dp=2 zero=1 mbs=1 recompute=none sp" in text
    assert "Pareto front" in text
    assert "nearest change for those out of memory" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (SMALL, ["--gpus and --max-gpus", "neither is given"]),
        (f"{SMALL} --gpus 8 --max-gpus 16", ["both are given"]),
        (f"{SMALL} --gpus ,", ["--gpus=,"]),
        (f"{QUESTION} --tp 3", ["no plan has tp=3", "attention heads"]),
        (f"{QUESTION} --tp 8 --pp 4", ["no plan has tp=8, pp=4", "16 GPUs"]),
        (f"{QUESTION} --tp 2 --dp 5", ["dp=5"]),
        (f"{QUESTION} --pp 1 --vpp 2", ["vpp=2", "pp=1"]),
        (f"{QUESTION} --tp 1 --sequence-parallel", ["sequence_parallel", "tp=1"]),
        (f"{QUESTION} --schedule 2f2b", ["'2f2b'", "1f1b"]),
        (f"{QUESTION} --zero 9", ["'9'", "hsdp"]),
        (f"{QUESTION} --recompute some", ["'some'", "every:N"]),
        (f"{QUESTION} --tp two", ["--tp=two"]),
        (f"{QUESTION} --tp-within rack", ["'rack'", "domain"]),
        (f"{QUESTION} --max-days 3", ["--tokens"]),
        (f"{QUESTION} --max-usd -3 --tokens 1T", ["--max-usd=-3"]),
        (f"{QUESTION} --compare tp=5", ["tp=5", "16 GPUs"]),
        (f"{QUESTION} --compare tp=2,xx=2", ["'xx'"]),
        (f"{QUESTION} --mtp", ["llama-3-8b", "multi-token"]),
        (
            "plan llama-2-7b --cluster atlas-800t-a2 --gpus 8 --global-batch-size 8 --tokens 1T --max-usd 5",
            ["no price is known", "--price"],
        ),
    ],
)
def test_wrong_questions(cli, line: str, said: list[str]) -> None:
    result = cli(line)
    assert result.status == 2, result
    assert result.out == ""
    assert result.err.startswith("simllm: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


def test_an_empty_search_has_no_rate() -> None:
    empty = PlanSearch(
        plans=(),
        searched=0,
        feasible=0,
        rejected={},
        fixes={},
        front=(),
        comparisons=(),
        changes=(),
        seconds=0.0,
        priced=0,
        nearest=None,
    )
    assert empty.evaluations_per_s == 0.0
    assert empty.limits == ""
