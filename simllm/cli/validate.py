"""``simllm validate``: predictions held against measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, Output, Overwrite, Plot, count
from simllm.cli.output import check_output, check_plot, emit, progress, write_file
from simllm.cli.validate_torch import torch

__all__ = ["COMMANDS", "collectives", "kernels", "runs", "torch"]


def runs(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Table of training runs (CSV).")],
    cross_validate: Annotated[
        bool,
        typer.Option(
            "--cross-validate",
            help="Also fit the run constants again without each eighth of the runs, each source, each publication, "
            "and predict those. Takes minutes.",
        ),
    ] = False,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also print the errors without each effect: what it buys.")
    ] = False,
    plot: Plot = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict every training run of a table and print the errors.

    No row is dropped: what a row does not say is assumed by a stated rule, and one that cannot be modelled is listed
    with its reason. The picture shows predicted against measured step times, and the errors of each source.

    \b
    Examples:
      simllm validate runs tests/published/training_runs.csv
      simllm validate runs tests/published/training_runs.csv --cross-validate --plot errors.png
    """
    from simllm.report.validation import validation_report
    from simllm.validation.runs import validate_runs

    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    with progress("runs predicted") as tick:
        report = validate_runs(file, progress=tick)
    if ablate:
        from simllm.validation.ablation import ablations

        with progress("effects left out") as tick:
            report = replace(report, ablations=ablations(file, report, tick))
    if cross_validate:
        from simllm.validation.run_fit import cross_validated

        with progress("passes over the runs") as tick:
            report = replace(report, cross_validation=cross_validated(file, tick))
    if plot is not None:
        from simllm.report.run_plots import plot_runs

        write_file(plot, plot_runs(report, picture), "--plot")
    emit(report.to_dict, lambda: validation_report(report), as_json, output)


def collectives(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Table of collectives (CSV), or output of nccl-tests or rccl-tests.")
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="NAME",
            help="Where all rows ran: a system of the catalog or a YAML file. Default: what FILE says.",
        ),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            "--cross-validate",
            metavar="K",
            help="Also fit the links again without each K-th part of the sweeps, and of the systems, and predict that.",
        ),
    ] = None,
    worst: Annotated[
        str | None,
        typer.Option(
            "--worst",
            metavar="N",
            help="Also list the N points farthest off with what the table shows against them, and how far runs of one "
            "configuration differ.",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict every collective of a table and print the errors.

    No row is dropped: what a row does not say about its machine is assumed by a stated rule, and one that cannot be
    priced is listed with its reason.

    \b
    Examples:
      simllm validate collectives tests/published/collectives.csv
      simllm validate collectives tests/published/collectives.csv --cross-validate 10
      simllm validate collectives tests/published/collectives.csv --worst 20
    """
    from simllm.report.validation import collective_validation_report
    from simllm.validation.collectives import validate_collectives

    check_output(output, overwrite=overwrite)
    parts = None if folds is None else count(folds, "--cross-validate", maximum=1000)
    shown = None if worst is None else count(worst, "--worst", maximum=100_000)
    with progress("collectives priced") as tick:
        report = validate_collectives(file, cluster, progress=tick)
    if parts is not None:
        from simllm.validation.collective_rows import read_rows
        from simllm.validation.cross_validation import cross_validate
        from simllm.validation.link_fit import measured_sweeps

        with progress("parts fitted again") as tick:
            errors = cross_validate(measured_sweeps(read_rows(file), cluster).sweeps, parts, tick)
        report = replace(report, cross_validation=errors)
    if shown is not None:
        from simllm.validation.noise import farthest_off, noise_floor

        report = replace(report, noise_floor=noise_floor(report.rows), farthest=tuple(farthest_off(report.rows, shown)))
    emit(report.to_dict, lambda: collective_validation_report(report), as_json, output)


def kernels(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Table of kernel timings (CSV).")],
    left_out: Annotated[
        bool,
        typer.Option(
            "--left-out/--no-left-out",
            help="Also fit every curve again without each fifth of its shapes, and predict those.",
        ),
    ] = True,
    as_json: Json = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Predict every kernel timing of a table and print the errors.

    Errors of the shipped curves and, beside them, on shapes left out of the fit. No row is dropped; one that cannot be
    priced is listed with its reason.

    \b
    Example:
      simllm validate kernels tests/published/kernels.csv --plot kernels.png
    """
    from simllm.report.kernels import kernel_validation_report
    from simllm.validation.kernels import validate_kernels

    check_output(output)
    picture = check_plot(plot)
    with progress("devices fitted again") as tick:
        report = validate_kernels(file, left_out=left_out, progress=tick)
    if plot is not None:
        from simllm.report.kernel_plots import plot_kernel_validation

        write_file(plot, plot_kernel_validation(report, picture), "--plot")
    emit(report.to_dict, lambda: kernel_validation_report(report), as_json, output)


COMMANDS: dict[str, Callable[..., Any]] = {
    "runs": runs,
    "collectives": collectives,
    "kernels": kernels,
    "torch": torch,
}
