"""``simllm collective``: the price of one collective, or of a sweep over sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from simllm.cli.options import ClusterName, Gpus, Json, Output, Overwrite, Plot, count, load_cluster, size_bytes
from simllm.cli.output import check_output, check_plot, emit, write_file
from simllm.errors import InputError

__all__ = ["collective"]


def collective(
    operation: Annotated[
        str,
        typer.Argument(
            metavar="OP", help="all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send_recv."
        ),
    ],
    size: Annotated[
        str,
        typer.Option("--size", metavar="S", help="Size as nccl-tests prints it, such as 256MB or 1GiB."),
    ],
    cluster: ClusterName,
    gpus: Gpus,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="N", help="Ranks that take part. Default: all.")
    ] = None,
    stride: Annotated[
        str, typer.Option("--stride", metavar="N", help="Distance between neighbours: tp for data parallelism.")
    ] = "1",
    concurrent: Annotated[
        str | None,
        typer.Option(
            "--concurrent",
            metavar="N",
            help="Groups of this shape that run at once in each domain and share its NICs. Default: as many as its "
            "GPUs make up, as the groups of a plan do.",
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", metavar="NAME", help="Force one algorithm. Default: the cheapest there is."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="All sizes from --min-size to --size, doubling, as nccl-tests runs them.")
    ] = False,
    min_size: Annotated[str, typer.Option("--min-size", metavar="S", help="Smallest size of the sweep.")] = "1KiB",
    measured: Annotated[
        str | None,
        typer.Option(
            "--measured",
            metavar="FILE",
            help="Table (CSV) or nccl-tests log: show beside a sweep what was measured on such a group.",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Price one collective, or a sweep over sizes.

    Sizes and bandwidths are those that nccl-tests prints. The wire limit is the busbw that the chosen algorithm would
    reach if its links ran at full rate and nothing else took time.

    \b
    Examples:
      simllm collective all_reduce --size 1GiB --cluster dgx-h100 --gpus 64
      simllm collective all_gather --size 1GiB --cluster dgx-h100 --gpus 512 --ranks 64 --stride 8
      simllm collective all_reduce --size 1GB --cluster dgx-a100 --gpus 64 --ranks 8 --stride 8 \\
        --concurrent 1
      simllm collective all_reduce --size 8GiB --cluster dgx-h100 --gpus 8 --sweep --plot busbw.png
    """
    from simllm import network
    from simllm.network import Group
    from simllm.report.collectives import collective_dict, collective_report, doubling_sizes

    check_output(output, overwrite=overwrite)
    picture = check_plot(plot, overwrite)
    last, first = size_bytes(size, "--size"), size_bytes(min_size, "--min-size")
    if sweep and first > last:
        raise InputError(f"--min-size={min_size} is more than --size={size}; a sweep goes up from the one to the other")
    if plot is not None and not sweep:
        raise InputError("--plot draws a sweep over sizes; add --sweep")
    if measured is not None and not sweep:
        raise InputError("--measured stands beside a sweep over sizes; add --sweep")
    where = load_cluster(cluster, gpus)
    step = count(stride, "--stride")
    members = len(range(0, where.num_gpus, step)) if ranks is None else count(ranks, "--ranks")
    together = None if concurrent is None else count(concurrent, "--concurrent")
    group = Group(size=members, stride=step, concurrent=together)
    if plot is not None and members == 1:
        raise InputError("--plot has nothing to draw: one rank alone exchanges nothing; give more --gpus or --ranks")
    costs = network.sweep(operation, doubling_sizes(first, last) if sweep else [last], where, group, algorithm)
    found = None
    if measured is not None:
        from simllm.validation.collective_rows import measured_series

        found = measured_series(measured, operation, where, group, algorithm)
    if plot is not None:
        from simllm.report.collective_plots import plot_collectives

        write_file(plot, plot_collectives(where, group, costs, picture, found or ()), "--plot")
    emit(
        lambda: collective_dict(where, group, costs, sweep, found or ()),
        lambda: collective_report(where, group, costs, found),
        as_json,
        output,
    )
