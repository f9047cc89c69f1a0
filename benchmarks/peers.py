"""Other tools and simllm on the same published runs. Run: python benchmarks/peers.py

For each tool, the tier A rows that it prices (with the files it ships, or also with stand-ins), reduced to one median
per configuration, and simllm's errors on exactly those rows.
"""

from __future__ import annotations

import csv
from pathlib import Path

from simllm.validation.runs import validate_runs
from simllm.validation.scoring import Outcome, Score, score

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
TOOLS = {
    "calculon": "Calculon",
    "simumax": "SimuMax",
    "llm-analysis@0.5": "llm-analysis (efficiency 0.5)",
    "textbook@0.5": "textbook line: FLOPs over half the peak, and the bubble",
}


def scores(
    tool: str, shipped_only: bool, own: dict[str, float], rows: dict[str, dict[str, str]]
) -> tuple[Score, Score] | None:
    """The errors of a tool, and of simllm on the same rows."""
    theirs, ours = [], []
    with (PUBLISHED / "peers_on_runs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            status = row["status"]
            if row["tool"] != tool or row["id"] not in own or "tier B" in status:
                continue
            if status != "ok" and (shipped_only or not status.startswith("approx")):
                continue
            key, measured = rows[row["id"]]["config_key"], float(row["measured_step_time_s"])
            theirs.append(Outcome(key=key, predicted=float(row["predicted_step_time_s"]), measured=measured))
            ours.append(Outcome(key=key, predicted=own[row["id"]], measured=measured))
    return (score(theirs), score(ours)) if theirs else None


def cells(result: Score) -> str:
    """Mean, median and 90th percentile."""
    mean, median, p90 = (
        result.mean_absolute_percentage_error,
        result.median_absolute_percentage_error,
        result.p90_absolute_percentage_error,
    )
    return f"{mean:.1f} / {median:.1f} / {p90:.1f}"


def main() -> None:
    """Print the table as Markdown."""
    path = PUBLISHED / "training_runs.csv"
    with path.open(encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    report = validate_runs(path).to_dict()
    own = {
        row["id"]: row["predicted_step_time_s"]
        for row in report["rows"]
        if row["status"] == "ok" and rows[row["id"]]["tier"] == "A"
    }
    print("| tool | rows | configurations | its errors | simllm on the same rows |")
    print("| --- | --- | --- | --- | --- |")
    for tool, name in TOOLS.items():
        for shipped_only, which in ((True, "with what it ships"), (False, "and with stand-in files")):
            found = scores(tool, shipped_only, own, rows)
            if found is None or (not shipped_only and found == scores(tool, True, own, rows)):
                continue
            theirs, ours = found
            print(f"| {name} | {which} | {theirs.count} | {cells(theirs)} | {cells(ours)} |")


if __name__ == "__main__":
    main()
