"""Calibrate this processor and train small models on it in turns: how tests/published/cpu_box was made.

    python benchmarks/steps_on_cpu.py tests/published/cpu_box --turns 4

Each turn visits every kernel once more and trains every model some steps, so that both see the same machine: others who
use it slow down both or neither. The models have shapes that are not calibrated. Needs the extras validate, calibrate.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from simllm.hardware import load_cluster
from simllm.models import Model
from simllm.report.steps import steps_dict, steps_report
from simllm.report.text import render
from simllm.validation.measure.device import open_device
from simllm.validation.measure.run import calibrate_machine
from simllm.validation.measure.tasks import grid_for
from simllm.validation.step_timing import StepCase, StepTiming, compare_step, time_steps

#: Where steps of so few layers and tokens still take a tenth of a second.
SEQ_LEN, BATCH, STEPS, TOLERANCE = 192, 3, 3, 0.15


def main(arguments: list[str]) -> int:
    """Measure in turns, compare, write the profile and the table; returns 1 where a case is off or not judged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model configs lie and the results go")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="of the matmuls that are measured")
    given = parser.parse_args(arguments)
    device = open_device("cpu", given.threads)
    models = [Model.load(path) for path in sorted(given.folder.glob("*-*.json"))]
    cases = [
        StepCase(model=model, seq_len=SEQ_LEN, batch=BATCH, precision="fp32", recompute=recompute)
        for model in models
        for recompute in (False, True)
    ]
    timings: list[list[StepTiming]] = [[] for _ in cases]
    output = given.folder / "cpu-box.yaml"
    for turn in range(1, given.turns + 1):
        measured = calibrate_machine(
            "cpu",
            output,
            threads=given.threads,
            ranks=2,
            grid=replace(grid_for("cpu"), precisions=tuple(given.precision)),
            visits=turn,
            long_run=turn == given.turns,
            write=lambda path, text: path.write_text(text),
        )
        for case, times in zip(cases, timings, strict=True):
            times.append(time_steps(case, device, STEPS))
    clusters = {"calibrated": load_cluster(output, 1)}
    rows = [
        row
        for case, times in zip(cases, timings, strict=True)
        for row in compare_step(case, times, device, clusters).rows({"calibrated": TOLERANCE}, 0.0)
    ]
    table = steps_dict(device, rows) | {"kernel_spread": measured.spread}
    (given.folder / "steps.json").write_text(json.dumps(table, indent=2) + "\n")
    print(render(steps_report(device, rows)))
    print(f"kernels repeat within {measured.spread:.1%}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
