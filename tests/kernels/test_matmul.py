"""The matmul formula: hand-computed cases, laws, and shares of the measured rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware.accelerator import load_accelerator
from simllm.kernels import Kernels, known_kernel_profiles
from simllm.kernels.matmul import MatmulModel, even_groups, matmul_parts, matmul_time

# 100 units at 1 TFLOP/s each, one 128x128 tile, so much bandwidth that only arithmetic counts.
PLAIN = MatmulModel(
    peak=100e12,
    bandwidth=1e18,
    units=100,
    rate=1.0,
    wave=1.0,
    overhead_k=0.0,
    memory=1.0,
    droop=0.0,
    launch_s=0.0,
    element_bytes=2.0,
    output_bytes=2.0,
    tiles=((128, 128, 1.0),),
    splits=(1,),
    split_bytes=8.0,
    join=4.0,
    droop_start=1e11,
    droop_decades=2.0,
)
TILE_S = 2 * 128 * 128 * 1000 / 1e12

sizes = st.integers(min_value=1, max_value=20_000)
DEVICES = ["a100-sxm-80gb", "h100-sxm", "b200", "gb200", "b300", "l40s", "v100-sxm-32gb", "mi300x", "tpu-v5p", "gaudi2"]
devices = st.sampled_from(DEVICES)
_kernels = {name: Kernels(load_accelerator(name)) for name in DEVICES}


def _sixteen_bit(kernels: Kernels) -> str:
    return "bf16" if "bf16" in kernels.precisions else "fp16"


def test_full_waves_cost_their_tiles() -> None:
    assert matmul_time(PLAIN, 1280, 1280, 1000) == pytest.approx(TILE_S)
    assert matmul_time(PLAIN, 1280, 1408, 1000) == pytest.approx(2 * TILE_S)  # 110 tiles on 100 units: two waves
    assert matmul_time(PLAIN, 1281, 1280, 1000) == pytest.approx(2 * TILE_S)  # one row more opens ten tiles more


def test_without_wave_quantisation_time_follows_the_tiles() -> None:
    smooth = replace(PLAIN, wave=0.0)
    assert matmul_time(smooth, 1280, 1408, 1000) == pytest.approx(1.1 * TILE_S)
    assert matmul_time(smooth, 128, 128, 1000) == pytest.approx(TILE_S)  # never below one tile


def test_overhead_rate_launch_and_droop() -> None:
    assert matmul_time(replace(PLAIN, overhead_k=100.0), 1280, 1280, 1000) == pytest.approx(1.1 * TILE_S)
    assert matmul_time(replace(PLAIN, rate=0.5), 1280, 1280, 1000) == pytest.approx(2 * TILE_S)
    assert matmul_time(replace(PLAIN, launch_s=5e-6), 1280, 1280, 1000) == pytest.approx(TILE_S + 5e-6)
    drooping = replace(PLAIN, droop=0.1)
    assert matmul_time(drooping, 1280, 1280, 1000) == pytest.approx(TILE_S)  # 3.3e9 FLOP: below the start
    long_s = 2 * 12800 * 12800 * 100_000 / 100e12  # 3.28e13 FLOP, 2.5 decades above 1e11, capped at 2
    assert matmul_time(drooping, 12800, 12800, 100_000) == pytest.approx(1.2 * long_s)


def test_memory_bound_and_joined() -> None:
    slow = replace(PLAIN, bandwidth=1e9)
    moved = 2 * (1280 * 1000 + 1000 * 1280 + 1280 * 1280)
    parts = matmul_parts(slow, ((1, 1280),), 1280, 1000)
    assert parts.memory_s == pytest.approx(moved / 1e9)
    assert parts.compute_s == pytest.approx(TILE_S)
    balanced = replace(PLAIN, bandwidth=moved / TILE_S)
    assert matmul_time(balanced, 1280, 1280, 1000) == pytest.approx(2**0.25 * TILE_S)


def test_split_k_fills_a_device_that_one_tile_cannot() -> None:
    split = replace(PLAIN, splits=(1, 2, 4, 8, 16))
    assert matmul_time(split, 128, 128, 160_000) == pytest.approx(160 * TILE_S / 16)
    # With little bandwidth the partial results cost more than they save.
    starved = replace(split, bandwidth=1e9)
    assert matmul_parts(starved, ((1, 128),), 128, 1).memory_s == pytest.approx(2 * (128 + 128 + 128 * 128) / 1e9)


def test_batched_and_grouped_tiles_fill_the_device_together() -> None:
    assert matmul_time(PLAIN, 128, 128, 1000, count=100) == pytest.approx(TILE_S)
    assert matmul_time(PLAIN, 128, 128, 1000, count=101) == pytest.approx(2 * TILE_S)
    # 10 groups of 130 rows: each opens two row tiles.
    assert matmul_parts(PLAIN, ((10, 130),), 1280, 1000).kernel_s == pytest.approx(2 * TILE_S)
    assert matmul_parts(PLAIN, ((10, 128),), 1280, 1000).kernel_s == pytest.approx(TILE_S)


def test_even_groups() -> None:
    assert even_groups(10, 4) == ((2, 3), (2, 2))
    assert even_groups(8, 4) == ((4, 2),)
    assert even_groups(3, 4) == ((3, 1),)
    assert even_groups(0, 4) == ()


def test_grouped_matmul_reads_every_weight_and_takes_uneven_loads() -> None:
    kernels = _kernels["h100-sxm"]
    even = kernels.grouped_matmul(8192, 4096, 2048, 8, "bf16")
    assert even == kernels.grouped_matmul((1024,) * 8, 4096, 2048, 8, "bf16")
    assert even == kernels.matmul(1024, 4096, 2048, "bf16", count=8)
    # One expert with all tokens: fewer weights to read, as many tiles.
    assert kernels.grouped_matmul((8192,) + (0,) * 7, 4096, 2048, 8, "bf16") == kernels.matmul(8192, 4096, 2048, "bf16")
    assert kernels.grouped_matmul((1100, 948) * 4, 4096, 2048, 8, "bf16") > even
    with pytest.raises(InputError, match="3 entries for groups=8"):
        kernels.grouped_matmul((1, 2, 3), 4096, 2048, 8, "bf16")


def test_zero_sizes_cost_nothing() -> None:
    kernels = _kernels["h100-sxm"]
    assert kernels.matmul(0, 8, 8, "bf16") == kernels.matmul(8, 0, 8, "bf16") == kernels.matmul(8, 8, 0, "bf16") == 0
    assert kernels.matmul(8, 8, 8, "bf16", count=0) == kernels.grouped_matmul(0, 8, 8, 4, "bf16") == 0
    assert kernels.grouped_matmul(8, 8, 8, 0, "bf16") == 0


def test_quantisation_is_a_term_of_its_own() -> None:
    kernels = _kernels["h100-sxm"]
    none = kernels.matmul_parts(8192, 8192, 8192, "fp8", quantise="none")
    cast = kernels.matmul_parts(8192, 8192, 8192, "fp8")
    dynamic = kernels.matmul_parts(8192, 8192, 8192, "fp8", quantise="dynamic")
    assert none.quantise_s == 0
    assert cast.kernel_s == none.kernel_s == dynamic.kernel_s
    # One fused cast: 4 B for each of 8192^2 elements at the memory rate of the curve (0.865 of 3.35 TB/s).
    assert cast.quantise_s == pytest.approx(4 * 8192**2 / (3.35e12 * 0.8648), rel=1e-3)
    assert dynamic.quantise_s == pytest.approx(7.0 * 8192**2 / (3.35e12 * 0.8648) + 8.8e-6, rel=0.01)
    assert cast.total_s == cast.kernel_s + cast.launch_s + cast.quantise_s
    with pytest.raises(InputError, match="bf16 matmuls quantise nothing"):
        kernels.matmul(8, 8, 8, "bf16", quantise="cast")
    with pytest.raises(InputError, match="use none, cast or dynamic"):
        kernels.matmul(8, 8, 8, "fp8", quantise="magic")


def test_precisions_a_device_lacks_are_refused_with_those_it_has() -> None:
    with pytest.raises(InputError, match="a100-sxm-80gb has no fp8 rate; it has bf16, fp16, fp32, tf32"):
        _kernels["a100-sxm-80gb"].matmul(8, 8, 8, "fp8")
    with pytest.raises(InputError, match="v100-sxm-32gb has no bf16 rate"):
        _kernels["v100-sxm-32gb"].matmul(8, 8, 8, "bf16")
    with pytest.raises(InputError, match="unknown precision 'bf61'; did you mean bf16"):
        _kernels["h100-sxm"].matmul(8, 8, 8, "bf61")


def test_narrower_formats_run_at_their_own_peak() -> None:
    b200 = Kernels(load_accelerator("b200"), burst=True)
    seconds = {p: b200.matmul_parts(16384, 16384, 16384, p).kernel_s for p in ("tf32", "bf16", "fp8", "mxfp8", "nvfp4")}
    assert seconds["tf32"] > seconds["bf16"] > seconds["fp8"] > seconds["nvfp4"]
    assert seconds["mxfp8"] == pytest.approx(seconds["fp8"], rel=0.01)
    assert any("tf32 matmuls on b200" in line for line in b200.assumptions)


def test_long_runs_are_slower_by_the_sustained_fraction() -> None:
    short, long = Kernels(load_accelerator("h100-sxm"), burst=True), Kernels(load_accelerator("h100-sxm"))
    ratio = short.matmul_parts(8192, 8192, 8192, "bf16").kernel_s / long.matmul_parts(8192, 8192, 8192, "bf16").kernel_s
    assert long.profile.sustained["bf16"] < 1
    assert ratio == pytest.approx(long.profile.sustained["bf16"], abs=0.002)


@given(device=devices, m=sizes, n=sizes, k=sizes, more=st.integers(min_value=1, max_value=5000))
def test_more_work_never_takes_less_time(device: str, m: int, n: int, k: int, more: int) -> None:
    kernels = _kernels[device]
    precision = _sixteen_bit(kernels)
    base = kernels.matmul(m, n, k, precision)
    assert kernels.matmul(m + more, n, k, precision) >= base * (1 - 1e-12)
    assert kernels.matmul(m, n + more, k, precision) >= base * (1 - 1e-12)
    assert kernels.matmul(m, n, k + more, precision) >= base * (1 - 1e-12)


@given(device=devices, m=sizes, n=sizes, k=sizes, factor=st.floats(min_value=1.0, max_value=10.0))
def test_a_faster_device_is_never_slower(device: str, m: int, n: int, k: int, factor: float) -> None:
    kernels = _kernels[device]
    kernels.matmul(1, 1, 1, _sixteen_bit(kernels))
    model = kernels._matmul_models[_sixteen_bit(kernels)]
    base = matmul_time(model, m, n, k)
    assert matmul_time(replace(model, peak=model.peak * factor), m, n, k) <= base * (1 + 1e-12)
    assert matmul_time(replace(model, bandwidth=model.bandwidth * factor), m, n, k) <= base * (1 + 1e-12)


@given(device=devices, m=sizes, n=sizes, k=sizes)
def test_never_above_the_peaks(device: str, m: int, n: int, k: int) -> None:
    kernels = _kernels[device]
    card = kernels.accelerator
    seconds = kernels.matmul(m, n, k, _sixteen_bit(kernels))
    assert seconds > 2 * m * n * k / card.peak_flops[_sixteen_bit(kernels)]
    assert seconds > 2 * (m * k + k * n + m * n) / card.memory_bandwidth


def test_every_precision_of_every_shipped_device_has_a_price_below_peak() -> None:
    for name in known_kernel_profiles():
        kernels = Kernels(load_accelerator(name))
        for precision in kernels.precisions:
            peak = kernels.accelerator.peak_flops[{"mxfp8": "fp8", "nvfp4": "fp4"}.get(precision, precision)]
            share = 2 * 8192**3 / kernels.matmul(8192, 8192, 8192, precision) / peak
            assert 0.2 < share < 1.0, (name, precision, share)
