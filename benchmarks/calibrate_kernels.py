"""Fit the kernel profiles of the catalog to published kernel timings again: how their figures were made.

    python benchmarks/calibrate_kernels.py                 # compare what is shipped with what a fit gives
    python benchmarks/calibrate_kernels.py h100-sxm --write  # put the fitted files into hardware_profiles/kernels

Only entries with basis `measured` are fitted. Exit status 1 if a fit moves a figure by more than 2 %.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from simllm.kernels.calibrate import fit_kernels
from simllm.kernels.profile import kernel_folder
from simllm.kernels.schema import AttentionEntry, KernelFile, MatmulEntry, Quantity, read_kernels
from simllm.kernels.write import write_profiles

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
TABLES = ("kernels.csv", "attention_papers.csv")
#: What a fit may move: its share, and the share of the full range that counts as nothing.
MOVED, NOTHING = 0.02, 1e-3


def published_rows() -> list[dict[str, str]]:
    """All published timings."""
    rows: list[dict[str, str]] = []
    for name in TABLES:
        with (PUBLISHED / name).open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def figures(file: KernelFile) -> Iterator[tuple[str, float]]:
    """Every fitted number of a file by its path."""
    entries: list[tuple[str, MatmulEntry | AttentionEntry]] = [*file.matmul.items()]
    for name, both in file.attention.items():
        entries += [(f"{name}.{way}", e) for way, e in (("forward", both.forward), ("backward", both.backward)) if e]
    for path, entry in entries:
        if entry.basis != "measured":
            continue
        for key in entry.__struct_fields__:
            value = getattr(entry, key)
            if (isinstance(value, Quantity) and key != "launch") or (
                key == "launch" and isinstance(entry, MatmulEntry)
            ):
                yield f"{path}.{key}", value.value
            elif key == "rate" and isinstance(value, dict):
                yield from ((f"{path}.rate.{size}", rate) for size, rate in value.items())


def moved(old: KernelFile, new: KernelFile) -> list[str]:
    """What differs between two files, in words."""
    before, after = dict(figures(old)), dict(figures(new))
    changes = [f"{path}: only in one of them" for path in sorted(before.keys() ^ after.keys())]
    for path in before.keys() & after.keys():
        if abs(after[path] - before[path]) > MOVED * abs(before[path]) + NOTHING:
            changes.append(f"{path}: {before[path]:g} -> {after[path]:g}")
    return changes


def main(arguments: list[str]) -> int:
    """Fit the named devices, or all that have published timings; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", metavar="NAME", help="accelerators; default: all with timings")
    parser.add_argument("--write", action="store_true", help="write the fitted files")
    parser.add_argument("--folder", type=Path, default=kernel_folder(), help="where they are written")
    given = parser.parse_args(arguments)
    fits = fit_kernels(published_rows(), accelerators=given.devices or None, held_out=given.write)
    found = False
    for name, new in fits.profiles.items():
        changes = moved(read_kernels(kernel_folder() / f"{name}.yaml"), new)
        found = found or bool(changes)
        print(f"{name:16s} {len(list(figures(new))):3d} figures, {len(changes)} moved by more than {MOVED:.0%}")
        print("".join(f"    {change}\n" for change in changes), end="")
    print(f"{len(fits.fitted_s)} rows fitted, {len(fits.skipped)} left out")
    if given.write:
        write_profiles(fits.profiles, given.folder)
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
