"""Profile files: found, read without executing anything, checked, and refused with one clear message."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import check_profile, list_profiles, load_accelerator, load_cluster
from simllm.hardware.figures import Bytes, BytesPerSecond, Count, Figure, Ratio
from simllm.hardware.profiles import find_profile, profiles_dir, read_yaml, register_kind, slugify
from simllm.units import UNITS

ROOT = Path(__file__).resolve().parents[2]

CARD = """\
kind: accelerator
name: my-card
vendor: ACME
memory: {value: 80, unit: GiB, basis: vendor, source: ACME datasheet}
memory_bandwidth: {value: 2, unit: TB/s, basis: measured, source: my own copy kernel}
peak_flops:
  bf16: {value: 300, unit: TFLOP/s, basis: vendor, source: ACME datasheet}
"""


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "my-card.yaml"
    path.write_text(CARD)
    return path


def test_own_file_is_read_in_si_units(card: Path) -> None:
    loaded = load_accelerator(card)
    assert (loaded.memory_bytes, loaded.memory_bandwidth, loaded.peak_flops) == (80 * 2**30, 2e12, {"bf16": 300e12})
    assert loaded.figures["peak_flops.bf16"].value == 300
    assert (loaded.compute_units, loaded.price_usd_per_hour) == (None, None)
    assert check_profile(card) == []


def test_changed_file_is_read_again(card: Path) -> None:
    assert load_accelerator(card).memory_bytes == 80 * 2**30
    card.write_text(CARD.replace("value: 80", "value: 160"))
    assert load_accelerator(card).memory_bytes == 160 * 2**30


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("unit: TB/s", "unit: TB", ["memory_bandwidth", "'TB' measures bytes, but bytes/s is wanted", "GB/s"]),
        ("unit: TB/s", "unit: furlongs", ["memory_bandwidth", "unknown unit 'furlongs'", "GB/s"]),
        ("vendor: ACME", "vendor: ACME\nfoo: 1", ["unknown key `foo`", "allowed: kind, name"]),
        ("peak_flops:", "peak_flops:\n  bf61: 1", ["peak_flops", "unknown key `bf61`", "did you mean `bf16`"]),
        ("unit: GiB, ", "", ["memory", "the key `unit` is missing", "needed: value, unit, source, basis"]),
        ("vendor: ACME\n", "", ["the key `vendor` is missing"]),
        ("value: 80", "value: .nan", ["memory", "nan is not a finite number"]),
        ("value: 80", "value: .inf", ["memory", "inf is not a finite number"]),
        ("value: 80", "value: -80", ["memory", "-80 must be above zero"]),
        ("value: 80", "value: 0", ["memory", "0 must be above zero"]),
        ("value: 80", "value: 80GB", ["memory.value", "expected `int | float`", "'80GB'"]),
        ("value: 80", "value: true", ["memory.value", "expected `int | float`", "True"]),
        (
            "basis: measured",
            "basis: guessed",
            ["memory_bandwidth.basis", "'guessed'", "measured, vendor, derived, fitted or"],
        ),
        ("source: my own copy kernel", "source: ''", ["memory_bandwidth", "source is empty"]),
        ("kind: accelerator", "kind: gpu", ["unknown kind of profile 'gpu'", "accelerator"]),
        ("kind: accelerator\n", "", ["the key `kind` is missing", "accelerator"]),
        ("vendor: ACME", "vendor: !!python/object/apply:os.system ['true']", ["line 3", "!!python/object/apply:os"]),
        ("vendor: ACME", "vendor: !!python/name:os.system", ["line 3", "!!python/name:os.system", "plain values only"]),
        ("vendor: ACME", "vendor: ACME\nvendor: EMCA", ["line 4", "key `vendor` is written twice"]),
        ("vendor: ACME", "vendor: [ACME", ["is not YAML"]),
        ("vendor: ACME", "vendor: [ACME]", ["vendor", "expected `str`", "['ACME']"]),
        (CARD, "", ["holds nothing, not a mapping"]),
        (CARD, "- 1\n- 2\n", ["holds a list, not a mapping"]),
        (CARD, "[" * 100_000, ["nested more than 50 levels"]),
        (CARD, "- " * 100_000, ["nested more than 50 levels"]),
    ],
)
def test_bad_profiles_are_refused(card: Path, old: str, new: str, said: list[str]) -> None:
    assert old in CARD
    card.write_text(CARD.replace(old, new))
    (problem,) = check_profile(card)
    for part in [str(card), *said]:
        assert part in problem
    assert "\n" not in problem
    if "kind" not in old:
        with pytest.raises(InputError) as raised:
            load_accelerator(card)
        assert str(raised.value) == problem


def test_no_rate_at_all_is_refused(card: Path) -> None:
    card.write_text(CARD[: CARD.index("  bf16")].replace("peak_flops:", "peak_flops: {}"))
    with pytest.raises(InputError, match=r"peak_flops: no rate is given; give at least one of fp32, tf32, .* int8"):
        load_accelerator(card)


def test_tags_are_not_executed(tmp_path: Path) -> None:
    path, canary = tmp_path / "evil.yaml", tmp_path / "canary"
    path.write_text(f"kind: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]")
    with pytest.raises(InputError, match="refused"):
        read_yaml(path)
    assert not canary.exists()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.yaml does not exist"):
        check_profile(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        check_profile(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"kind: \xff\xfe")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 6\)"):
        check_profile(binary)
    large = tmp_path / "large.yaml"
    large.write_text("# " + "x" * (1 << 20))
    with pytest.raises(InputError, match="a profile has at most 1048576"):
        check_profile(large)


def test_plain_values_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("a: 1e9\nb: 1.5E-3\nc: 2024-01-01\nd: 1_000\ne: 12\n")
    assert read_yaml(path) == {"a": 1e9, "b": 1.5e-3, "c": "2024-01-01", "d": 1000, "e": 12}


def test_registered_kind_is_checked_by_its_owner(tmp_path: Path) -> None:
    register_kind("test-kind", lambda path, data: [f"{path.name}: {data['n']} is odd"] if data["n"] % 2 else [])
    path = tmp_path / "x.yaml"
    path.write_text("kind: test-kind\nn: 3\n")
    assert check_profile(path) == ["x.yaml: 3 is odd"]
    path.write_text("kind: test-kind\nn: 4\n")
    assert check_profile(path) == []


@pytest.mark.parametrize("folder", ["accelerators", "systems", "fabrics"])
def test_the_whole_catalog_is_sound(folder: str) -> None:
    names = list_profiles(folder)
    problems = [problem for name in names for problem in check_profile(profiles_dir() / folder / f"{name}.yaml")]
    assert problems == []
    assert names == tuple(sorted(slugify(name) for name in names))


@pytest.mark.parametrize("folder", ["accelerators", "systems", "fabrics"])
def test_no_alias_means_two_things(folder: str) -> None:
    meant: dict[str, str] = {}
    for name in list_profiles(folder):
        for alias in [name, *read_yaml(profiles_dir() / folder / f"{name}.yaml").get("aliases", [])]:
            assert meant.setdefault(slugify(alias), name) == name, alias
            assert find_profile(folder, alias, "profile").stem == name


def test_profiles_are_found_in_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "simllm"
    shutil.copytree(ROOT / "simllm" / "hardware", package / "hardware", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    for module in ("units.py", "errors.py"):
        shutil.copy(ROOT / "simllm" / module, package)
    shutil.copytree(ROOT / "hardware_profiles", package / "hardware_profiles")
    code = (
        "from simllm.hardware import load_cluster; from simllm.hardware.profiles import profiles_dir;"
        "print(profiles_dir(), load_cluster('dgx-h100', 16).num_nodes)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(package / "hardware_profiles"), "2"]


def test_importing_the_room_stays_light() -> None:
    code = (
        "import sys, simllm.hardware as h; h.load_cluster('dgx-h100', 64);"
        "print(*[m for m in ('networkx', 'numpy', 'pandas', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "..", "a/b", "x" * 5000, "\x00", "dgx-h100\n/etc/passwd"])
def test_odd_names_never_reach_the_file_system(name: str) -> None:
    with pytest.raises(InputError):
        load_cluster(name, 8)


@given(value=st.floats(min_value=1e-3, max_value=1e9), unit=st.sampled_from(sorted(UNITS)))
def test_a_figure_is_accepted_exactly_when_its_dimension_fits(value: float, unit: str) -> None:
    for shape in (Bytes, BytesPerSecond):
        if UNITS[unit][0] == shape.dimension:
            assert shape(value=value, unit=unit, source="s", basis="assumed").si == value * UNITS[unit][1]
        else:
            with pytest.raises(ValueError, match="is wanted"):
                shape(value=value, unit=unit, source="s", basis="assumed")


def test_ranges_of_figures() -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        Count(value=1.5, unit="count", source="s", basis="assumed")
    with pytest.raises(ValueError, match="must be at least 1"):
        Ratio(value=0.5, unit="ratio", source="s", basis="assumed")
    assert Figure(value=math.pi, unit="us", source="s", basis="derived").si == pytest.approx(math.pi * 1e-6)
