"""``simllm calibrate``: figures of profiles from measurements."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, Overwrite, Plot, count
from simllm.cli.output import check_output, check_plot, emit, progress, write_file
from simllm.errors import InputError, unknown_name

__all__ = ["COMMANDS", "collectives", "runs"]


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
    from simllm.validation.run_fit import RunFit

    passes = count(rounds, "--rounds", maximum=10)
    with progress("passes over the runs") as tick:
        values = RunFit(file, tick).fitted(passes)
    written = [str(path) for path in write_values(values)] if write else []
    emit(lambda: constants_dict(values, written), lambda: constants_report(values, written), as_json)


COMMANDS: dict[str, Callable[..., Any]] = {"collectives": collectives, "runs": runs}
