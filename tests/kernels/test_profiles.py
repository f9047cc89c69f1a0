"""Kernel profiles: which file answers, what is refused, and that every number has a source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from simllm.errors import InputError
from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.hardware.profiles import check_profile, list_profiles
from simllm.kernels import Kernels, known_kernel_profiles, load_kernel_profile
from simllm.kernels.profile import kernel_folder
from simllm.kernels.schema import AttentionEntry, MatmulEntry

CURVE = {
    "rate": {"value": 0.8, "unit": "fraction"},
    "wave": {"value": 0.3, "unit": "fraction"},
    "overhead_k": {"value": 100, "unit": "count"},
    "memory": {"value": 0.8, "unit": "fraction"},
    "droop": {"value": 0.0, "unit": "fraction"},
    "launch": {"value": 4, "unit": "us"},
    "basis": "assumed",
    "source": "a test",
}
FIGURES = {
    "memory_efficiency": {"value": 0.8, "unit": "fraction", "source": "a test", "basis": "assumed"},
    "launch": {"value": 4, "unit": "us", "source": "a test", "basis": "assumed"},
}


def write(folder: Path, name: str, **content: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"kind": "kernels", "name": name, **content}))
    return path


def test_the_rules_of_fallback() -> None:
    own = load_kernel_profile("h100-sxm")
    assert (own.origin, own.files, own.assumptions) == ("own", ("h100-sxm",), ())
    borrowed = load_kernel_profile("a100-sxm-40gb")
    assert (borrowed.origin, borrowed.files) == ("borrowed", ("a100-sxm-40gb", "a100-sxm-80gb"))
    assert borrowed.matmul == load_kernel_profile("a100-sxm-80gb").matmul
    assert "shares of peak of a100-sxm-80gb stand in" in borrowed.assumptions[0]
    by_prefix = load_kernel_profile("h200-nvl")
    assert (by_prefix.origin, by_prefix.files[0]) == ("class default", "default-hopper")
    assert load_kernel_profile("b300-nvl").files[0] == "default-blackwell-ultra"
    by_vendor = load_kernel_profile("some-instinct", "AMD")
    assert (by_vendor.origin, by_vendor.files[0]) == ("class default", "default-cdna")
    generic = load_kernel_profile("somebodys-chip", "Nobody")
    assert (generic.origin, generic.files) == ("generic default", ("default",))
    assert "generic default" in generic.assumptions[0]


def test_a_borrowing_file_replaces_single_entries() -> None:
    h200, h100 = load_kernel_profile("h200-sxm"), load_kernel_profile("h100-sxm")
    assert h200.matmul["bf16"] != h100.matmul["bf16"]
    assert h200.attention["flash3"].forward != h100.attention["flash3"].forward
    assert h200.attention["flash3"].backward == h100.attention["flash3"].backward
    assert h200.attention["cudnn"] == h100.attention["cudnn"]
    capped = load_kernel_profile("h100-sxm-96gb-hbm2e")
    assert capped.sustained["bf16"] < h100.sustained["bf16"] == h200.sustained["bf16"]
    assert capped.matmul == h100.matmul


def test_every_accelerator_of_the_catalog_is_priced() -> None:
    generic = []
    for name in list_profiles("accelerators"):
        kernels = Kernels(load_accelerator(name))
        assert kernels.matmul(4096, 4096, 4096, kernels.precisions[0]) > 0
        for direction in ("forward", "backward"):
            assert (
                kernels.attention(
                    1,
                    16,
                    16,
                    4096,
                    4096,
                    128,
                    work_fraction=0.5,
                    direction=direction,
                    precision="fp16" if "bf16" not in kernels.precisions else "bf16",
                )
                > 0
            )
        if kernels.profile.origin == "generic default":
            generic.append(name)
    assert generic == []


def test_shipped_files_are_whole() -> None:
    catalog = list_profiles("accelerators")
    for path in sorted(kernel_folder().glob("*.yaml")):
        assert check_profile(path) == [], path
    for name in known_kernel_profiles():
        assert name in catalog
        profile = load_kernel_profile(name)
        entries: list[MatmulEntry | AttentionEntry] = [*profile.matmul.values()]
        entries += [entry for both in profile.attention.values() for entry in (both.forward, both.backward) if entry]
        for entry in entries:
            assert entry.source, name
            if entry.basis == "measured":
                assert entry.residual is not None, name
        assert profile.default_attention in (*profile.attention, "unfused")
        assert not [
            f for f, both in profile.attention.items() if both.backward is None and f == profile.default_attention
        ]


def test_a_device_of_ones_own_uses_its_class() -> None:
    card = Accelerator(
        name="h100-custom", vendor="NVIDIA", memory_bytes=80 * 2**30, memory_bandwidth=3e12, peak_flops={"bf16": 900e12}
    )
    kernels = Kernels(card)
    assert kernels.profile.files[0] == "default-hopper"
    # No compute units stated: no waves, the device is one unit.
    assert kernels.matmul(4096, 4096, 4096, "bf16") > 2 * 4096**3 / 900e12
    with pytest.raises(InputError, match="h100-custom has no fp8 rate; it has bf16"):
        kernels.matmul(1, 1, 1, "fp8")


def test_folder_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, "default", matmul={"bf16": CURVE}, **FIGURES)
    write(tmp_path, "mine", borrows="default", matmul={"bf16": {**CURVE, "rate": {"value": 0.5, "unit": "fraction"}}})
    assert load_kernel_profile("mine", folder=tmp_path).matmul["bf16"].rate.value == 0.5
    assert load_kernel_profile("other", folder=tmp_path).matmul["bf16"].rate.value == 0.8
    assert load_kernel_profile("other", folder=tmp_path).default_attention == "unfused"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"matmul": {"bf16": {**CURVE, "rate": {"value": 0.8, "unit": "us"}}}},
            "unit 'us' measures time, but fraction is wanted",
        ),
        (
            {"matmul": {"bf16": {**CURVE, "rate": {"value": 1.2, "unit": "fraction"}}}},
            "rate=1.2 fraction must lie between 0.01 and 1",
        ),
        ({"matmul": {"bf16": {**CURVE, "rate": {"value": 0.8, "unit": "furlong"}}}}, "unknown unit 'furlong'"),
        (
            {"matmul": {"bf16": {**CURVE, "rate": {"value": "fast", "unit": "fraction"}}}},
            "matmul.bf16.rate.value|expected `float`",
        ),
        ({"matmul": {"bf16": {**CURVE, "speed": 1}}}, "unknown key `speed`"),
        ({"matmul": {"bf16": {k: v for k, v in CURVE.items() if k != "source"}}}, "the key `source` is missing"),
        (
            {"matmul": {"bf16": {**CURVE, "basis": "guessed"}}},
            "'guessed'",
        ),
        ({"kernels": {}}, "unknown key `kernels`"),
        (
            {"sustained_fraction": {"bf16": {"value": 7, "unit": "fraction", "source": "x", "basis": "assumed"}}},
            "between 0.1 and 1.5",
        ),
        (
            {"memory_efficiency": {"value": 0.8, "unit": "GB/s", "source": "x", "basis": "assumed"}},
            "fraction is wanted",
        ),
        ({"borrows": "nothing", "matmul": {"bf16": CURVE}}, "unknown kernel profile .borrowed by bad. 'nothing'"),
        ({"borrows": "bad", "matmul": {"bf16": CURVE}}, "borrow in a circle: bad -> bad"),
        ({"matmul": {"bf16": CURVE}, "memory_efficiency": FIGURES["memory_efficiency"]}, "no launch in it"),
        ({"default_attention": "flash9", "matmul": {"bf16": CURVE}, **FIGURES}, "unknown default_attention"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: dict[str, object], message: str) -> None:
    write(tmp_path, "default", matmul={"bf16": CURVE}, **FIGURES)
    write(tmp_path, "bad", **content)
    with pytest.raises(InputError, match=message):
        load_kernel_profile("bad", folder=tmp_path)


def test_a_file_is_named_like_its_accelerator(tmp_path: Path) -> None:
    write(tmp_path, "mine", matmul={"bf16": CURVE}, **FIGURES).rename(tmp_path / "yours.yaml")
    with pytest.raises(InputError, match="name is 'mine'; it must be the file's name, 'yours'"):
        load_kernel_profile("yours", folder=tmp_path)


def test_attention_entries_are_checked(tmp_path: Path) -> None:
    shared = {k: CURVE[k] for k in ("launch", "basis", "source")}
    counts = {"overhead_tokens": {"value": 100, "unit": "count"}, "tail_tiles": {"value": 0, "unit": "count"}}
    counts |= {"tile_rows": {"value": 128, "unit": "count"}, "masked": {"value": 0.9, "unit": "fraction"}}

    def load(**changes: object) -> None:
        entry = {"rate": {64: 0.4, 128: 0.6}, **counts, **shared, **changes}
        write(tmp_path, "bad", matmul={"bf16": CURVE}, **FIGURES, attention={"flash2": {"forward": entry}})
        load_kernel_profile.cache_clear()
        load_kernel_profile("bad", folder=tmp_path)

    load()
    with pytest.raises(InputError, match="makes a wider head cheaper"):
        load(rate={64: 0.2, 128: 0.6})
    with pytest.raises(InputError, match="needs at least one head size"):
        load(rate={})
    with pytest.raises(InputError, match="fractions above 0 and up to 1"):
        load(rate={64: 1.5})
    with pytest.raises(InputError, match=r"masked=0\.5 fraction must lie between"):
        load(masked={"value": 0.5, "unit": "fraction"})


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("kind: kernels\nname: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match=r"the tag .* is refused"):
        load_kernel_profile("anything", folder=tmp_path)


def test_pricing_needs_neither_numpy_nor_scipy() -> None:
    code = (
        "import sys; from simllm.kernels import Kernels; from simllm.hardware.accelerator import load_accelerator; "
        "Kernels(load_accelerator('h100-sxm')).matmul(64, 64, 64, 'bf16'); "
        "assert not {'numpy', 'scipy', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
