"""Fit the link classes of the catalog to published collectives again: how their figures were made.

    python benchmarks/calibrate_links.py                  # compare what is shipped with what a fit gives
    python benchmarks/calibrate_links.py nvlink4 --write  # put fitted figures into hardware_profiles/links

Only figures whose source says that they come from such a fit are moved, and those that follow another class. What the
classes have in common is fitted first, then each class after the one it is like, those inside domains before those
between them: nothing depends on the figures that are shipped.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from simllm.hardware.links import Link, list_links, load_link
from simllm.hardware.profiles import figures_of, profiles_dir
from simllm.network.calibrate import FIT, calibrate_all
from simllm.validation.collective_rows import read_rows
from simllm.validation.link_fit import measured_sweeps

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"


def fitted_paths(link: Link) -> list[str]:
    """Key paths of the figures that come from a fit."""
    return [path for path, figure in figures_of(link).items() if figure.source.startswith(FIT)]


def with_values(text: str, values: dict[str, float]) -> str:
    """The text of a link profile with other values, everything else as it was."""
    lines, parts = text.splitlines(keepends=True), [""]
    for number, line in enumerate(lines):
        if found := re.match(r"((?:  )*)(\w+):", line):
            parts = [*parts[: len(found[1]) // 2], found[2]]
        path = ".".join(parts)
        if path in values and re.match(r" *\w+: \{value: [^,]+,", line):
            value = f"{{value: {values[path]:g},"
            lines[number] = re.sub(r"\{value: [^,]+,", value, line, count=1)
    return "".join(lines)


def report(before: Link, after: Link) -> None:
    """One class: the figures that a fit would move by more than 2 %."""
    old, new = figures_of(before), figures_of(after)
    moved = [path for path in old if abs(new[path].value - old[path].value) > 0.02 * abs(old[path].value)]
    print(f"{before.name:20s} {len(fitted_paths(before)):2d} fitted figures, {len(moved)} move")
    for path in moved:
        print(f"    {path}: {old[path].value:g} -> {new[path].value:g} {old[path].unit}")


def main(arguments: list[str]) -> int:
    """Fit the named classes, or all that have fitted figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("links", nargs="*", metavar="LINK", help="link classes; default: all with fitted figures")
    parser.add_argument("--write", action="store_true", help="write the fitted figures into their profiles")
    parser.add_argument("--folder", type=Path, default=profiles_dir() / "links", help="where the profiles are written")
    given = parser.parse_args(arguments)
    measured = measured_sweeps(read_rows(PUBLISHED / "collectives.csv"))
    points = sum(len(sweep.sizes_bytes) for sweep in measured.sweeps)
    print(f"{points} published points, {sum(measured.left_out.values())} left out")
    for name, link in calibrate_all(measured.sweeps, given.links or None).items():
        before = load_link(name)
        changed = {path: figure.value for path, figure in figures_of(link).items()}
        if name not in (given.links or list_links()) or link.like is None:
            continue
        report(before, link)
        if given.write:
            text = (profiles_dir() / "links" / f"{name}.yaml").read_text(encoding="utf-8")
            moved = {path: value for path, value in changed.items() if value != figures_of(before)[path].value}
            (given.folder / f"{name}.yaml").write_text(with_values(text, moved), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
