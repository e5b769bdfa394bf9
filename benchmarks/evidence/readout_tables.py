"""Tables of the read-outs that readout.py wrote."""

from __future__ import annotations

import json
import statistics
from itertools import groupby
from pathlib import Path

from evidence.questions import points, span


def table(path: Path) -> list[str]:
    """Title and table of a file, and its ranking of arms."""
    found = json.loads(path.read_text())["auroc"]
    counts = list(found["scratch"])
    lines = [
        f"### Read-outs of budget {path.stem.removeprefix('readout-')}",
        "",
        "Linear probes on adrenal, scored on held-out development cases: AUROC, mean of "
        f"{len(found['scratch'][counts[0]])} draws of labelled cases and of the pre-trainings, and "
        "the least and greatest of several pre-trainings. The teacher's row is the mean of its "
        "embeddings over a volume's slices, scratch is a fresh network; the others are the deepest "
        "features of pre-trained ones. Written by `readout.py`.",
        "",
        "| features | pre-trainings | " + " | ".join(f"{n} labelled" for n in counts) + " |",
        "|---" + "|---:" * (1 + len(counts)) + "|",
    ]
    for name, group in groupby(sorted(found, key=arm_name), key=arm_name):
        runs = list(group)
        row = [name, str(len(runs)) if name not in ("scratch", "teacher") else "–"]
        for n in counts:
            means = [sum(found[run][n]) / len(found[run][n]) for run in runs]
            ends = f" ({span((min(means), max(means)), False)})" if len(runs) > 1 else ""
            row.append(points(sum(means) / len(means), False) + ends)
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *ranking(found)]


def ranking(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Arms with three pre-trainings or more on each of two corpora, the best first."""
    scores: dict[str, dict[str, list[float]]] = {}  # by arm and corpus, one a pre-training
    for name, by_labels in found.items():
        if "-pretrain-s" in name:
            corpus, _, arm = arm_name(name).split("-")
            draws = [sum(values) / len(values) for values in by_labels.values()]
            scores.setdefault(arm, {}).setdefault(corpus, []).append(sum(draws) / len(draws))
    means, errors = {}, {}
    for arm, corpora in scores.items():
        if len(corpora) > 1 and min(map(len, corpora.values())) > 2:
            means[arm] = sum(map(statistics.mean, corpora.values())) / len(corpora)
            parts = [statistics.variance(v) / len(v) for v in corpora.values()]
            errors[arm] = sum(parts) ** 0.5 / len(corpora)
    if not means:
        return []
    best = sorted(means, key=lambda arm: -means[arm])
    shown = (f"`{arm}` {points(means[arm], False)} ± {points(errors[arm], False)}" for arm in best)
    return [f"Means of both corpora and both columns, ± standard error: {', '.join(shown)}.", ""]


def arm_name(name: str) -> str:
    """A pre-training's name without its seed."""
    return name.partition("-pretrain-s")[0]
