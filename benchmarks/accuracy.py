"""The accuracy that this version is held to: writes tests/published/accuracy.json, which a test compares with.

Run after a change that makes predictions better, and commit the file: ``python benchmarks/accuracy.py``. With
``--cross-validate`` the errors of predictions that have not seen a part of the runs are written too (minutes).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from simllm.validation.run_fit import cross_validated
from simllm.validation.runs import validate_runs

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
TABLE, TARGET = PUBLISHED / "training_runs.csv", PUBLISHED / "accuracy.json"


def rounded(value: Any) -> Any:
    """Numbers to three digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main(arguments: list[str]) -> None:
    """Write the summary."""
    summary = validate_runs(TABLE).summary
    found = {
        "priced": summary["ok"],
        "step_time": {tier: summary["tier"][tier] for tier in ("A", "B")},
        "peak_memory": summary["memory"]["overall"],
    }
    if "--cross-validate" in arguments:
        found["cross_validation"] = cross_validated(TABLE)
    elif TARGET.exists():
        found["cross_validation"] = json.loads(TARGET.read_text(encoding="utf-8")).get("cross_validation")
    TARGET.write_text(json.dumps(rounded(found), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
