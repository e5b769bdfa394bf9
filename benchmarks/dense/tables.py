"""Tables of the dense pilot from its JSON lines.

python benchmarks/dense/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "pilot.jsonl"
ORGANS = "Brainstem | SpinalCord | RightParotid | LeftParotid"


def rows(path: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finetuning(found: list[dict[str, Any]]) -> list[str]:
    """One line an arm and number of steps: mean Dice of each draw of labelled patients."""
    arms: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in found:
        if row["kind"] == "finetune":
            arms[row["steps"], row["name"]][row["draw"]] = row["dice"]
    lines = ["| steps | arm | draw 0 | draw 1 | mean |", "|---|---|---|---|---|"]
    for (steps, name), dice in sorted(arms.items()):
        cells = [f"{dice[draw]:.3f}" if draw in dice else "–" for draw in (0, 1)]
        mean = f"{statistics.mean(dice.values()):.3f}" if len(dice) > 1 else "–"
        lines.append(f"| {steps} | {name} | {' | '.join(cells)} | {mean} |")
    return lines


def readouts(found: list[dict[str, Any]]) -> list[str]:
    """One line a source of frozen features: Dice of a light head a voxel."""
    lines = [f"| features | numbers | mean | {ORGANS} |", "|---|---|---|---|---|---|---|"]
    for row in found:
        if row["kind"] == "readout":
            organs = " | ".join(f"{value:.2f}" for value in row["organs"])
            lines.append(f"| {row['source']} | {row['features']} | {row['dice']:.3f} | {organs} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*finetuning(rows()), "", *readouts(rows())]))
