"""``simllm validate torch MODEL --device``: real training steps on one device beside predictions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simllm.cli.options import Json, ModelName, Output, count
from simllm.cli.output import check_output, emit, progress
from simllm.errors import InputError, UnsupportedError

__all__ = ["device_steps"]

#: How far a prediction may be off, by device: from a profile calibrated on it, and from the shipped one; of memory.
TOLERANCES = {"cpu": (0.15, 0.15), "cuda": (0.07, 0.12)}
MEMORY_TOLERANCE = 0.03


def device_steps(
    models: Annotated[list[str], ModelName.__metadata__[0]],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Train on cpu or cuda.")],
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="FILE", help="What simllm calibrate --device wrote on this machine."),
    ] = None,
    shipped: Annotated[
        str | None,
        typer.Option("--cluster", metavar="NAME", help="Also predict from a system of the catalog, such as dgx-h100."),
    ] = None,
    seq_lens: Annotated[
        list[str], typer.Option("--seq-len", metavar="S", help="Tokens in a sequence; may be given several times.")
    ] = ["256"],  # noqa: B006
    batch: Annotated[str, typer.Option("--micro-batch-size", metavar="N", help="Sequences of a step.")] = "1",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="fp32 or bf16 (all states in it).")
    ] = "fp32",
    recompute: Annotated[
        bool, typer.Option("--recompute/--no-recompute", help="Time every case with layers recomputed too.")
    ] = False,
    steps: Annotated[str, typer.Option("--steps", metavar="N", help="Steps timed of a case in each round.")] = "10",
    rounds: Annotated[str, typer.Option("--rounds", metavar="N", help="Rounds over all cases.")] = "3",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N", help="Threads on cpu; as in the calibration.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> int:
    """Train real steps on one device and hold time and memory against predictions.

    Dropout is left out, on both sides. Steps whose times lie further apart than 15 % are not judged, and nothing
    passes by that: the status is then 1, as where a prediction is off.

    \b
    Example:
      simllm validate torch gpt2 --device cpu --threads 1 --profile my-box.yaml --seq-len 256
    """
    from simllm.hardware import load_cluster
    from simllm.models import Model
    from simllm.report.steps import skipped_report, steps_dict, steps_report
    from simllm.units import parse_seq_len
    from simllm.validation.measure.device import open_device
    from simllm.validation.step_timing import StepCase, compare_steps

    check_output(output)
    if profile is None and shipped is None:
        raise InputError("give --profile (a system that simllm calibrate --device wrote), --cluster, or both")
    try:
        where = open_device(device, None if threads is None else count(threads, "--threads", maximum=4096))
    except UnsupportedError as error:
        reason = str(error)
        emit(
            lambda: {"skipped": reason, "quantities": [], "ok": False}, lambda: skipped_report(reason), as_json, output
        )
        return 1
    named = {"calibrated": profile, "shipped": shipped}
    clusters = {name: load_cluster(given, 1) for name, given in named.items() if given is not None}
    cases = [
        StepCase(
            model=Model.load(model),
            seq_len=parse_seq_len(length, "--seq-len"),
            batch=count(batch, "--micro-batch-size"),
            precision=precision,
            recompute=again,
        )
        for model in models
        for length in seq_lens
        for again in ((False, True) if recompute else (False,))
    ]
    with progress("rounds of steps") as tick:
        found = compare_steps(
            cases, where, clusters, steps=count(steps, "--steps"), rounds=count(rounds, "--rounds"), progress=tick
        )
    tolerances = dict(zip(named, TOLERANCES[device], strict=True))
    rows: list[dict[str, Any]] = [row for one in found for row in one.rows(tolerances, MEMORY_TOLERANCE)]
    emit(lambda: steps_dict(where, rows), lambda: steps_report(where, rows), as_json, output)
    return 0 if all(row["ok"] for row in rows) else 1
