"""What the table says against a point, and how far runs of one configuration differ."""

from __future__ import annotations

import pytest

from simllm.validation.collectives import CollectiveReport, CollectiveResult, regime
from simllm.validation.noise import farthest_off, noise_floor


def point(sweep: str, size: float, measured: float, predicted: float, machine: str = "stated") -> CollectiveResult:
    return CollectiveResult(
        id=f"{sweep}/{size:g}",
        sweep=sweep,
        system=sweep,
        gpu="H100",
        collective="all_reduce",
        ranks=8,
        status="ok",
        size_bytes=size,
        regime=regime(size),
        machine=machine,
        measured_time_s=measured,
        predicted_time_s=predicted,
    )


ROWS = (
    # The same question three times: 10, 12 and 20 us, each predicted as 12.
    point("a", 1024, 10e-6, 12e-6),
    point("b", 1024, 12e-6, 12e-6),
    point("c", 1024, 20e-6, 12e-6),
    # A jump: 4 MiB take half the time of 2 MiB.
    point("a", 2**21, 80e-6, 40e-6),
    point("a", 2**22, 40e-6, 41e-6),
    point("d", 2**22, 30e-6, 60e-6, "assumed"),
)


def test_the_floor_is_what_runs_of_one_configuration_differ_by() -> None:
    (name, floor), *others = noise_floor(ROWS).items()
    assert (name, floor.count, others) == ("below 64 KB", 3, [])
    # 10 us beside the median of 12 and 20, 12 beside that of 10 and 20, 20 beside that of 10 and 12.
    assert floor.mean_absolute_percentage_error == pytest.approx((60 + 25 + 45) / 3)


def test_points_farthest_off_come_first_with_what_stands_against_them() -> None:
    found = farthest_off(ROWS, 4)
    assert [one.row.id for one in found[:2]] == ["a/2.09715e+06", "d/4.1943e+06"]
    assert [round(one.error, 2) for one in found] == [-0.5, 1.0, -0.4, 0.2]
    assert found[0].seen == ("a larger message took -50%",)
    assert found[1].seen == ("machine assumed",)
    assert found[2].seen == ("others of this configuration measured -45%",)
    after = next(one for one in farthest_off(ROWS, 6) if one.row.id == "a/4.1943e+06")
    assert after.seen == ("a smaller message took +100%",)


def test_the_report_holds_them_only_when_asked() -> None:
    report = CollectiveReport(rows=ROWS)
    assert "worst" not in report.to_dict()
    full = CollectiveReport(rows=ROWS, noise_floor=noise_floor(ROWS), farthest=tuple(farthest_off(ROWS, 1)))
    document = full.to_dict()
    assert document["worst"] == [{"id": "a/2.09715e+06", "error": -0.5, "seen": ["a larger message took -50%"]}]
    assert document["noise_floor"]["below 64 KB"]["count"] == 3
