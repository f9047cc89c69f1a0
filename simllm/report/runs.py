"""A whole run to read: days, GPU-hours, money, energy and emissions, without failures and with them."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simllm.report.text import facts, heading, notes, table
from simllm.training.budget import Budget, RunCost
from simllm.units import format_bytes, format_count, format_duration, format_si

__all__ = ["energy_words", "failure_facts", "mass_words", "run_assumptions", "run_report", "run_rows"]


def energy_words(kwh: float | None) -> str:
    """Energy with its unit.

    >>> energy_words(44.6e6), energy_words(None)
    ('44.6 GWh', '')
    """
    return "" if kwh is None else _spaced(format_si(kwh * 1e3), "Wh")


def mass_words(kilograms: float | None) -> str:
    """Emissions in tonnes.

    >>> mass_words(17.86e6), mass_words(120.0)
    ('17.9 kt', '0.12 t')
    """
    return "" if kilograms is None else _spaced(format_si(kilograms / 1e3), "t")


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.1f}" if days >= 10 else f"{days:.3g}"


def _span(seconds: float) -> str:
    """A duration, in minutes where people speak of minutes."""
    return f"{seconds / 60:.3g} min" if 120 <= seconds < 7200 else format_duration(seconds)


def _spaced(number: str, unit: str) -> str:
    return f"{number[:-1]} {number[-1]}{unit}" if number[-1].isalpha() else f"{number} {unit}"


def run_rows(run: Budget) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows: the run without interruptions, and the median of the runs with failures."""
    known = [
        ("USD", run.usd is not None),
        ("energy", run.ideal.kwh is not None),
        ("CO2e", run.ideal.kg_co2e is not None),
    ]
    columns = ("", "days", "GPU-hours", *(name for name, shown in known if shown))

    def row(name: str, cost: RunCost) -> tuple[str, ...]:
        usd = "" if cost.usd is None else format_count(cost.usd)
        cells = {"USD": usd, "energy": energy_words(cost.kwh), "CO2e": mass_words(cost.kg_co2e)}
        return (name, _days(cost.time_s), format_count(cost.gpu_hours), *(cells[column] for column in columns[3:]))

    return columns, [row("without interruptions", run.ideal), row("with failures", run.with_failures.cost)]


def failure_facts(run: Budget) -> dict[str, str]:
    """What failures do to the run, in words."""
    failures = run.with_failures
    low, high = failures.goodput_interval
    short, long = failures.time_interval_s
    return {
        "goodput": f"{failures.goodput:.1%} ({low:.1%} to {high:.1%}), {_days(short)} to {_days(long)} days "
        "in eight of ten such runs",
        "failures": f"{failures.failures:,.3g}, one every {_span(failures.job_mtbf_s)}; {_span(failures.restart_s)} to "
        "restart",
        "checkpoints": f"{format_bytes(failures.checkpoint_bytes)} in {_span(failures.checkpoint_s)}, "
        f"every {_span(failures.checkpoint_interval_s)}",
    }


def run_assumptions(run: Budget) -> list[str]:
    """What the figures of a run rest on."""
    lines = []
    if run.usd_per_gpu_hour is None:
        lines.append("no price is known for the device; give --price for USD")
    elif run.price_source is not None:
        date = f", {run.price_date}" if run.price_date else ", undated"
        lines.append(f"{run.usd_per_gpu_hour:.2f} USD per GPU-hour{date}: {run.price_source}")
    if run.power_source is None:
        lines.append("no power limit is known for the device: no energy is stated")
    else:
        lines.append(f"{run.watts_per_gpu:,.0f} W a GPU: {run.power_source}")
    if run.power_source is not None and run.kg_co2e_per_kwh is None:
        lines.append("no carbon intensity of the grid is given: no emissions are stated (--grid-intensity)")
    hours = run.with_failures.gpu_mtbf_s / 3600
    words = {
        "gpu_mtbf": f"a failure every {hours:,.0f} h of one GPU",
        "restart": "restart",
        "storage_bandwidth": "speed of checkpoints, training stands still meanwhile",
    }
    return lines + [f"{words[name]}: {source}" for name, source in run.with_failures.sources.items()]


def run_report(run: Budget) -> list[RenderableType]:
    """The part of a report about the whole run."""
    return [
        Text(),
        heading("The whole run", f"{format_count(run.tokens)} tokens"),
        _table(run),
        Text(),
        facts(failure_facts(run)),
        *notes("Assumptions of the run", run_assumptions(run)),
    ]


def _table(run: Budget) -> Table:
    columns, rows = run_rows(run)
    return table(columns, rows, left=("",))
