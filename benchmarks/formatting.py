"""Templates, table rows and numbers of the page of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Result = dict[str, Any]


def load(name: str) -> Result | None:
    """A result; None if it was not measured."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fill(name: str, **values: Any) -> str:
    """A template with its values."""
    return (HERE / "templates" / f"{name}.md").read_text().format(**values)


def table(rows: Iterable[Iterable[object]]) -> str:
    """Rows of a table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def where(result: Result) -> str:
    """Device, version and commit of a result."""
    return f"{result['device']}; torch {result['versions']['torch']}; commit {result['commit']}"


def span(figures: dict[str, float], digits: int = 2) -> str:
    """Median with the least and greatest in brackets."""
    low, high = figures["min"], figures["max"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ends(stat: dict[str, Any], digits: int = 3) -> str:
    """Mean with its interval."""
    return f"{stat['mean']:.{digits}f} ({stat['low']:.{digits}f}–{stat['high']:.{digits}f})"


def percents(stat: dict[str, float], *keys: str) -> str:
    """Mean and the two ends of its interval in per cent."""
    mean, low, high = (100 * stat[key] for key in keys)
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


def reached(ok: bool) -> str:
    """Whether a goal is reached."""
    return "reached" if ok else "**not reached**"


def segmentation(row: dict[str, Any]) -> list[str]:
    """Dice, NSD and HD95."""
    return [ends(row["dice"]), ends(row["nsd"]), ends(row["hd95"], 2)]


def duration(seconds: float) -> str:
    """A time in days, hours, minutes or seconds."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
