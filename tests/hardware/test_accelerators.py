"""Every row of the published accelerator table is in the catalog, figure by figure."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from simllm.errors import InputError
from simllm.hardware import list_profiles, load_accelerator
from simllm.hardware.figures import Figure

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
with (PUBLISHED / "accelerators.csv").open(newline="") as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file)}

# column: key of the figure, and the unit the column is printed in
COLUMNS = {
    "memory_bw_GBps": ("memory_bandwidth", "GB/s"),
    "tflops_fp32_vector": ("peak_flops.fp32", "TFLOP/s"),
    "tflops_tf32_dense": ("peak_flops.tf32", "TFLOP/s"),
    "tflops_fp16_dense": ("peak_flops.fp16", "TFLOP/s"),
    "tflops_bf16_dense": ("peak_flops.bf16", "TFLOP/s"),
    "tflops_fp8_dense": ("peak_flops.fp8", "TFLOP/s"),
    "tflops_fp4_dense": ("peak_flops.fp4", "TFLOP/s"),
    "tops_int8_dense": ("peak_flops.int8", "TOP/s"),
    "L2_MB": ("l2_cache", "MiB"),
    "SMs_or_CUs": ("compute_units", "count"),
    "scaleup_links": ("scaleup.links", "count"),
    "scaleup_GBps_per_dir_aggregate": ("scaleup.bandwidth", "GB/s"),
    "pcie_GBps_per_dir": ("pcie_bandwidth", "GB/s"),
    "tdp_W": ("tdp", "W"),
    "cloud_price_usd_per_gpu_hour": ("price", "USD/h"),
}
# The table leaves these out: the profile derives them from the row's own note, or has a price of a later date.
FILLED = {("TPU v3", "scaleup_GBps_per_dir_aggregate")} | {
    (name, "cloud_price_usd_per_gpu_hour") for name in ("B200-SXM", "GB200", "MI300X", "MI325X")
}


@pytest.mark.parametrize("name", ROWS)
def test_row_equals_profile(name: str) -> None:
    row, card = ROWS[name], load_accelerator(name)
    for column, (key, unit) in COLUMNS.items():
        figure = card.figures.get(key)
        if row[column]:
            assert figure is not None, column
            assert (figure.value, figure.unit) == (float(row[column]), unit), column
        else:
            assert figure is None or (name, column) in FILLED, column
    memory = card.figures["memory"]
    assert memory.value == float(row["memory_GB"])
    # A B300's 288 GB are decimal; every other part is made in GiB though its vendor prints GB.
    assert memory.unit == ("GB" if name == "B300-SXM" else "GiB")
    assert card.memory_type == row["memory_type"]
    assert card.pcie_link == (f"pcie{int(float(row['pcie_gen']))}" if row["pcie_gen"] else None)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["provenance"] == "recalled"])
def test_what_was_recalled_says_so(name: str) -> None:
    figures = load_accelerator(name).figures
    assert all(figure.basis in ("vendor", "derived") for figure in figures.values())
    read_in_a_source = {"V100-SXM2-16GB": {"scaleup.bandwidth"}, "H100-NVL": {"tdp"}}.get(name, set())
    silent = {key for key, figure in figures.items() if "recalled" not in f"{figure.note} {figure.source}"}
    assert silent - {"price"} == read_in_a_source


@pytest.mark.parametrize("name", list_profiles("accelerators"))
def test_attributes_are_the_figures_in_si(name: str) -> None:
    card = load_accelerator(name)

    def si(key: str) -> float | None:
        figure: Figure | None = card.figures.get(key)
        return figure.si if figure else None

    assert card.name == name
    assert card.memory_bytes == si("memory")
    assert card.memory_bandwidth == si("memory_bandwidth")
    assert card.compute_units == si("compute_units")
    assert card.l2_bytes == si("l2_cache")
    assert card.pcie_bandwidth == si("pcie_bandwidth")
    assert card.scaleup_bandwidth == si("scaleup.bandwidth")
    assert card.tdp_w == si("tdp")
    assert {f"peak_flops.{precision}": rate for precision, rate in card.peak_flops.items()} == {
        key: figure.si for key, figure in card.figures.items() if key.startswith("peak_flops.")
    }
    if (price := card.figures.get("price")) is not None:
        assert card.price_usd_per_hour == pytest.approx(price.value, rel=1e-12)
    else:
        assert card.price_usd_per_hour is None
    assert all(figure.source for figure in card.figures.values())
    # Half the width, at least the rate: dense figures, not sparse ones mixed with dense ones.
    for wide, narrow in (("fp32", "bf16"), ("tf32", "bf16"), ("bf16", "fp8"), ("fp8", "fp4")):
        if wide in card.peak_flops and narrow in card.peak_flops:
            assert card.peak_flops[narrow] >= card.peak_flops[wide]
    assert hash(card) == hash(load_accelerator(name))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("a100-sxm-80gb", "a100-sxm-80gb"),
        ("A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100 SXM", "a100-sxm-80gb"),
        ("A100-SXM4 (unspecified)", "a100-sxm-80gb"),
        ("A100-80GB-PCIe", "a100-pcie-80gb"),
        ("H100_SXM", "h100-sxm"),
        ("H100-class (FA2)", "h100-sxm"),
        ("RTX PRO 6000", "rtx-pro-6000"),
        ("Intel Gaudi 3", "gaudi3"),
        ("AMD MI325X", "mi325x"),
        ("TPU7x (Ironwood)", "tpu-v7x"),
        ("V100", "v100-sxm-32gb"),
        ("B300/GB300-class (MFU base 2500)", "gb300"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert load_accelerator(spelling).name == name


def test_parts_that_no_row_has() -> None:
    low_power = load_accelerator("h100-sxm-96gb-hbm2e")
    assert (low_power.memory_bytes, low_power.memory_bandwidth, low_power.tdp_w) == (96 * 2**30, 2.4e12, 500)
    assert low_power.peak_flops == load_accelerator("h100-sxm").peak_flops
    assert low_power.figures["peak_flops.bf16"].basis == "assumed"
    package, die = load_accelerator("mi250x"), load_accelerator("MI250X (GCD)")
    assert die.memory_bytes * 2 == package.memory_bytes
    assert die.memory_bandwidth * 2 == package.memory_bandwidth
    assert {precision: rate * 2 for precision, rate in die.peak_flops.items()} == package.peak_flops


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown accelerator 'h100-sxn'; did you mean h100-sxm"):
        load_accelerator("h100-sxn")
