"""Schedules and offload from the command line."""

from __future__ import annotations

import pytest

BASE = "estimate llama-3-8b --cluster dgx-a100 --gpus 8 --seq-len 2k --global-batch-size 32"


@pytest.mark.parametrize(
    "options",
    [
        "--pp 4 --vpp 4 --schedule looped-bfs",
        "--pp 4 --schedule zb-h1",
        "--pp 4 --schedule zb-h2",
        "--pp 4 --schedule zb-2p",
        "--pp 4 --vpp 2 --schedule zb-v",
        "--pp 4 --vpp 2 --schedule interleaved-zb",
        "--pp 4 --schedule dualpipe",
        "--pp 4 --vpp 2 --schedule dualpipe-v",
        "--zero 3 --offload optimizer:nvme,gradients,parameters,activations",
    ],
)
def test_parts_add_up(cli, options: str) -> None:
    answer = cli(f"{BASE} {options} --json").json
    assert sum(answer["time"]["by_cause"].values()) == pytest.approx(answer["step_time_s"])
    assert all(seconds >= 0 for seconds in answer["time"]["by_cause"].values())
    assert sum(answer["memory"]["by_kind"].values()) == pytest.approx(answer["memory"]["peak_bytes"])
    assert answer["plan"]["schedule"] in options or "schedule" not in options
    table = cli(f"{BASE} {options}")
    assert table.status == 0
    assert max(map(len, table.out.splitlines())) <= 100


def test_zero_bubble_is_faster_and_needs_more_memory(cli) -> None:
    plain = cli(f"{BASE} --pp 4 --json").json
    better = cli(f"{BASE} --pp 4 --schedule zb-h2 --json").json
    assert better["step_time_s"] < plain["step_time_s"]
    assert better["memory"]["peak_bytes"] > plain["memory"]["peak_bytes"]


def test_simulation_is_at_most_the_closed_form(cli) -> None:
    closed, exact = (cli(f"{BASE} --pp 4 {option} --json").json["step_time_s"] for option in ("", "--simulate"))
    assert 0.95 * closed < exact <= closed * (1 + 1e-9)


def test_host_memory_is_answered_and_checked(cli) -> None:
    host = cli(f"{BASE} --zero 3 --offload optimizer,gradients --json").json["memory"]["host"]
    assert host["fits"]
    assert host["memory_bytes"] == pytest.approx(8 * 8.03e9 / 8 * (4 + 8 + 4), rel=0.01)  # master, moments, gradient
    large = "estimate gpt3-175b --cluster dgx-2 --gpus 16 --zero 3 --seq-len 2k --global-batch-size 16 --precision fp16"
    answer = cli(f"{large} --recompute full --offload optimizer,gradients,parameters --json").json
    assert not answer["memory"]["host"]["fits"]
    assert not answer["fits"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--pp 4 --schedule zb-v", "use vpp=2"),
        ("--pp 4 --schedule zb", "unknown schedule 'zb'"),
        ("--pp 4 --vpp 2 --schedule dualpipe", "it needs vpp=1"),
        ("--offload parameters", "use zero=3 or hsdp"),
        ("--offload weights", "unknown state to offload 'weights'"),
    ],
)
def test_wrong_options(cli, options: str, says: str) -> None:
    result = cli(f"{BASE} {options}")
    assert result.status == 2
    assert says in result.err
    assert "Traceback" not in result.err
