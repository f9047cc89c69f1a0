"""Fit the link classes of the catalog to published collectives again: how their figures were made.

    python benchmarks/calibrate_links.py                  # compare what is shipped with what a fit gives
    python benchmarks/calibrate_links.py nvlink4 --write  # put fitted figures into hardware_profiles/links

Only figures whose source says that they come from such a fit are moved. Classes inside domains are fitted first, those
between domains with the classes inside as they are shipped; run it twice after a change to the former.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from simllm.hardware.links import Link, list_links, load_link
from simllm.hardware.profiles import figures_of, profiles_dir
from simllm.network.calibrate import FIT, Calibration, calibrate, read_sweeps

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


def report(fit: Calibration, before: Link) -> None:
    """One class: its errors, and the figures that a fit would move by more than 2 %."""
    old, new = figures_of(before), figures_of(fit.link)
    moved = [path for path in fitted_paths(before) if abs(new[path].value - old[path].value) > 0.02 * old[path].value]
    errors = f"median {fit.median_error:6.1%}, p90 {fit.p90_error:6.1%}"
    print(f"{before.name:16s} {fit.points:5d} points, {errors}, {len(fitted_paths(before)):2d} figures", end="")
    print("".join(f"\n    {path}: {old[path].value:g} -> {new[path].value:g} {old[path].unit}" for path in moved))


def main(arguments: list[str]) -> int:
    """Fit the named classes, or all that have fitted figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("links", nargs="*", metavar="LINK", help="link classes; default: all with fitted figures")
    parser.add_argument("--write", action="store_true", help="write the fitted figures into their profiles")
    parser.add_argument("--folder", type=Path, default=profiles_dir() / "links", help="where the profiles are written")
    given = parser.parse_args(arguments)
    sweeps, refused = read_sweeps(PUBLISHED / "collectives.csv", PUBLISHED / "collectives_systems.csv")
    print(f"{sum(len(sweep.sizes_bytes) for sweep in sweeps)} published points, {sum(refused.values())} left out")
    links = [load_link(name) for name in given.links or list_links()]
    for link in sorted(links, key=lambda link: link.scope == "scale-out"):
        paths = fitted_paths(link)
        if not paths:
            continue
        fit = calibrate(link, sweeps)
        report(fit, link)
        if given.write:
            text = (profiles_dir() / "links" / f"{link.name}.yaml").read_text(encoding="utf-8")
            values = {path: figures_of(fit.link)[path].value for path in paths}
            (given.folder / f"{link.name}.yaml").write_text(with_values(text, values), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
