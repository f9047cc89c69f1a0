"""`simllm calibrate --device`: measure this machine and write its profiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simllm.errors import InputError
from simllm.kernels.fitting import require_scipy
from simllm.validation.link_fit import LinkFit, fit_links, measured_sweeps
from simllm.validation.link_profile import link_yaml
from simllm.validation.measure import collectives
from simllm.validation.measure.device import TorchDevice, open_device
from simllm.validation.measure.profiles import MachineFit, fit_machine, profile_texts
from simllm.validation.measure.raw import COLUMNS, RawFile, reduce_visits
from simllm.validation.measure.tasks import Grid, Task, grid_for, tasks_for
from simllm.validation.table import read_table

__all__ = ["Measured", "calibrate_machine"]

#: Passes over all kernels, and calls timed in each.
_VISITS, _SAMPLES = 4, 3
#: Seconds of the long run that shows the clocks it settles at, and the part of it that is looked at.
_SUSTAINED_S, _SETTLED = 12.0, 0.25
_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a calibration found and wrote.

    Attributes
    ----------
    device : TorchDevice
    machine : MachineFit
    links : tuple of LinkFit
        The link between ranks, where there were several.
    visits : int
        Measurements taken now; those of an earlier run are not taken again.
    points : int
        Kernels that were measured now or earlier.
    spread : float
        How far the visits of a kernel lie apart: the largest over the smallest less one, in the middle of the kernels.
    failed : mapping of str to str
        Kernels that this device or PyTorch cannot run, with what it said.
    written : tuple of Path
        The system first.
    """

    device: TorchDevice
    machine: MachineFit
    links: tuple[LinkFit, ...]
    visits: int
    points: int
    spread: float
    failed: Mapping[str, str]
    written: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys, SI units."""
        import msgspec

        return {
            "device": self.device.name,
            "library": self.device.library,
            "kernels": msgspec.to_builtins(self.machine.kernels),
            "links": [fit.to_dict() for fit in self.links],
            "measured_now": self.visits,
            "points": self.points,
            "spread": self.spread,
            "failed": dict(self.failed),
            "written": [str(path) for path in self.written],
        }


def calibrate_machine(
    kind: str,
    output: Path,
    *,
    threads: int | None = None,
    ranks: int = 1,
    quick: bool = False,
    grid: Grid | None = None,
    visits: int | None = None,
    long_run: bool = True,
    progress: Callable[[int, int], None] | None = None,
    write: Callable[[Path, str], None],
) -> Measured:
    """Measure this machine and write what was found as a system that every command takes as ``--cluster``.

    Raw measurements go to files beside the output as they are taken; a run that was interrupted goes on where it was.

    Parameters
    ----------
    kind : str
        ``cpu`` or ``cuda``.
    output : Path
        The YAML file of the system; accelerator, kernels, links and raw measurements lie beside it.
    threads : int, optional
        Of each process on the processor.
    ranks : int
        Processes (of ``cuda``: GPUs) between which collectives are measured; 1 for none.
    quick : bool
        A few small shapes once: shows that it works, no profile to rely on.
    grid : Grid, optional
        What to measure, instead.
    visits : int, optional
        Passes over all kernels.
    long_run : bool
        Whether the clocks of a long run are looked at; a quick measurement does not.
    progress : callable, optional
        Called with the measurements done and their number.
    write : callable
        Writes a text to a file, whole or not at all.

    Raises
    ------
    InputError
        No PyTorch, no such device, files of another device in the way, or ranks that fail.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output={output} must end in .yaml")
    require_scipy()
    device = open_device(kind, threads)
    if kind == "cuda" and ranks > device.torch.cuda.device_count():
        raise InputError(f"--ranks={ranks}: this machine has {device.torch.cuda.device_count()} GPUs")
    tasks = tasks_for(device, grid or grid_for(kind, quick))
    passes = visits or (1 if quick else _VISITS)
    points = collectives.points(collectives.SIZES[:4] if quick else collectives.SIZES) if ranks > 1 else []
    owner = {"gpu": device.name, "source": f"measured with {device.library} on {device.name}"}
    total = len(tasks) * passes + len(points)
    raw = RawFile(output.with_name(f"{output.stem}-measured.csv"), COLUMNS, owner)
    with raw.opened():
        before = len(raw.rows)
        failed = _visit(device, raw, tasks, passes, lambda done: progress and progress(done, total))
        if long_run and not quick:
            _run_long(device, raw)
        taken = len(raw.rows) - before
    rows = reduce_visits(raw.rows, least=device.disturbed)
    known = {task.key for task in tasks}
    rows = [row for row in rows if row["key"] in known or row["op"] == "sustained"]
    machine = fit_machine(device, rows, f"{output.stem}-accelerator")
    source = f"{owner['source']}, {raw.rows[-1]['date']}"
    folder, written = output.parent, [output]
    for name, text in profile_texts(machine, output.stem, device, ranks, source, None).items():
        write(folder / name, text)
        written.append(folder / name)
    links: tuple[LinkFit, ...] = ()
    if points:
        taken += _exchange(
            device, output, owner, ranks, points, lambda done: progress and progress(total - len(points) + done, total)
        )
        links = _fit_link(output, ranks)
        name = f"{output.stem}-link.yaml"
        write(folder / name, link_yaml(links[0]))
        written.append(folder / name)
        write(output, profile_texts(machine, output.stem, device, ranks, source, name)[output.name])
    return Measured(
        device=device,
        machine=machine,
        links=links,
        visits=taken,
        points=len(rows) + len(points),
        spread=statistics.median(float(row["spread"]) for row in rows),
        failed=failed,
        written=tuple(dict.fromkeys(written)),
    )


def _visit(
    device: TorchDevice, raw: RawFile, tasks: Sequence[Task], passes: int, tick: Callable[[int], object]
) -> dict[str, str]:
    """Every task so often; all tasks once before any twice, so that a disturbance does not hit one task alone."""
    taken = raw.visits
    failed: dict[str, str] = {}
    done = sum(min(taken[task.key], passes) for task in tasks)
    for number in range(passes):
        for task in tasks:
            if taken[task.key] > number or task.key in failed:
                continue
            try:
                times = device.time(task.make(device), _SAMPLES if device.kind == "cpu" else 3 * _SAMPLES)
            except (RuntimeError, NotImplementedError, TypeError) as error:  # what PyTorch says to what it cannot run
                failed[task.key] = " ".join(str(error).split())[:200]
                continue
            cells = {"library": device.library} | task.cells
            cells["library"] += "" if cells["library"] == device.library else f" {device.library}"
            raw.append(
                cells
                | {
                    "key": task.key,
                    "time_us": f"{device.typical(times) * 1e6:.6g}",
                    "spread": f"{max(times) / min(times) - 1:.3f}",
                    "date": _today(),
                }
            )
            done += 1
            tick(done)
    return failed


def _run_long(device: TorchDevice, raw: RawFile) -> None:
    """One matmul for many seconds: the rate that is left when the clocks have settled."""
    largest: dict[str, dict[str, str]] = {}
    for row in raw.rows:
        if row["op"] == "gemm" and row["notes"] == "forward":
            size = [int(row[name]) for name in "mnk"]
            best = largest.get(row["dtype"])
            if best is None or size[0] * size[1] * size[2] > int(best["m"]) * int(best["n"]) * int(best["k"]):
                largest[row["dtype"]] = row
    taken = raw.visits
    for precision, row in largest.items():
        key = f"sustained/{precision}"
        if taken[key]:
            continue
        cells = {name: row[name] for name in ("m", "n", "k", "dtype", "library", "direction")}
        task = next(task for task in tasks_for(device, _only(row)) if task.cells.get("notes") == "forward")
        call = task.make(device)
        start, times = time.perf_counter(), []
        while (elapsed := time.perf_counter() - start) < _SUSTAINED_S:
            times.append((elapsed, device.typical(device.time(call, _SAMPLES))))
        settled = [seconds for at, seconds in times if at > (1 - _SETTLED) * _SUSTAINED_S]
        raw.append(
            cells
            | {
                "op": "sustained",
                "key": key,
                "time_us": f"{device.typical(settled) * 1e6:.6g}",
                "notes": f"the last {_SETTLED:.0%} of {_SUSTAINED_S:g} s of this matmul without pause",
                "date": _today(),
            }
        )


def _only(row: Mapping[str, str]) -> Grid:
    return Grid(
        precisions=(row["dtype"],),
        attention_precision="fp32",
        matmul=((int(row["m"]), int(row["n"]), int(row["k"])),),
        attention=(),
        unfused=(),
        stream_elements=(),
        width=1,
        vocab=1,
    )


def _exchange(
    device: TorchDevice,
    output: Path,
    owner: Mapping[str, str],
    ranks: int,
    points: Sequence[tuple[str, int]],
    tick: Callable[[int], object],
) -> int:
    """Measure collectives that are not in their file yet; returns how many."""
    library = "NCCL" if device.kind == "cuda" else "gloo"
    mine = {"gpu": owner["gpu"], "source": owner["source"]}
    raw = RawFile(output.with_name(f"{output.stem}-collectives.csv"), collectives.COLUMNS, mine)
    with raw.opened():
        taken = raw.visits
        missing = [point for point in points if not taken[_point_key(ranks, *point)]]

        def arrived(operation: str, size: int, seconds: float) -> None:
            raw.append(
                {
                    "sweep": f"{operation} of {ranks}",
                    "system": output.stem,
                    "n_nodes": "1",
                    "n_gpus": str(ranks),
                    "collective": operation,
                    "message_bytes": str(size),
                    "time_us": f"{seconds * 1e6:.6g}",
                    "library": f"{library}, {device.library}",
                    "key": _point_key(ranks, operation, size),
                    "date": _today(),
                }
            )
            tick(len(points) - len(missing) + sum(raw.visits.values()) - sum(taken.values()))

        collectives.measure_collectives(
            device.kind, ranks, device.units if device.kind == "cpu" else 1, missing, _TIMEOUT_S, arrived
        )
    return len(missing)


def _point_key(ranks: int, operation: str, size: int) -> str:
    return f"{operation}/{ranks}/{size}"


def _fit_link(output: Path, ranks: int) -> tuple[LinkFit, ...]:
    name = f"{output.stem}-collectives.csv"
    table = [
        row for row in read_table(output.with_name(name), ("collective", "n_gpus")) if row.integer("n_gpus") == ranks
    ]
    return tuple(fit_links(measured_sweeps(table, str(output)).sweeps, name))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
