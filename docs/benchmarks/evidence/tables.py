"""README.md and its figures from results/*/*.json.

python docs/benchmarks/evidence/tables.py
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from med3dinsight_ext.classification import auroc_of
from med3dinsight_ext.report import STYLE

HERE = Path(__file__).parent
DRAWS = 2000
Record = dict[str, Any]


class Difference(NamedTuple):
    """An arm's mean score, and what it is above scratch, over the seeds that both have.

    cases: 95 % interval of ``above`` over cases. both: over cases and seeds, drawn apart. seeds:
    ``above`` of each seed.
    """

    score: float
    above: float
    cases: tuple[float, float]
    both: tuple[float, float]
    seeds: list[float]


def statistic(records: list[Record], weight: Tensor) -> Tensor:
    """Score of each run (s, b) under b weightings of the cases (n, b): mean Dice, or AUROC."""
    found = []
    for record in records:
        rows = sorted(record["cases"], key=lambda row: row["case"])
        if "dice" in rows[0]:
            groups = groupby(rows, key=lambda row: row["case"])
            dice = torch.tensor(
                [[float("nan") if r["dice"] is None else r["dice"] for r in g] for _, g in groups],
                dtype=torch.float64,
            ).nanmean(1)
            found.append(dice @ weight / weight.sum(0))
        else:
            names = record["settings"]["class_names"]
            label = torch.tensor([names.index(row["label"]) for row in rows])
            score = torch.tensor([[row[f"p_{n}"] for n in names] for row in rows])
            found.append(auroc_of(score, label, weight, len(names) - 1))
    return torch.stack(found)


def difference(arm: list[Record], scratch: list[Record], seed: int = 0) -> Difference:
    """Paired by case and by seed."""
    shared = sorted({r["seed"] for r in arm} & {r["seed"] for r in scratch})
    pair = [sorted((r for r in a if r["seed"] in shared), key=lambda r: r["seed"])
            for a in (arm, scratch)]  # fmt: skip
    names = [{row["case"] for row in record["cases"]} for records in pair for record in records]
    if any(other != names[0] for other in names):
        raise ValueError("runs of a table must have scored the same cases; move odd ones away")
    n, s = len(names[0]), len(shared)
    generator = torch.Generator().manual_seed(seed)

    def counts(size: int) -> Tensor:
        drawn = torch.randint(size, (size, DRAWS), generator=generator)
        zeros = torch.zeros(size, DRAWS, dtype=torch.float64)
        return zeros.scatter_add(0, drawn, torch.ones(size, DRAWS, dtype=torch.float64))

    one, cases = torch.ones(n, 1, dtype=torch.float64), counts(n)
    ours, theirs = (statistic(records, one)[:, 0] for records in pair)
    above = statistic(pair[0], cases) - statistic(pair[1], cases)

    def interval(values: Tensor) -> tuple[float, float]:
        low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    seeds = (ours - theirs).tolist()
    return Difference(
        float(ours.mean()), float((ours - theirs).mean()), interval(above.mean(0)),
        interval((above * counts(s)).sum(0) / s), seeds,
    )  # fmt: skip


def results(folder: Path) -> list[Record]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def grouped(records: list[Record], *keys: str) -> dict[Any, list[Record]]:
    """Records by the values of keys; in the order of their first."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return found


def by_labels(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """Records of each number of labelled cases, few first."""
    found = grouped(records, "labels")
    return [(str(k[0] or "all"), found[k]) for k in sorted(found, key=lambda k: k[0] or 10**9)]


def table(records: list[Record]) -> list[str]:
    """An arm a row, a number of labels a column."""
    columns = [(name, grouped(rows, "arm")) for name, rows in by_labels(records)]
    lines = [
        "| arm | " + " | ".join(f"{name} labelled" for name, _ in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for (arm,) in grouped(records, "arm"):
        cells = []
        for _, arms in columns:
            rows, scratch = arms.get((arm,), []), arms.get(("scratch",), [])
            if not {r["seed"] for r in rows} & {r["seed"] for r in scratch}:
                cells.append("–")
                continue
            d = difference(rows, scratch)
            text = f"{100 * d.score:.1f}"
            if arm != "scratch":
                text += (
                    f"; {100 * d.above:+.1f} ({100 * d.cases[0]:+.1f} to {100 * d.cases[1]:+.1f}; "
                    f"{100 * d.both[0]:+.1f} to {100 * d.both[1]:+.1f})"
                )
            cells.append(f"{text}, {len(d.seeds)} seeds")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


@rc_context(STYLE)
def curves(records: list[Record]) -> Figure:
    """What each arm is above scratch at each number of labels, with both intervals."""
    figure = Figure((6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    columns = [(name, grouped(rows, "arm")) for name, rows in by_labels(records)]
    arms = [arm for (arm,) in grouped(records, "arm") if arm != "scratch"]
    for i, arm in enumerate(arms):
        at, found = [], []
        for x, (_, column) in enumerate(columns):
            if (arm,) in column and ("scratch",) in column:
                at.append(x + 0.6 * ((i + 0.5) / len(arms) - 0.5))
                found.append(difference(column[(arm,)], column[("scratch",)]))
        color = f"C{i % 10}"
        ax.plot(at, [100 * d.above for d in found], "o", ms=4, color=color, label=arm)
        ax.vlines(at, *zip(*(d.both for d in _percent(found)), strict=True), color=color, lw=0.8)
        ax.vlines(at, *zip(*(d.cases for d in _percent(found)), strict=True), color=color, lw=2.4)
    ax.axhline(0, color="gray", lw=0.8)
    ax.set_xticks(range(len(columns)), [name for name, _ in columns])
    ax.set(xlabel="labelled cases", ylabel="points above scratch")
    figure.legend(loc="outside right upper")
    return figure


def _percent(found: list[Difference]) -> list[Difference]:
    def scaled(ends: tuple[float, float]) -> tuple[float, float]:
        return 100 * ends[0], 100 * ends[1]

    return [d._replace(cases=scaled(d.cases), both=scaled(d.both)) for d in found]


def comparisons(records: list[Record]) -> dict[str, list[Record]]:
    """Fine-tuning runs that belong in one table, by the name of their figure."""
    fine = [r for r in records if "error" not in r and r["bundle"] != "pretrain"]
    found = grouped(fine, "task", "backbone", "variant", "score")
    return {"-".join(part for part in key[:3] if part): rows for key, rows in found.items()}


def drawable(rows: list[Record]) -> bool:
    arms = grouped(rows, "arm")
    return len(arms) > 1 and ("scratch",) in arms


def section(folder: Path) -> list[str]:
    """What a budget's runs say."""
    records = results(folder)
    failed = [f"- {r['name']}: {r['error']}" for r in records if "error" in r]
    lines = [
        f"## {folder.name}",
        "",
        f"`run.py DATA --budget {folder.name}`: {len(records)} runs, {len(failed)} failed; "
        f"{sum(r['seconds'] for r in records) / 3600:.1f} hours of "
        f"{', '.join(sorted({r['device'] for r in records}))}; commit "
        f"{', '.join(sorted({r['commit'] for r in records}))}.",
        "",
    ]
    for name, rows in comparisons(records).items():
        metric = "Mean Dice" if "dice" in rows[0]["cases"][0] else "AUROC"
        judged = {"test": "test cases", "held_out": "held-out development cases"}[rows[0]["score"]]
        lines += [
            f"**{name}**: {metric} in per cent on {judged}; then what it is above scratch, with "
            "its 95 % interval over cases, and over cases and seeds.",
            "",
            *table(rows),
            "",
        ]
        if drawable(rows):
            lines += [f"![{name}](figures/{folder.name}-{name}.png)", ""]
    before = [r for r in records if "error" not in r and r["bundle"] == "pretrain"]
    if before:
        lines += [
            "Slice → image within plane and depth, R@1 in per cent:",
            "",
            "| pre-training | steps | minutes | student | volume zero | chance |",
            "|---|---|---|---|---|---|",
        ]
    for r in before:
        student, zero = r["retrieval"]["student"], r["retrieval"]["volume_zero"]
        key = "image_within_r1"
        values = (student.get(key), zero.get(key), student.get(f"{key}_chance"))
        cells = " | ".join("–" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(f"| {r['name']} | {r['steps']} | {r['train_seconds'] / 60:.1f} | {cells} |")
    lines += [""] if before else []
    return [*lines, *(["Failed:", "", *failed, ""] if failed else [])]


def folders(root: Path) -> list[Path]:
    return sorted(path for path in (root / "results").iterdir() if any(path.glob("*.json")))


def readme(root: Path = HERE) -> str:
    lines = ["# Evidence", "", "Written by `tables.py` from `results/*/*.json`.", ""]
    for folder in folders(root):
        lines += section(folder)
    return "\n".join(lines)


def draw(root: Path = HERE) -> None:
    """Write the figures that the page shows."""
    (root / "figures").mkdir(exist_ok=True)
    for folder in folders(root):
        for name, rows in comparisons(results(folder)).items():
            if drawable(rows):
                curves(rows).savefig(root / "figures" / f"{folder.name}-{name}.png", dpi=150)


if __name__ == "__main__":
    draw()
    (HERE / "README.md").write_text(readme())
