"""``simllm calibrate``: figures of profiles from measurements."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simllm.cli.options import Json, Overwrite, Plot, count
from simllm.cli.output import check_output, check_plot, emit, progress, write_file
from simllm.errors import InputError, unknown_name

if TYPE_CHECKING:
    from simllm.kernels.rows import SkippedRow

__all__ = ["COMMANDS", "collectives", "kernels", "machine", "runs"]


def machine(
    ctx: typer.Context,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="Measure this machine: cpu or cuda (its first GPU).")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The system to write, a YAML file.")
    ] = None,
    ranks: Annotated[
        str,
        typer.Option("--ranks", metavar="N", help="Also time collectives between N local processes (of cuda: GPUs)."),
    ] = "1",
    threads: Annotated[
        str | None,
        typer.Option("--threads", metavar="N", help="Threads of a process on cpu. Default: as PyTorch chooses."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small shapes, once: shows that it works, no profile to rely on.")
    ] = False,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Turn measurements into the figures of profiles.

    With --device the machine itself is measured: matmuls, attention, streaming kernels, launches, copies, the
    optimizer and, with --ranks, collectives. It takes minutes; raw measurements go to a file beside the output, and a
    run that was interrupted goes on from there. The system that is written works as --cluster everywhere.

    \b
    Examples:
      simllm calibrate --device cpu --threads 1 -o my-box.yaml
      simllm calibrate --device cuda -o my-gpu.yaml
      simllm estimate gpt2 --cluster my-box.yaml --gpus 1 --stack pytorch --precision fp32 \\
        --seq-len 512 --global-batch-size 2
    """
    if ctx.invoked_subcommand is not None:
        if device is not None:
            raise InputError(f"--device measures this machine; it does not go with `{ctx.invoked_subcommand}`")
        return
    if device is None or output is None:
        what = ", ".join(COMMANDS)
        missing = "--output" if device is not None else "a command or --device"
        raise InputError(f"simllm calibrate needs {missing}; commands: {what}; see simllm calibrate --help")
    from simllm.report.kernels import machine_report
    from simllm.validation.measure.run import calibrate_machine

    check_output(output)
    picture = check_plot(plot)
    processes = count(ranks, "--ranks", maximum=1024)
    with progress("measurements") as tick:
        found = calibrate_machine(
            device,
            Path(output),
            threads=None if threads is None else count(threads, "--threads", maximum=4096),
            ranks=processes,
            quick=quick,
            progress=tick,
            write=lambda path, text: write_file(str(path), text.encode(), "--output"),
        )
    if plot is not None:
        from simllm.report.kernel_plots import plot_kernel_calibration

        write_file(plot, plot_kernel_calibration(found.machine.fits, picture), "--plot")
    emit(found.to_dict, lambda: machine_report(found), as_json)


def collectives(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Output of nccl-tests or rccl-tests, or a table of collectives (CSV).")
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="The profile to write; a folder for several link classes."),
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="NAME",
            help="Where it ran: a system of the catalog or a YAML file. Default: what FILE says.",
        ),
    ] = None,
    collective: Annotated[
        str | None,
        typer.Option("--collective", metavar="OP", help="What was measured, where a log does not say."),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="N", help="Ranks, where a log does not list its devices.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="NAME", help="Fit this link class only. Default: all that were used."),
    ] = None,
    as_json: Json = False,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit the figures of links to measured collectives and write them as a profile.

    The profile is that of the link class the measurements ran over, with the figures that they can tell: the more
    operations, sizes and numbers of ranks, the more. All other figures stay those of the catalog. The picture shows
    measured against fitted bus bandwidth over size.

    \b
    Examples:
      simllm calibrate collectives all_reduce.log -o nvlink.yaml --plot residuals.png
      simllm calibrate collectives sweeps.csv --cluster dgx-h100 --link infiniband -o ib.yaml
    """
    from simllm.network import OPERATIONS
    from simllm.report.collectives import calibration_dict, calibration_report
    from simllm.validation.collective_rows import operation_name, read_rows
    from simllm.validation.link_fit import fit_links, measured_sweeps
    from simllm.validation.link_profile import link_yaml

    folder = os.path.isdir(output)
    if not folder:
        check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    if collective is not None and operation_name(collective) not in OPERATIONS:
        raise unknown_name("collective", collective, OPERATIONS)
    ranks = None if gpus is None else count(gpus, "--gpus")
    measured = measured_sweeps(read_rows(file, collective, ranks), cluster)
    with progress("link classes fitted") as tick:
        fits = fit_links(measured.sweeps, Path(file).name, link, tick)
    if len(fits) > 1 and not folder:
        names = ", ".join(fit.link.name for fit in fits)
        raise InputError(f"{file} holds measurements over {names}; give one of them as --link, or a folder as --output")
    written = {fit.link.name: str(Path(output) / f"{fit.link.name}.yaml") if folder else output for fit in fits}
    for path in written.values():
        check_output(path, overwrite=overwrite)
    if plot is not None:
        from simllm.report.collective_plots import plot_residuals

        write_file(plot, plot_residuals(fits, picture), "--plot")
    for fit in fits:
        write_file(written[fit.link.name], link_yaml(fit).encode(), "--output")
    emit(
        lambda: calibration_dict(fits, measured) | {"written": written},
        lambda: calibration_report(fits, measured, written),
        as_json,
    )


def runs(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Table of training runs (CSV).")],
    rounds: Annotated[
        str, typer.Option("--rounds", metavar="N", help="How often predictions are linearised anew.")
    ] = "2",
    write: Annotated[
        bool, typer.Option("--write", help="Write the values into the profiles in use. Default: print them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit what only whole training runs can teach: the constants of run_constants.yaml.

    They are few, physical and keyed by device or software, never by a model or a run; what runs do not tell stays near
    its prior. `simllm validate runs FILE --cross-validate` says how well runs are predicted that a fit has not seen.

    \b
    Example:
      simllm calibrate runs tests/published/training_runs.csv
    """
    from simllm.report.validation import constants_dict, constants_report
    from simllm.validation.run_constants import write_values
    from simllm.validation.run_fit import fitted_constants

    passes = count(rounds, "--rounds", maximum=10)
    with progress("passes over the runs") as tick:
        values = fitted_constants(file, passes, tick)
    written = [str(path) for path in write_values(values)] if write else []
    emit(lambda: constants_dict(values, written), lambda: constants_report(values, written), as_json)


def kernels(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Table of kernel timings (CSV).")],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The kernel profile to write; a folder for several devices."
        ),
    ],
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            metavar="NAME",
            help="Where all rows ran: a device of the catalog or a YAML file. Default: what FILE says.",
        ),
    ] = None,
    left_out: Annotated[
        bool,
        typer.Option(
            "--left-out/--no-left-out", help="Also state errors on shapes left out of the fit (five fits more a curve)."
        ),
    ] = True,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Fit the curves of kernel profiles to measured kernels.

    Curves of matmuls by precision, attention by implementation and direction, and streaming kernels by kind. A device
    of the catalog keeps what its profile says of libraries and of figures that are not measured. The picture shows
    fitted against measured times.

    \b
    Examples:
      simllm calibrate kernels tests/published/kernels.csv -o profiles/ --plot residuals.png
      simllm calibrate kernels mine.csv --accelerator my-card.yaml -o my-card-kernels.yaml
    """
    from simllm.hardware.accelerator import load_accelerator
    from simllm.kernels.calibrate import fit_kernels
    from simllm.kernels.write import kernel_yaml
    from simllm.report.kernels import kernel_calibration_dict, kernel_calibration_report
    from simllm.validation.kernels import NEEDED_COLUMNS
    from simllm.validation.table import read_table

    folder = os.path.isdir(output)
    if not folder:
        check_output(output)
    picture = check_plot(plot)
    device = None if accelerator is None else load_accelerator(accelerator)
    rows = [row.cells for row in read_table(file, [name for name in NEEDED_COLUMNS if name != "gpu" or not device])]
    with progress("devices fitted") as tick:
        fits = fit_kernels(rows, device=device, held_out=left_out, progress=tick)
    if not fits.profiles:
        raise InputError(f"{file} holds no row that a curve can be fitted to; {_first_reason(fits.skipped)}")
    if len(fits.profiles) > 1 and not folder:
        raise InputError(f"{file} holds measurements of {', '.join(fits.profiles)}; give a folder as --output")
    written = {name: str(Path(output) / f"{name}.yaml") if folder else output for name in fits.profiles}
    for path in written.values():
        check_output(path)
    if plot is not None:
        from simllm.report.kernel_plots import plot_kernel_calibration

        write_file(plot, plot_kernel_calibration(fits, picture), "--plot")
    for name, profile in fits.profiles.items():
        write_file(written[name], kernel_yaml(profile, Path(written[name]).stem).encode(), "--output")
    emit(
        lambda: kernel_calibration_dict(fits) | {"written": written},
        lambda: kernel_calibration_report(fits, written),
        as_json,
    )


def _first_reason(skipped: Sequence[SkippedRow]) -> str:
    return f"row {skipped[0].index + 1}: {skipped[0].reason}" if skipped else "it has no rows"


COMMANDS: dict[str, Callable[..., Any]] = {"collectives": collectives, "kernels": kernels, "runs": runs}
