"""Write README.md: page.md filled with results.

python benchmarks/dense/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
ORGANS = "Brainstem | SpinalCord | RightParotid | LeftParotid"


def finetuning(rows: list[dict[str, Any]]) -> str:
    """One line an arm and number of steps: mean Dice of each draw of labelled patients."""
    arms: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "finetune":
            arms[row["steps"], row["name"]][row["draw"]] = row["dice"]
    lines = ["| steps | arm | draw 0 | draw 1 | mean |", "|---:|---|---:|---:|---:|"]
    for (steps, name), dice in sorted(arms.items()):
        cells = [f"{dice[draw]:.3f}" if draw in dice else "–" for draw in (0, 1)]
        mean = f"{statistics.mean(dice.values()):.3f}" if len(dice) > 1 else "–"
        lines.append(f"| {steps} | `{name}` | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def readouts(rows: list[dict[str, Any]]) -> str:
    """One line a source of frozen features: Dice of a light head a voxel."""
    lines = [f"| numbers a voxel | mean | {ORGANS} |", "|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        if row["kind"] == "readout":
            organs = " | ".join(f"{value:.2f}" for value in row["organs"])
            lines.append(f"| {row['features']} | {row['dice']:.3f} | {organs} |")
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    """One line a network: seconds of a step without and with dense codes."""
    lines = ["| network | bare | dense | ratio |", "|---|---:|---:|---:|"]
    for name in ("unet", "segresnet"):
        row = result[name]
        lines.append(
            f"| {name} | {row['bare_s']:.2f} | {row['dense_s']:.2f} | {row['ratio']:.2f} |"
        )
    where = f"{result['points']} points a volume and teacher layer; {result['device']}"
    return "\n".join([*lines, "", f"{where}, commit {result['commit']}."])


def readme() -> str:
    """The page with its tables."""
    results = HERE / "results"
    rows = [json.loads(line) for line in (results / "pilot.jsonl").read_text("utf-8").splitlines()]
    cost = json.loads((results / "speed.json").read_text("utf-8"))
    return Template((HERE / "page.md").read_text("utf-8")).substitute(
        finetuning=finetuning(rows), readouts=readouts(rows), speed=speed(cost)
    )


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme(), "utf-8")
