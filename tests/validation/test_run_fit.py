"""Run constants: where they are, what changes with them, and the fit that finds them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from simllm.errors import InputError
from simllm.hardware import load_cluster
from simllm.hardware.stack import load_stack
from simllm.validation import run_constants as rc
from simllm.validation.run_constants import Constants, run_constants, shipped_values
from simllm.validation.run_fit import RunFit, publication_of, source_of
from simllm.validation.runs import validate_runs

TABLE = Path(__file__).parents[1] / "published" / "training_runs.csv"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Every sixth run of two publications on two devices."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = [r for r in rows if r["source"].startswith("mosaicml/llm-foundry") and r["tier"] == "A"][::6]
    chosen += [r for r in rows if r["source"].startswith("NVIDIA/dgxc-benchmarking nemotron") and r["tier"] == "A"]
    path = tmp_path_factory.mktemp("runs") / "few.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(chosen)
    return path


def test_every_figure_exists_says_that_it_is_fitted_and_agrees_with_its_twins():
    values = shipped_values()
    for name, constant in run_constants().constants.items():
        assert constant.low <= values[name] <= constant.high, name
        for figure in constant.figures:
            assert rc._shipped(figure).basis == "fitted", figure
            assert name in rc._shipped(figure).source, figure


def test_constants_change_what_they_name_and_nothing_else():
    stack = Constants({"exposed_fsdp1": 0.25}).load_stack("fsdp1")
    shipped = load_stack("fsdp1")
    assert stack.overlap.gradient_exposed.si == stack.overlap.fully_sharded_exposed.si == 0.25
    assert stack.overlap.tensor_parallel_exposed == shipped.overlap.tensor_parallel_exposed
    assert (stack.costs, stack.kernels, stack.states) == (shipped.costs, shipped.kernels, shipped.states)
    assert Constants({"exposed_fsdp1": 0.25}).load_stack("nemo") == load_stack("nemo")


def test_a_device_that_borrows_follows():
    constants = Constants({"sustained_h100": 0.5})
    assert dict(constants.cluster(load_cluster("dgx-h200", 8)).accelerator.sustained)["bf16"] == 0.5
    assert constants.used == {"sustained_h100"}
    assert constants.cluster(load_cluster("dgx-a100", 8)).accelerator.sustained == ()


def test_slower_clocks_take_longer(few):
    usual = validate_runs(few, constants=Constants(shipped_values()))
    slow = validate_runs(few, constants=Constants(shipped_values() | {"sustained_h100": 0.5}))
    plain = validate_runs(few)
    for a, b, c in zip(usual.rows, slow.rows, plain.rows, strict=True):
        assert a.predicted_step_time_s == pytest.approx(c.predicted_step_time_s, rel=1e-12)
        if a.gpu == "h100-sxm" and "bf16" in str(a.assumptions):
            assert b.predicted_step_time_s > a.predicted_step_time_s
        if a.gpu.startswith("a100"):
            assert b.predicted_step_time_s == a.predicted_step_time_s


def test_publications_and_sources():
    assert publication_of("MooreThreads/SimuMax docs/b200/x.md case=a") == "simumax"
    assert publication_of("Korthikanti 2022 (arXiv:2205.05198) Tables 3,5") == "korthikanti 2022"
    assert source_of("NVIDIA/NeMo docs", "h100-sxm") == "nemo on h100-sxm"


def test_a_fit_finds_the_constants_that_made_the_runs(few):
    """Runs measured as the model with other constants predicts them give these constants back."""
    true = shipped_values() | {"exposed_fsdp1": 0.6, "attention_llm_foundry": 0.8}
    fit = RunFit(few)
    made = fit.predict(true, range(len(fit._rows)))
    for number, configuration in enumerate(fit._configurations):
        times = [made[i].predicted_step_time_s for i in configuration.rows]
        fit._configurations[number] = rc.replace(configuration, measured=float(np.median(times)))
    found = fit.fitted(2)
    # Priors pull a little: the runs of one publication do not outweigh them altogether.
    assert found["exposed_fsdp1"] == pytest.approx(0.6, abs=0.08)
    assert found["attention_llm_foundry"] == pytest.approx(0.8, abs=0.08)


def test_memory_has_constants_of_its_own(tmp_path):
    """Peaks as other constants predict them give these back, and no step time changes with them."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["source"].startswith("bigscience") and r["measured_peak_mem_gb"]]
    path = tmp_path / "memory.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[::2])
    fit = RunFit(path, quantity="peak_memory")
    assert set(fit.names) == {"context", "communicator", "logits_megatron", "logits_compiled"}
    assert fit.constants_fitted == 3
    true = {"communicator": 1.3, "logits_megatron": 12.0}
    usual, made = (fit.predict(values, range(len(fit._rows))) for values in ({}, true))
    for number, configuration in enumerate(fit._configurations):
        peaks = [made[i].predicted_peak_memory_bytes for i in configuration.rows]
        fit._configurations[number] = rc.replace(configuration, measured=float(np.median(peaks)))
    found = fit.fitted(2)
    assert found["communicator"] == pytest.approx(1.3, abs=0.15)
    assert found["logits_megatron"] == pytest.approx(12.0, abs=0.6)
    for i, result in usual.items():
        assert result.predicted_step_time_s == made[i].predicted_step_time_s
        assert result.predicted_peak_memory_bytes < made[i].predicted_peak_memory_bytes


def test_what_is_left_out_is_not_seen(few):
    fit = RunFit(few)
    seen = fit.errors("nothing")
    unseen = fit.errors("publication")
    assert set(unseen.parts) == {"llm-foundry", "dgxc-benchmarking"}
    assert set(seen.parts) == {"everything"}
    assert [row.id for row in seen.rows] == [row.id for row in unseen.rows]
    mean = "mean_absolute_percentage_error"
    assert unseen.score("A").to_dict()[mean] > seen.score("A").to_dict()[mean]


def test_values_are_written_into_their_figures_only():
    text = (
        "overlap:\n  # a comment\n  a_exposed: {value: 0.5, unit: fraction}\n  b: {value: 2}\ncosts:\n  b: {value: 3}\n"
    )
    written = rc._with_value(text, "overlap.b", 7.0, Path("x.yaml"))
    assert written == text.replace("b: {value: 2}", "b: {value: 7}")
    with pytest.raises(InputError, match=r"no figure overlap\.c to write"):
        rc._with_value(text, "overlap.c", 7.0, Path("x.yaml"))


def test_a_constant_has_either_a_prior_or_a_parent():
    with pytest.raises(ValueError, match="either a prior or a parent"):
        rc.RunConstant(spread=1, low=0, high=1, figures=(), note="")
    child = rc.RunConstant(spread=1, low=0, high=1, figures=(), note="", parent="later")
    with pytest.raises(ValueError, match="must stand above it"):
        rc.RunConstants(kind="run-constants", constants={"child": child})


def test_a_table_without_judged_runs_is_refused(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("gpu,n_gpus,layers,hidden,heads,seq_len,global_batch_seqs\nh100-sxm,8,1,64,2,128,8\n")
    with pytest.raises(InputError, match="no run of tiers A and B"):
        RunFit(path)
