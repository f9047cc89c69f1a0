"""A table of runs beside predictions: hand-made ones, and every published one."""

import csv
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import make_cluster
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.parallel import Plan
from simllm.training import Training, estimate
from simllm.validation.runs import NEEDED_COLUMNS, ValidationReport, validate_runs
from tests.validation.conftest import GOOD

CELLS = (
    *("", "0", "-1", "nan", "inf", "1e309", "4.5", "1", "2", "3", "8", "64", "1e7", "fp8", "fp16", "full"),
    *("selective", "every:2", "list:act", "hsdp", "zb-v", "gpipe", "1f1b-i", "v100-sxm-16gb", "tpu-v5p"),
)
PUBLISHED = Path(__file__).parents[1] / "published" / "training_runs.csv"


@cache
def published() -> ValidationReport:
    return validate_runs(PUBLISHED)


class TestOneRow:
    def test_it_is_the_estimate_of_the_same_plan(self, table):
        [row] = validate_runs(table({})).rows
        cluster = make_cluster(accelerator="h100-sxm", num_gpus=16, gpus_per_node=8, scaleout_bandwidth_per_node=400e9)
        plan = Plan(tp=2, dp=8, sequence_parallel=True, global_batch_size=64, zero="1")
        answer = estimate(Model.load("llama-3-8b"), cluster, plan, Training(seq_len=8192))
        assert row.status == "ok"
        assert row.reason == ""
        assert row.predicted_step_time_s == pytest.approx(answer.step_time_s, rel=1e-12)
        assert row.measured_step_time_s == 5.0
        assert row.predicted_mfu == pytest.approx(answer.mfu)
        assert row.measured_mfu == pytest.approx(answer.mfu * answer.step_time_s / 5.0)
        assert row.stack == "megatron-core"

    def test_memory_in_the_view_of_the_measurement(self, table):
        kinds = ("max allocated", "nvidia-smi snapshot, CUDA context included", "reserved", "as printed")
        rows = validate_runs(
            table(*({"id": kind, "measured_peak_mem_gb": "60", "memory_kind": kind} for kind in kinds))
        ).rows
        allocated, smi, reserved, printed = (row.predicted_peak_memory_bytes for row in rows)
        assert rows[0].measured_peak_memory_bytes == 60e9
        costs = load_stack("megatron-core").costs
        # The context, and communicators of the tensor- and the data-parallel group.
        assert smi - allocated == pytest.approx(costs.context.si + 2 * costs.communicator.si)
        assert allocated == reserved == printed
        assert not any("reserved" in sentence for sentence in rows[0].assumptions)
        assert "reserved memory is taken as allocated: the allocator's slack is not modelled" in rows[2].assumptions
        assert any(sentence.startswith("the kind of peak memory is not stated") for sentence in rows[3].assumptions)

    def test_the_measured_time_follows_from_tokens_per_second(self, table):
        [row] = validate_runs(table({"step_time_s": "", "tokens_per_s_per_gpu": "8192"})).rows
        assert row.measured_step_time_s == pytest.approx(64 * 8192 / (8192 * 16))

    def test_a_run_of_ones_own_needs_no_measurement(self, table):
        report = validate_runs(table({"step_time_s": "", "config_key": None, "tier": None, "source": None}))
        [row] = report.rows
        assert (row.status, row.measured_step_time_s, row.config_key) == ("ok", None, "r1")
        assert report.summary["overall"]["count"] == 0

    def test_only_the_needed_columns(self, tmp_path):
        path = tmp_path / "runs.csv"
        cells = {name: GOOD[name] for name in NEEDED_COLUMNS} | {"n_gpus": "1", "gated_mlp": "0", "layers": "12"}
        path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
        [row] = validate_runs(path).rows
        assert (row.status, row.id) == ("ok", "line 2")
        assert len(row.assumptions) > 8

    def test_progress_counts_the_rows(self, table):
        seen = []
        validate_runs(table({}, {"id": "r2"}), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 2), (2, 2)]


class TestBadInput:
    def test_missing_columns_are_named(self, table):
        with pytest.raises(InputError, match=r"lacks the columns gpu, seq_len; needed are gpu, n_gpus, layers"):
            validate_runs(table({"gpu": None, "seq_len": None}))

    def test_not_a_table(self, tmp_path):
        empty = tmp_path / "empty.csv"
        empty.touch()
        for path, says in ((empty, "is empty"), (tmp_path, "is not a file"), (tmp_path / "no.csv", "does not exist")):
            with pytest.raises(InputError, match=says):
                validate_runs(path)

    @pytest.mark.parametrize(
        ("cells", "says"),
        [
            ({"n_gpus": "sixteen"}, "n_gpus='sixteen' is not a whole number"),
            ({"step_time_s": "5 s"}, "step_time_s='5 s' is not a number"),
            ({"step_time_s": "nan"}, "step_time_s=nan must be above zero"),
            ({"measured_peak_mem_gb": "60GB"}, "measured_peak_mem_gb='60GB' is not a number"),
            ({"gpu": "gpu-x"}, "unknown accelerator 'gpu-x'"),
            ({"layers": ""}, "layers is not stated"),
            ({"tp": "3", "dp": ""}, "does not divide n_gpus=16"),
            ({"tp": "64", "n_gpus": "64", "dp": "1", "grad_accum": "64"}, "tp=64 does not divide num_attention_heads"),
            ({"n_gpus": "20", "dp": "10"}, "num_gpus=20 does not fill whole nodes"),
            ({"seq_len": "-1"}, "seq_len=-1 must be from 1"),
            ({"zero": "2", "pp": "2", "dp": "4", "grad_accum": "16"}, "zero=2 with pp=2"),
            ({"precision": "nvfp4", "gpu": "a100-sxm-80gb"}, "nvfp4"),
            ({"task": "qlora"}, "task=qlora"),
        ],
    )
    def test_what_is_wrong_with_a_row_is_its_reason(self, table, cells, says):
        bad, fine = validate_runs(table({"id": "bad", **cells}, {"id": "fine", "config_key": "k2"})).rows
        assert (bad.id, bad.status) == ("bad", "unsupported")
        assert says in bad.reason
        assert bad.predicted_step_time_s is None
        assert fine.status == "ok"

    def test_a_line_that_is_too_long_is_kept(self, table):
        path = table({})
        with path.open("a") as stream:
            stream.write(",".join(["x"] * 80) + "\n")
        assert validate_runs(path).rows[1].reason.startswith("line 3 has 80 cells")

    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from([name for name in GOOD if name not in ("id", "source")]),
            st.one_of(
                st.sampled_from(CELLS),
                st.text(alphabet=st.characters(blacklist_characters="\x00\r\n", codec="utf-8"), max_size=8),
            ),
            min_size=1,
            max_size=5,
        )
    )
    def test_any_cells_end_in_an_answer_or_a_reason(self, cells):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "runs.csv"
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(GOOD))
                writer.writeheader()
                writer.writerow({**GOOD, **cells})
            [row] = validate_runs(path).rows
        if row.status == "ok":
            assert row.reason == ""
            assert row.predicted_step_time_s > 0
            assert row.predicted_peak_memory_bytes > 0
        else:
            assert row.reason
            assert row.predicted_step_time_s is None


class TestReport:
    def test_the_keys_of_the_interface(self, table):
        report = validate_runs(table({}, {"id": "r2", "config_key": "k2", "gpu": "a100-sxm-80gb", "tier": "C"}))
        document = report.to_dict()
        assert {
            "id",
            "status",
            "reason",
            "measured_step_time_s",
            "predicted_step_time_s",
            "measured_peak_memory_bytes",
            "predicted_peak_memory_bytes",
            "assumptions",
        } <= set(document["rows"][0])
        errors = {
            "count",
            "mean_absolute_percentage_error",
            "median_absolute_percentage_error",
            "p90_absolute_percentage_error",
            "bias",
            "spearman",
        }
        summary = document["summary"]
        assert errors <= set(summary["overall"])
        for name, groups in (("gpu", {"h100-sxm"}), ("framework", {"Megatron-Core"}), ("tier", {"A", "C"})):
            assert set(summary[name]) == groups
            assert errors <= set(next(iter(summary[name].values())))

    def test_tier_c_is_listed_but_not_part_of_the_whole(self, table):
        report = validate_runs(
            table({}, {"id": "r2", "config_key": "k2", "tier": "B"}, {"id": "r3", "config_key": "k3", "tier": "C"})
        )
        assert report.summary["overall"]["count"] == 2
        assert {tier: found["count"] for tier, found in report.summary["tier"].items()} == {"A": 1, "B": 1, "C": 1}
        assert report.summary["headline_tiers"] == ["A", "B"]

    def test_repeated_measurements_count_once(self, table):
        report = validate_runs(
            table({"step_time_s": "4"}, {"id": "r2", "step_time_s": "5"}, {"id": "r3", "step_time_s": "60"})
        )
        overall = report.summary["overall"]
        predicted = report.rows[0].predicted_step_time_s
        assert overall["count"] == 1
        assert overall["bias"] == pytest.approx(100 * (predicted - 5) / 5)


class TestPublished:
    def test_every_row_is_there_with_a_status_and_a_reason_if_unsupported(self):
        with PUBLISHED.open(newline="", encoding="utf-8") as stream:
            ids = [row["id"] for row in csv.DictReader(stream)]
        rows = published().rows
        assert [row.id for row in rows] == ids
        assert len(rows) == 1164
        for row in rows:
            assert row.status in ("ok", "unsupported")
            assert (row.reason != "") == (row.status == "unsupported")
            assert (row.predicted_step_time_s is not None) == (row.status == "ok")

    def test_most_rows_are_priced(self):
        for tier, least in (("A", 0.99), ("B", 0.85)):
            rows = [row for row in published().rows if row.tier == tier]
            assert sum(row.status == "ok" for row in rows) >= least * len(rows)

    def test_zero_bubble_schedules_are_as_near_as_1f1b(self):
        """Qi 2023 (arXiv:2401.10241), tables 4, 6 and 7: the same models with and without zero-bubble schedules."""
        rows = {row.id: row for row in published().rows if row.id.startswith("zb-t") and "1.5b" not in row.id}
        assert len(rows) == 66
        for row in rows.values():
            assert abs(row.predicted_step_time_s / row.measured_step_time_s - 1) < 0.15
            if row.measured_peak_memory_bytes:
                assert -0.03 < row.predicted_peak_memory_bytes / row.measured_peak_memory_bytes - 1 < 0.1
        # What a schedule buys over 1F1B on the same model, micro-batch and number of micro-batches.
        for better, rival in (
            ("zb-t4-6.2b-zb-2p-b3-m24", "zb-t4-6.2b-1f1b-b3-m24"),
            ("zb-t6-28.3b-zb-v-b2-m96", "zb-t6-28.3b-1f1b-b2-m96"),
        ):
            predicted = rows[better].predicted_step_time_s / rows[rival].predicted_step_time_s
            assert predicted == pytest.approx(
                rows[better].measured_step_time_s / rows[rival].measured_step_time_s, rel=0.05
            )

    def test_reasons_are_what_is_not_modelled(self):
        reasons = {row.id: row.reason for row in published().rows}
        missing = {reason.split(";")[0] for reason in reasons.values() if "not stated" in reason}
        assert "layers is not stated" in missing

    def test_known_runs_are_near(self):
        """Korthikanti 2022 (arXiv:2205.05198), section 6: 175B, 530B and 1T, full and selective recomputation."""
        rows = [row for row in published().rows if row.id.startswith("kor22-") and row.tier == "A"]
        assert len(rows) == 6
        for row in rows:
            assert row.predicted_step_time_s == pytest.approx(row.measured_step_time_s, rel=0.1)

    def test_errors_stay_where_they_are_or_shrink(self):
        summary = published().summary
        tiers = summary["tier"]
        assert tiers["A"]["count"] >= 350
        assert tiers["B"]["count"] >= 300
        assert tiers["A"]["mean_absolute_percentage_error"] < 6.5
        assert tiers["B"]["mean_absolute_percentage_error"] < 8.5
        assert tiers["A"]["spearman"] > 0.9
        assert summary["memory"]["overall"]["mean_absolute_percentage_error"] < 5

    def test_every_run_is_in_one_group_of_each_kind(self):
        summary = published().summary
        for name in ("gpu", "stack", "scale", "precision", "architecture"):
            assert sum(found["count"] for found in summary[name].values()) >= summary["overall"]["count"], name
        assert set(summary["architecture"]) == {"dense", "experts"}
        scales = {row.scale for row in published().rows if row.id.startswith("kor22-175b")}
        assert scales == {"9 to 64"}
        assert set(summary["precision"]) == {"fp16", "bf16", "fp8", "mxfp8", "nvfp4"}
