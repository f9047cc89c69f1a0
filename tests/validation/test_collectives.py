"""Tables of collectives and logs of nccl-tests: what is read from them, what is priced, what the errors are."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import load_cluster, make_cluster
from simllm.hardware.links import Link, load_link
from simllm.hardware.profiles import check_profile, figures_of, parse_yaml, profiles_dir
from simllm.network import Group, bus_factor, price
from simllm.network.calibrate import FIT, calibrate
from simllm.network.fabric import fabric
from simllm.network.measurements import Sweep
from simllm.validation.collective_rows import measured_series, measurement, operation_name, read_rows
from simllm.validation.collectives import REGIMES, CollectiveReport, regime, validate_collectives
from simllm.validation.cross_validation import Prediction, cross_validate, elsewhere
from simllm.validation.link_fit import fit_links, measured_sweeps
from simllm.validation.link_profile import link_yaml
from simllm.validation.nccl_log import log_rows, parse_log
from simllm.validation.row_cluster import place
from simllm.validation.table import Row

PUBLISHED = Path(__file__).parents[1] / "published"
TABLE = PUBLISHED / "collectives.csv"


# -- logs as the programs print them -------------------------------------------------------------------------------

NOW = """\
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
OLD = """\
#                                                     out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
OLD_GATHER = OLD.replace("   redop ", " ")


def devices(hosts: Sequence[str], per_host: int, gpu: str, one_process: bool = False) -> str:
    lines = []
    for rank in range(len(hosts) * per_host):
        node, device = divmod(rank, per_host)
        pid = 4000 + (node if one_process else rank)
        where = f"on {hosts[node]:>10s} device {device:2d} [0x{0x0A + device:02x}]"
        lines.append(f"#  Rank {rank:2d} Group  0 Pid {pid:6d} {where} {gpu}")
    return "\n".join(["# Using devices", *lines, "#", ""])


def rows(operation: str, ranks: int, points: Sequence[tuple[int, float]], redop: str = "sum", root: str = "-1") -> str:
    lines = []
    for size, time_us in points:
        algbw = size / time_us / 1e3
        cells = f"  {time_us:7.2f}  {algbw:6.2f}  {algbw * bus_factor(operation, ranks):6.2f}  {0:5d}"
        lines.append(f"{size:12d}  {size // 4:12d}  {'float':>8s}  {redop:>6s}  {root:>6s}{cells}{cells}")
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 123.4", "#", ""])


SETTINGS = (
    "# nThread 1 nGpus 1 minBytes 8 maxBytes 8589934592 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1\n#\n"
)
H100 = devices(["node1"], 8, "NVIDIA H100 80GB HBM3")
POINTS = [(1024, 16.5), (1048576, 28.9), (2**30, 4130.0)]


def test_log_of_now() -> None:
    text = "# nccl-tests version 2.17.1 nccl-headers=22703 nccl-library=22703\n"
    text += "# Collective test starting: all_reduce_perf\n" + SETTINGS + H100 + NOW + rows("all_reduce", 8, POINTS)
    (run,) = parse_log(text + "# Collective test concluded: all_reduce_perf\n")
    assert (run.collective, run.ranks, run.nodes, run.processes) == ("all_reduce", 8, 1, 8)
    assert run.gpu == "NVIDIA H100 80GB HBM3"
    assert [(size, round(seconds * 1e6, 2)) for _, size, seconds in run.points] == [
        (1024, 16.5),
        (1048576, 28.9),
        (2**30, 4130.0),
    ]
    assert text.splitlines()[run.points[0][0] - 1].split()[0] == "1024"


def test_log_of_the_columns_of_old() -> None:
    """NCCL-tests of 2020: no root, an error instead of #wrong; an all-gather without redop."""
    reduce = (
        "           8             2   float     sum    33.50    0.00    0.00  2e-07    32.56    0.00    0.00  0e+00\n"
    )
    gather = "        4096           128   float    41.25    0.10    0.09  0e+00    40.11    0.10    0.09  0e+00\n"
    head = SETTINGS + devices(["a0001", "a0002"], 4, "A100-SXM4-40GB").replace(" Group  0", "")
    first, second = parse_log(
        "all_reduce_perf -b 8\n" + head + OLD + reduce + "all_gather_perf -b 8\n" + head + OLD_GATHER + gather
    )
    assert (first.collective, first.ranks, first.nodes, first.points[0][1:]) == ("all_reduce", 8, 2, (8, 33.5e-6))
    assert (second.collective, second.nodes, second.points[0][1:]) == ("all_gather", 2, (4096, 41.25e-6))


def test_log_with_an_empty_column() -> None:
    """The all-to-all of 2021 announces a redop and leaves it out, and its smallest sizes round down to nothing."""
    text = SETTINGS + OLD
    text += (
        "           0             0   float             1.63    0.00    0.00    N/A     1.38    0.00    0.00    N/A\n"
    )
    text += (
        "     8388608        262144   float            121.1   69.28   60.62    N/A    120.6   69.56   60.87    N/A\n"
    )
    (run,) = parse_log("./alltoall_perf -g 8\n" + text.replace("nGpus 1", "nGpus 8"))
    assert (run.collective, run.ranks) == ("all_to_all", 8)
    assert [(size, round(seconds * 1e6, 2)) for _, size, seconds in run.points] == [(8388608, 121.1)]


def test_log_of_rccl() -> None:
    text = """\
# nThread: 1 nGpus: 8 minBytes: 8 maxBytes: 17179869184 step: 2(factor) warmupIters: 5 iters: 20 validation: 1
#
rccl-tests: Version develop:83d38d9
# Using devices
#   Rank  0 Pid  91203 on  tw012 device  0 [0000:0c:00.0] AMD Instinct MI300X
#   Rank  1 Pid  91203 on  tw012 device  1 [0000:22:00.0] AMD Instinct MI300X
"""
    text += NOW + rows("all_reduce", 2, [(2**28, 6710.9)])
    (run,) = parse_log(text)
    assert (run.ranks, run.processes, run.gpu, run.collective) == (2, 1, "AMD Instinct MI300X", "all_reduce")
    (row,) = log_rows(text, "rccl.log")
    assert measurement(row).group.ranks_per_process == 2


@pytest.mark.parametrize("prefix", ["[1,0]<stdout>:", "    [1,0]<stdout>: ", "0: ", "    "])
def test_log_behind_a_launcher(prefix: str) -> None:
    text = "all_reduce_perf\n" + SETTINGS + H100 + NOW + rows("all_reduce", 8, POINTS)
    noise = "node1:4000:4000 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>\nNCCL version 2.27.3+cuda12.9\n"
    lines = [prefix + line for line in (noise + text).splitlines()]
    lines.insert(-4, f"{prefix}node1:4000:4311 [0] NCCL INFO comm 0x55d0 rank 0 nranks 8 cudaDev 0 - Abort COMPLETE")
    (run,) = parse_log("\n".join(lines))
    assert len(run.points) == 3
    assert (run.library, run.ranks) == ("NCCL 2.27.3", 8)


@pytest.mark.parametrize(
    ("operation", "redop", "root", "told"),
    [
        ("all_reduce", "sum", "-1", "all_reduce"),
        ("reduce_scatter", "sum", "-1", "reduce_scatter"),
        ("broadcast", "none", "0", "broadcast"),
        ("send_recv", "none", "-1", "send_recv"),
        ("all_gather", "none", "-1", ""),  # an all-to-all prints the same
        ("all_to_all", "none", "-1", ""),
    ],
)
def test_collective_from_the_columns(operation: str, redop: str, root: str, told: str) -> None:
    text = SETTINGS + H100 + NOW + rows(operation, 8, POINTS, redop, root)
    assert parse_log(text)[0].collective == told
    if told:
        assert {row.text("collective") for row in log_rows(text, "x")} == {told}
    else:
        with pytest.raises(InputError, match=r"which collective table 1 is of; give --collective"):
            log_rows(text, "x")
        assert {row.text("collective") for row in log_rows(text, "x", collective=operation)} == {operation}


def test_collective_from_the_name_of_the_log() -> None:
    text = SETTINGS + H100 + NOW + rows("all_gather", 8, POINTS, "none")
    row = log_rows(text, "nccl_allgather.log")[0]
    assert row.text("collective") == "all_gather"
    assert row.assumptions == ["the log does not say which collective it is of: all_gather, by its name"]


def test_settings_of_one_process_are_not_the_ranks() -> None:
    """Under MPI nGpus is that of a process; a log without the list of devices does not say how many there were."""
    text = "all_reduce_perf_mpi\n" + SETTINGS + "# Using devices\n" + NOW + rows("all_reduce", 8, POINTS)
    assert parse_log(text)[0].ranks == 0
    four_each = text.replace("nGpus 1", "nGpus 4")
    assert parse_log(four_each)[0].ranks == 0
    assert parse_log(text.replace("nGpus 1", "nGpus 8"))[0].ranks == 8


def test_log_of_several_runs() -> None:
    """Four GPUs of a node, then two nodes; the name of the first program is not that of the second."""
    one = (
        "./build/alltoall_perf -b 8 -e 8G -f 2 -g 4\n" + SETTINGS + devices(["n1"], 4, "NVIDIA H200", one_process=True)
    )
    two = SETTINGS + devices(["n1", "n2"], 8, "NVIDIA H200")
    text = one + NOW + rows("all_to_all", 4, POINTS, "none") + two + NOW + rows("all_reduce", 16, POINTS)
    runs = parse_log(text)
    assert [(run.collective, run.ranks, run.nodes, run.processes) for run in runs] == [
        ("all_to_all", 4, 1, 1),
        ("all_reduce", 16, 2, 16),
    ]
    found = measured_sweeps(log_rows(text, "h200.log"))
    assert [(s.operation, s.group.size, s.cluster.num_nodes) for s in found.sweeps] == [
        ("all_to_all", 4, 1),
        ("all_reduce", 16, 2),
    ]
    assert "infiniband with 400 GB/s a node" in found.assumptions[-1]


def test_log_without_devices_needs_to_be_told() -> None:
    text = "all_reduce_perf\n" + NOW + rows("all_reduce", 8, POINTS)
    with pytest.raises(InputError, match="does not list the devices of table 1; give --gpus"):
        log_rows(text, "x")
    assert log_rows(text, "x", gpus=8)[0].integer("n_gpus") == 8


def test_sizes_that_round_to_nothing_are_no_points() -> None:
    text = (
        "all_gather_perf\n" + SETTINGS + H100 + NOW + rows("all_gather", 8, [(0, 0.16), (0, 0.16), (32, 9.1)], "none")
    )
    assert [size for _, size, _ in parse_log(text)[0].points] == [32]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\nworld\n", "no table of nccl-tests"),
        (SETTINGS + H100, "no table of nccl-tests"),
        (SETTINGS + H100 + NOW, "no row with a size above zero"),
        (SETTINGS + H100 + NOW + rows("all_reduce", 8, [(0, 0.1)]), "no row with a size above zero"),
        (SETTINGS + H100 + NOW + rows("all_reduce", 8, [(-8, 10.0)]), "size=-8 must be above zero"),
        (
            SETTINGS + H100 + NOW + rows("all_reduce", 8, [(8, 10.0)]).replace("10.00", " nan "),
            "time=nan must be above",
        ),
    ],
)
def test_log_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_log(text, "my.log")


@given(
    times=st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30),
    ranks=st.sampled_from([2, 4, 8, 16]),
    operation=st.sampled_from(["all_reduce", "reduce_scatter"]),
)
def test_every_printed_row_is_read(times: list[float], ranks: int, operation: str) -> None:
    points = [(8 << index, time) for index, time in enumerate(times)]
    text = (
        f"{operation}_perf\n" + SETTINGS + devices(["n"], ranks, "NVIDIA H100") + NOW + rows(operation, ranks, points)
    )
    (run,) = parse_log(text)
    assert [size for _, size, _ in run.points] == [size for size, _ in points]
    for (_, time_us), (_, _, seconds) in zip(points, run.points, strict=True):
        assert seconds * 1e6 == pytest.approx(time_us, abs=0.006)


STRANGE = "# Out of bounds values : 0 OK\n# nThread 1 nGpus 0 minBytes 8\nsum 1 2 3 4 5 6\n8 2 float\n1 2 3 4 5 6 7\n"
LINES = st.sampled_from((STRANGE + NOW + OLD + devices(["n"], 2, "H100") + rows("all_reduce", 8, POINTS)).splitlines())


@given(st.lists(LINES | st.text(max_size=60), max_size=25))
def test_no_text_breaks_the_reader(lines: list[str]) -> None:
    runs = []
    with suppress(InputError):
        runs = parse_log("\n".join(lines))
        log_rows("\n".join(lines), "x")
    assert all(size > 0 and seconds > 0 for run in runs for _, size, seconds in run.points)


# -- machines ----------------------------------------------------------------------------------------------------------


#: Machines whose own times say that their library was an early one (published_systems.yaml); no description says so.
EARLY_LIBRARY = {
    "1 node 8xA100-class (Galvatron profiling machine)": "nvlink3-nccl-2-10",
    "1 node 4xA100 NVLink3 (fully connected)": "nvlink3-nccl-2-10",
}


def test_words_of_published_systems_mean_what_their_description_says() -> None:
    """The reader of names against the description by hand of every published system: the same links and shares."""
    table = (PUBLISHED / "collectives_systems.csv").open(encoding="utf-8", newline="")
    described = {row["system"]: row for row in csv.DictReader(table) if row["accelerator"]}
    seen = {}
    for row in csv.DictReader(TABLE.open(encoding="utf-8", newline="")):
        system = described.get(row["system"])
        if system and row["n_nodes"] and row["n_gpus"] and (row["n_nodes"] == "1.0" or system["scaleout_link"]):
            seen[row["system"], row["gpu"], int(float(row["n_nodes"])), int(float(row["n_gpus"]))] = system
    for (name, gpu, nodes, ranks), system in seen.items():
        network, per_node = system["scaleout_GBps_per_node"], int(system["gpus_per_node"])
        cluster = make_cluster(
            accelerator=system["accelerator"],
            num_gpus=nodes * per_node,
            gpus_per_node=per_node,
            domain_gpus=int(system["domain_gpus"]),
            scaleout_bandwidth_per_node=float(network) * 1e9 if network else None,
            scaleout_link=system["scaleout_link"] or None,
        )
        if system["peer_gpus"] and ranks > int(system["peer_gpus"]):
            cluster = replace(cluster, scaleup_link="host-staged")
        if name in EARLY_LIBRARY:
            cluster = replace(cluster, scaleup_link=EARLY_LIBRARY[name])
        stride = per_node // (ranks // nodes) if nodes > 1 else 1
        found = place(system=name, gpu=gpu, nodes=nodes, ranks=ranks)
        assert fabric(found.cluster, found.group) == fabric(cluster, Group(size=ranks, stride=stride)), name
    assert len(seen) > 70


@pytest.mark.parametrize(
    ("system", "gpu", "nodes", "ranks", "link", "node_bandwidth"),
    [
        ("dgx-h100", "", 4, 32, "infiniband", 400e9),
        ("two p5.48xlarge", "", 2, 16, "efa", 400e9),
        ("2 nodes 8xH100, 4xNDR400", "H100", 2, 16, "infiniband", 200e9),
        ("4x DGX A100 (4xHDR200)", "A100", 4, 32, "infiniband", 100e9),  # not the eight ports of the catalog's
        ("boxes of 8xMI300X, 8x bnxt_re 400G RoCE", "", 2, 16, "roce", 400e9),
        ("8xV100-SXM2-32GB, 1x 100GbE", "V100-SXM2-32GB", 2, 16, "ethernet", 12.5e9),
        ("", "NVIDIA H100 80GB HBM3", 2, 16, "infiniband", 400e9),
        ("", "AMD Instinct MI300X VF", 2, 16, "roce", 400e9),
    ],
)
def test_network_of_a_row(system: str, gpu: str, nodes: int, ranks: int, link: str, node_bandwidth: float) -> None:
    cluster = place(system=system, gpu=gpu, nodes=nodes, ranks=ranks).cluster
    assert (cluster.scaleout_link, cluster.scaleout_bandwidth_per_node) == (link, node_bandwidth)


def test_what_is_not_stated_is_said() -> None:
    assumed = place(system="", gpu="H100-class", nodes=None, ranks=16).assumptions
    assert assumed == (
        "gpu='H100-class' is taken as h100-sxm",
        "gpus_per_node is not stated: 8, as in dgx-h100",
        "n_nodes is not stated: 2, as the GPUs fill nodes of 8",
        "the network is not stated: infiniband with 400 GB/s a node, as in the device's reference system",
    )
    assert place(system="dgx-h100", gpu="", nodes=2, ranks=None).assumptions == (
        "n_gpus is not stated: 16, all of the nodes",
    )


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"gpu": "", "system": "somewhere"}, "gpu is not stated"),
        ({"gpu": "RTX 2080Ti"}, "'RTX 2080Ti' is no device of the catalog"),
        ({"gpu": "H100/MI300X"}, "is no device of the catalog .*, or one of several"),
        ({"system": "dgx-a100"}, "system=dgx-a100 has a100-sxm-80gb, but the row's gpu is h100-sxm"),
        ({"nodes": 2, "ranks": 17, "cluster": "dgx-h100"}, "n_gpus=17 is more than 2 nodes of 8 GPUs hold"),
        ({"nodes": 4, "ranks": 2}, "n_gpus=2 is less than one for each of n_nodes=4"),
        ({"nodes": None, "ranks": None}, "n_gpus is not stated"),
        ({"cluster": "tinybox-green", "nodes": 2, "ranks": 12}, "num_gpus=12 is too many"),
        ({"cluster": "dgx-h10"}, "did you mean dgx-h100"),
    ],
)
def test_machine_that_cannot_be(told: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        place(**({"system": "", "gpu": "H100", "nodes": 1, "ranks": 8} | told))


@given(ranks=st.integers(1, 64), nodes=st.integers(1, 8))
def test_ranks_always_fit_their_nodes(ranks: int, nodes: int) -> None:
    try:
        found = place(system="", gpu="H100", nodes=nodes, ranks=ranks)
    except InputError:
        assert ranks < nodes
        return
    assert (found.group.size - 1) * found.group.stride < found.cluster.num_gpus
    assert found.cluster.num_nodes == nodes


# -- validation --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def published() -> CollectiveReport:
    return validate_collectives(TABLE)


def test_no_row_is_dropped() -> None:
    report = published()
    with TABLE.open(encoding="utf-8", newline="") as stream:
        given = list(csv.DictReader(stream))
    assert len(report.rows) == len(given) == 2904
    assert [row.id.split("/")[1] for row in report.rows] == [row["sweep"] for row in given]
    assert len({row.id for row in report.rows}) == 2904
    for result, row in zip(report.rows, given, strict=True):
        assert (result.status == "ok") == (result.reason == "") == (result.predicted_time_s is not None)
        if row["usable"] != "True":
            assert result.status == "unsupported"
            assert "not usable" in result.reason
    assert sum(row.status == "ok" for row in report.rows) >= 2360


def test_rows_are_priced_as_the_network_does() -> None:
    row = next(r for r in published().rows if r.system == "8 nodes DGX H100 (8xNDR400)" and r.size_bytes == 2**30)
    cost = price("all_reduce", 2**30, load_cluster("dgx-h100", 64), Group(size=64), "nvls_tree")
    assert (row.predicted_time_s, row.algorithm, row.bottleneck) == (cost.time_s, cost.algorithm, cost.bottleneck)
    assert row.predicted_busbw_bytes_per_s == cost.busbw
    assert row.measured_busbw_bytes_per_s == pytest.approx(2**30 / row.measured_time_s * 2 * 63 / 64)
    assert "protocol=Simple was forced; the cheapest one is priced" in row.assumptions


def test_errors_are_counted_over_the_priced_rows() -> None:
    report = published()
    summary = report.summary
    ratios = [r.predicted_time_s / r.measured_time_s - 1 for r in report.rows if r.status == "ok"]
    overall = summary["overall"]
    assert overall["count"] == summary["ok"] == len(ratios)
    assert overall["mean_absolute_percentage_error"] == pytest.approx(100 * sum(map(abs, ratios)) / len(ratios))
    assert overall["bias"] == pytest.approx(100 * sum(ratios) / len(ratios))
    assert list(summary["regime"]) == [name for name, *_ in REGIMES]
    for group in ("regime", "machine", "system", "collective", "gpu"):
        assert sum(score["count"] for score in summary[group].values()) == len(ratios)


def test_errors_on_published_collectives() -> None:
    by_regime = published().summary["regime"]
    for name, median, p90 in (("64 MB and more", 4, 15), ("64 KB to 64 MB", 9, 60), ("below 64 KB", 6, 30)):
        assert by_regime[name]["median_absolute_percentage_error"] < median
        assert by_regime[name]["p90_absolute_percentage_error"] < p90


@given(st.floats(1, 1e12))
def test_every_size_has_one_regime(size: float) -> None:
    names = [name for name, *_ in REGIMES]
    assert regime(size) in names
    assert names.index(regime(size)) >= names.index(regime(2 * size))


CELLS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1",
        "2",
        "8",
        "16.0",
        "1e30",
        "nan",
        "inf",
        "1048576",
        "True",
        "H100",
        "A100-class",
        "dgx-h100",
        "x",
        "all_reduce",
        "alltoall",
        "NVLSTree",
        "ring",
        "2 nodes 8xH100, 8xNDR400",
        "8x0G RoCE",
        "0xH100",
        "infiniband",
    ]
)
COLUMNS = [
    "collective",
    "n_gpus",
    "n_nodes",
    "message_bytes",
    "time_us",
    "busbw_GBps",
    "system",
    "gpu",
    "algorithm",
    "usable",
    "gpus_per_node",
    "domain_gpus",
    "scaleout_link",
    "scaleout_GBps_per_node",
]


@given(st.fixed_dictionaries(dict.fromkeys(COLUMNS, CELLS)))
@settings(max_examples=300, deadline=None)
def test_no_row_breaks_the_validation(cells: dict[str, str]) -> None:
    good = {"collective": "all_reduce", "n_gpus": "8", "n_nodes": "1", "message_bytes": "1048576", "time_us": "30"}
    for wrong in (cells, good | {"gpu": "H100"} | dict(list(cells.items())[6:])):
        with suppress(InputError):
            assert measurement(Row(line=2, cells=wrong)).price().time_s >= 0


def table(path: Path, *rows: dict[str, str]) -> Path:
    base = {
        "collective": "all_reduce",
        "n_gpus": "8",
        "message_bytes": "1048576",
        "time_us": "30",
        "gpu": "H100",
        "n_nodes": "1",
    }
    rows = tuple(base | row for row in rows)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"message_bytes": "0"}, "message_bytes=0 must be above zero"),
        ({"message_bytes": "-4"}, "message_bytes=-4 must be above zero"),
        ({"message_bytes": ""}, "message_bytes is not stated"),
        ({"message_bytes": "big"}, "message_bytes='big' is not a number"),
        ({"time_us": "0"}, "time_us=0 must be above zero"),
        ({"time_us": ""}, "time_us is not stated, and neither is a bandwidth"),
        ({"time_us": "nan"}, "time_us=nan must be above zero and finite"),
        ({"collective": "all_redcue"}, "collective=all_redcue is not priced; priced are all_reduce"),
        ({"algorithm": "DeepEP"}, "algorithm=DeepEP is not priced; priced are ring"),
        ({"n_gpus": "1"}, "one rank alone has nothing to exchange"),
        ({"n_gpus": "7.5"}, "n_gpus='7.5' is not a whole number"),
        ({"n_gpus": "1e99"}, "n_gpus=1e99 must be from 1 to"),
        ({"gpu": "abacus"}, "gpu='abacus' is no device of the catalog"),
        ({"usable": "False", "notes": "broken cable"}, "not usable: broken cable"),
        ({"scaleout_link": "string", "n_nodes": "2", "n_gpus": "16"}, "unknown link class 'string'"),
    ],
)
def test_row_that_cannot_be_priced(tmp_path: Path, cells: dict[str, str], said: str) -> None:
    good, bad = validate_collectives(table(tmp_path / "t.csv", {}, cells)).rows
    assert good.status == "ok"
    assert bad.status == "unsupported"
    assert said in bad.reason


def test_columns_of_ones_own_describe_the_machine(tmp_path: Path) -> None:
    own = {"n_nodes": "2", "n_gpus": "8", "gpus_per_node": "4", "scaleout_link": "roce", "scaleout_GBps_per_node": "25"}
    found = measured_sweeps(read_rows(table(tmp_path / "t.csv", own))).sweeps[0]
    cluster = found.cluster
    assert (cluster.gpus_per_node, cluster.scaleout_link, cluster.scaleout_bandwidth_per_node) == (4, "roce", 25e9)
    row = validate_collectives(tmp_path / "t.csv").rows[0]
    assert (row.bottleneck, row.assumptions) == ("roce", ())


def test_cluster_overrides_what_rows_say(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", {"gpu": "abacus"})
    row = validate_collectives(file, cluster="dgx-b200").rows[0]
    assert row.predicted_time_s == price("all_reduce", 2**20, load_cluster("dgx-b200", 8), Group(size=8)).time_s


def test_time_from_a_bandwidth(tmp_path: Path) -> None:
    stated = {"time_us": "", "busbw_GBps": "350"}
    row = validate_collectives(table(tmp_path / "t.csv", {"message_bytes": "1e9"} | stated)).rows[0]
    assert row.measured_time_s == pytest.approx(1e9 * 1.75 / 350e9)
    assert row.assumptions == ("the measured time follows from busbw_GBps",)


def test_log_is_a_table_too(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    file.write_text("all_reduce_perf\n" + SETTINGS + H100 + NOW + rows("all_reduce", 8, POINTS))
    report = validate_collectives(file)
    assert [row.status for row in report.rows] == ["ok"] * 3
    assert report.rows[2].measured_busbw_bytes_per_s == pytest.approx(2**30 / 4130e-6 * 1.75)
    assert (
        report.rows[2].predicted_time_s == price("all_reduce", 2**30, load_cluster("dgx-h100", 8), Group(size=8)).time_s
    )


@pytest.mark.parametrize("name", ["alltoall", "AlltoAll", "all-to-all", "all_to_all"])
def test_names_of_operations(name: str) -> None:
    assert operation_name(name) == "all_to_all"


def test_measured_series_are_of_such_groups_only() -> None:
    cluster = load_cluster("dgx-h100", 64)
    series = measured_series(TABLE, "all_reduce", cluster, Group(size=64))
    assert [found.label for found in series] == ["8 nodes DGX H100 (8xNDR400)"]
    assert list(series[0].sizes_bytes) == sorted(series[0].sizes_bytes)
    assert measured_series(TABLE, "all_reduce", cluster, Group(size=64), "ring") == []
    assert measured_series(TABLE, "all_reduce", cluster, Group(size=8, stride=8)) == []
    one_node = measured_series(TABLE, "all_gather", load_cluster("dgx-h100", 8), Group(size=8))
    assert [found.label for found in one_node] == ["1 node HGX H100"]  # not the H200 with the same links


# -- calibration -------------------------------------------------------------------------------------------------------


def synthetic(link_name: str, change: dict[str, float]) -> tuple[str, dict[str, float]]:
    """A log of a machine whose link has other figures than the catalog's."""
    import numpy as np

    from simllm.network.price import choices, fastest

    link = load_link(link_name)
    for path, value in change.items():
        part, name = path.split(".")
        figure = msgspec.structs.replace(getattr(getattr(link, part), name), value=value)
        link = msgspec.structs.replace(link, **{part: msgspec.structs.replace(getattr(link, part), **{name: figure})})
    sizes = [2**n for n in range(10, 33)]
    text = ""
    for operation, redop in (("all_gather", "none"), ("all_reduce", "sum")):
        for ranks in (2, 4, 8):
            view = fabric(load_cluster("dgx-h100", 8), Group(size=ranks))
            times = fastest(choices(operation, replace(view, up=link)), np.asarray(sizes, dtype=float)) * 1e6
            text += f"{operation}_perf\n" + SETTINGS + devices(["n1"], ranks, "NVIDIA H100 80GB HBM3") + NOW
            text += rows(operation, ranks, list(zip(sizes, times.tolist(), strict=True)), redop)
    return text, change


def test_calibration_finds_the_figures_of_a_machine() -> None:
    text, truth = synthetic("nvlink4", {"ring.efficiency": 0.7, "ring.launch": 9.0, "switch.efficiency": 0.6})
    (fit,) = fit_links(measured_sweeps(log_rows(text, "mine.log")).sweeps, "mine.log")
    data = fit.to_dict()
    assert data["name"] == "nvlink4"
    assert data["points"] == 6 * 23
    assert data["median_absolute_percentage_error"] < 0.5
    assert data["p90_absolute_percentage_error"] < 1.5
    figures = figures_of(fit.link)
    for path, value in truth.items():
        assert figures[path].value == pytest.approx(value, rel=0.05), path
        assert figures[path].source == f"{FIT} to mine.log, 138 points"
        assert figures[path].basis == "measured"
    # No all-to-all and no send/receive was measured: their figures are those of the catalog.
    before = figures_of(fit.before)
    for path in before:
        assert path in fit.paths or figures[path] == before[path]
    assert not any(path.startswith(("all_to_all", "p2p")) for path in fit.paths)


def test_a_disturbed_point_is_not_fitted() -> None:
    """What took longer than a larger message is judged, and moves no figure."""
    text, _ = synthetic("nvlink4", {"ring.efficiency": 0.7})
    clean = measured_sweeps(log_rows(text, "mine.log")).sweeps
    pause = 5
    assert clean[0].times_s[pause + 1] > clean[0].times_s[pause]
    times = [2 * time if i == pause else time for i, time in enumerate(clean[0].times_s)]
    disturbed = (replace(clean[0], times_s=tuple(times)), *clean[1:])
    missing = replace(
        clean[0],
        sizes_bytes=clean[0].sizes_bytes[:pause] + clean[0].sizes_bytes[pause + 1 :],
        times_s=clean[0].times_s[:pause] + clean[0].times_s[pause + 1 :],
    )
    link, paths = load_link("nvlink4"), ("ring.efficiency", "ring.launch")
    assert calibrate(link, disturbed, paths).link == calibrate(link, (missing, *clean[1:]), paths).link
    assert calibrate(link, disturbed, paths).points == sum(len(sweep.sizes_bytes) for sweep in clean) - 1
    # A little longer is how libraries change protocol.
    slow = replace(clean[0], times_s=tuple(1.2 * t if i == pause else t for i, t in enumerate(clean[0].times_s)))
    assert calibrate(link, (slow, *clean[1:]), paths).points == sum(len(sweep.sizes_bytes) for sweep in clean)


def test_send_and_receive_follow_the_all_to_all() -> None:
    for name in ("nvlink2", "nvlink3", "nvlink4", "pcie5"):
        figures = figures_of(load_link(name))
        for part in ("launch", "step", "ll.launch", "ll.step", "ll.rate"):
            own, kin = figures[f"p2p.{part}"], figures[f"all_to_all.{part}"]
            assert own.si == kin.si, (name, part)


def test_channels_need_the_rate_of_one(tmp_path: Path) -> None:
    text = (profiles_dir() / "links" / "nvlink4.yaml").read_text()
    file = tmp_path / "nvlink4.yaml"
    file.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("  channel:")))
    (problem,) = check_profile(file)
    assert "channels need the rate of one of them" in problem


def test_calibrated_profile_reads_back(tmp_path: Path) -> None:
    text, _ = synthetic("nvlink4", {"ring.efficiency": 0.7})
    (fit,) = fit_links(measured_sweeps(log_rows(text, "mine.log")).sweeps, "mine.log")
    file = tmp_path / "nvlink4.yaml"
    file.write_text(link_yaml(fit))
    assert check_profile(file) == []
    assert msgspec.convert(parse_yaml(file.read_text(), "x"), Link) == fit.link
    assert "# all_reduce of 8 ranks, 23 sizes: " in file.read_text()


def test_calibration_of_two_nodes_fits_the_network() -> None:
    two = "all_reduce_perf\n" + SETTINGS + devices(["n1", "n2"], 8, "NVIDIA H100 80GB HBM3") + NOW
    cluster = load_cluster("dgx-h100", 16)
    points = [(2**n, 1.3e6 * price("all_reduce", 2**n, cluster, Group(size=16)).time_s) for n in range(10, 34)]
    (fit,) = fit_links(measured_sweeps(log_rows(two + rows("all_reduce", 16, points), "x")).sweeps, "x")
    assert (fit.link.name, fit.link.scope) == ("infiniband", "scale-out")
    before = [abs(b / m - 1) for found in fit.sweeps for b, m in zip(found.before_s, found.sweep.times_s, strict=True)]
    assert fit.to_dict()["median_absolute_percentage_error"] < 100 * sorted(before)[len(before) // 2] / 3


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"message_bytes": "0"}, r"line 3: message_bytes=0 must be above zero"),
        ({"message_bytes": "-1"}, r"line 3: message_bytes=-1 must be above zero"),
        ({"time_us": "-1"}, r"line 3: time_us=-1 must be above zero"),
    ],
)
def test_calibration_refuses_what_cannot_be_measured(tmp_path: Path, cells: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measured_sweeps(read_rows(table(tmp_path / "t.csv", {}, cells)))


def test_calibration_of_one_point_is_refused(tmp_path: Path) -> None:
    found = measured_sweeps(read_rows(table(tmp_path / "t.csv", {}, {"collective": "all_redcue"})))
    assert sum(found.left_out.values()) == 1
    with pytest.raises(InputError, match=r"1 point over nvlink4 cannot tell its \d+ figures; give a sweep"):
        fit_links(found.sweeps, "t.csv")
    with pytest.raises(InputError, match=r"no sweep runs over --link=nvlink5; the file holds measurements of nvlink4"):
        fit_links(found.sweeps, "t.csv", only="nvlink5")


def test_nothing_that_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row can be used; 2 of 2 because: collective=all_redcue is not priced"):
        measured_sweeps(read_rows(table(tmp_path / "t.csv", *[{"collective": "all_redcue"}] * 2)))
    assert math.isfinite(published().summary["overall"]["bias"])


# -- cross-validation --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def eight_gpus_of_two_kinds() -> tuple[Sweep, ...]:
    kept = {("1 node HGX H100", "8"), ("1 node HGX H200", "4"), ("1 node RTX PRO 6000 Blackwell Server PCIe5", "4")}
    table = [row for row in read_rows(TABLE) if (row.text("system"), row.text("n_gpus").removesuffix(".0")) in kept]
    return measured_sweeps(table).sweeps


def test_every_sweep_is_left_out_once() -> None:
    sweeps = eight_gpus_of_two_kinds()
    points = sum(len(sweep.sizes_bytes) for sweep in sweeps)
    done: list[tuple[int, int]] = []
    errors = cross_validate(sweeps, 3, lambda *ticked: done.append(ticked))
    assert done == [(0, 2), (1, 2)]
    for by in ("sweeps", "systems"):
        assert errors[by]["all"]["count"] == points
        assert sum(errors[by][name]["count"] for name, *_ in REGIMES) == points
    # The RTX PRO 6000 is the only one on PCIe: without it nothing tells its links; H100 and H200 tell each other's.
    pcie = sum(len(sweep.sizes_bytes) for sweep in sweeps if "RTX" in sweep.system)
    alone = [f"{name}, no other sweep over such links" for name, *_ in REGIMES]
    assert sum(errors["systems"][name]["count"] for name in alone) == pcie
    assert not set(alone) & set(errors["sweeps"])


def test_left_out_sweeps_are_not_seen() -> None:
    """A sweep with absurd times is predicted as if it were sane, and spoils what is predicted of its sister only."""
    first = replace(eight_gpus_of_two_kinds()[0], name="first")
    absurd = replace(first, name="absurd", times_s=tuple(100 * seconds for seconds in first.times_s))
    errors = cross_validate([first, absurd], 2)
    assert list(errors) == ["sweeps"]  # there is one system
    assert errors["sweeps"]["all"]["count"] == 2 * len(first.times_s)
    # Each is predicted from the other alone: one a hundred times too slow, one a hundred times too fast.
    assert errors["sweeps"]["all"]["mean_absolute_percentage_error"] > 1000


def test_what_others_measured_on_the_same_devices() -> None:
    first = eight_gpus_of_two_kinds()[0]
    assert "H" in first.system
    slow = replace(first, name="slow", system="another host", times_s=tuple(2 * time for time in first.times_s[::2]))
    slow = replace(slow, sizes_bytes=first.sizes_bytes[::2])
    other = replace(first, name="other", system="another group", group=Group(size=2))
    predictions = [
        Prediction(sweep=one, times_s=tuple(1.1 * time for time in one.times_s), system_seen=False, class_seen=True)
        for one in (first, slow, other)
    ]
    errors = elsewhere(predictions)
    small = REGIMES[-1][0]
    theirs, ours = errors[f"{small}, as others measured"], errors[f"{small}, the same points"]
    # Twice the time one way and half of it the other; sizes between those that were measured are interpolated.
    assert theirs.p90_absolute_percentage_error == pytest.approx(100, rel=0.1)
    assert theirs.mean_absolute_percentage_error > 50
    assert ours.mean_absolute_percentage_error == pytest.approx(10)
    within = [size for size in first.sizes_bytes if size < 65536 and size <= slow.sizes_bytes[-1]]
    assert theirs.count == ours.count == len(within) + sum(size < 65536 for size in slow.sizes_bytes)
    assert elsewhere(predictions[:1]) == {}


def test_no_fit_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simllm.kernels.fitting.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a fit needs scipy; install it with: pip install 'simllm\[calibrate\]'"):
        cross_validate(eight_gpus_of_two_kinds(), 3)


@pytest.mark.parametrize("folds", [1, 10])
def test_folds_that_cannot_be(folds: int) -> None:
    with pytest.raises(InputError, match=f"--cross-validate={folds} must be from 2 to 9, the sweeps in the file"):
        cross_validate(eight_gpus_of_two_kinds(), folds)


# -- how the shipped figures were made ---------------------------------------------------------------------------------


def test_script_writes_the_shipped_figures_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One fitted class of the catalog, fitted again from the published data: the same file but for rounding."""
    path = Path(__file__).parents[2] / "benchmarks" / "calibrate_links.py"
    spec = importlib.util.spec_from_file_location("calibrate_links", path)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    name = "roce"
    assert script.main([name, "--write", "--folder", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out
    shipped = profiles_dir() / "links" / f"{name}.yaml"
    written = tmp_path / f"{name}.yaml"
    assert check_profile(written) == []
    before = figures_of(load_link(name))
    after = figures_of(msgspec.convert(parse_yaml(written.read_text(), "x"), Link))
    for path, figure in after.items():
        assert figure.value == pytest.approx(before[path].value, rel=0.02, abs=0.02), path
    assert len(written.read_text().splitlines()) == len(shipped.read_text().splitlines())
