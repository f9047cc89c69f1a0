"""``simllm validate torch MODEL --device``: real training steps on one device beside predictions."""

from __future__ import annotations

from typing import Any

from simllm.cli.options import count
from simllm.cli.output import emit, progress
from simllm.errors import InputError, UnsupportedError

__all__ = ["device_steps"]

#: How far a prediction may be off, by device: from a profile calibrated on it, and from the shipped one; of memory.
TOLERANCES = {"cpu": (0.15, 0.15), "cuda": (0.07, 0.12)}
MEMORY_TOLERANCE = 0.03


def device_steps(
    model: str,
    device: str,
    *,
    profile: str | None,
    shipped: str | None,
    seq_lens: str,
    batch: str,
    precision: str,
    recompute: bool,
    steps: str,
    rounds: str,
    threads: str | None,
    as_json: bool,
    output: str | None,
) -> int:
    """Train real steps on one device and hold time and memory against predictions; the exit status.

    Dropout is left out, on both sides. Steps whose times lie further apart than 15 % are not judged, and nothing
    passes by that: the status is then 1, as where a prediction is off.

    Parameters
    ----------
    model, device : str
    profile, shipped : str, optional
        A system that ``simllm calibrate --device`` wrote here, and one of the catalog; one of them is needed.
    seq_lens : str
        Lengths of a sequence, with commas between them.
    batch, precision, steps, rounds, threads : str
        As given on the command line.
    recompute : bool
        Time every case with its layers recomputed too.
    as_json, output
        Where the answer goes.
    """
    from simllm.hardware import load_cluster
    from simllm.models import Model
    from simllm.report.steps import skipped_report, steps_dict, steps_report
    from simllm.units import parse_seq_len
    from simllm.validation.measure.device import open_device
    from simllm.validation.step_timing import StepCase, compare_steps

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
    loaded = Model.load(model)
    cases = [
        StepCase(
            model=loaded,
            seq_len=parse_seq_len(length.strip(), "--seq-len"),
            batch=count(batch, "--micro-batch-size"),
            precision=precision,
            recompute=again,
        )
        for length in seq_lens.split(",")
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
