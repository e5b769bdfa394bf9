"""README.md and its figures from results/*.jsonl.gz.

python benchmarks/evidence/tables.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from math import isnan
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from evidence import readout_tables, results  # noqa: E402
from evidence.differences import Cell, Difference, cells, holm, level  # noqa: E402
from evidence.drawing import curves, forest, metric  # noqa: E402
from evidence.questions import (  # noqa: E402
    CHOSEN,
    NOISE,
    NOISY,
    SHARE,
    answers,
    compared,
    labels_text,
    points,
    span,
    verdict,
)
from evidence.results import Record  # noqa: E402
from med3dinsight_ext.io.files import write_atomic  # noqa: E402

ORDER = list(yaml.safe_load((HERE / "plan.yaml").read_text())["arms"])
REFERENCES = ("scratch", "reconstruction")
SCORED = {"test": "test cases", "held_out": "development cases that were held out"}
ARMS: dict[str, str] = yaml.safe_load((HERE / "arms.yaml").read_text())


def pair_cells(d: Difference | None, p: float | None) -> str:
    """Table cells of a difference and its p."""
    if d is None or p is None:
        return "– | –"
    small = "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"{points(d.above)} ({span(d.cases)}; {span(d.both)}) | {small}"


def table(cell: Cell) -> list[str]:
    """A row for each arm: score, and difference to each reference."""
    references = [arm for arm in REFERENCES if arm in cell.arms]
    found = {
        (arm, other): d
        for arm in cell.arms
        for other in references
        if arm not in (other, "scratch") and (d := compared(cell, arm, other))
    }
    p = dict(zip(found, holm([d.p for d in found.values()]), strict=True))
    second = "balanced accuracy" if metric(cell) == "AUROC" else "NSD"
    heads = [f"above {name} | p" for name in references]
    lines = [
        " | ".join(["| arm | seeds", metric(cell), second, *heads]) + " |",
        "|---|" + "---:|" * (3 + 2 * len(references)),
    ]
    for arm, outcomes in cell.arms.items():
        score, ends = level(outcomes)
        other = sum(found.second for found in outcomes) / len(outcomes)
        row = [
            f"| {arm} | {len(outcomes)}",
            f"{points(score, False)} ({span(ends, False)})",
            "–" if isnan(other) else points(other, False),
            *(pair_cells(found.get((arm, r)), p.get((arm, r))) for r in references),
        ]
        lines.append(" | ".join(row) + " |")
    return lines


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pre_training(records: Sequence[Record]) -> list[str]:
    """Cost, loss and retrieval of each arm's pre-trainings, means over seeds."""
    done = [r for r in records if r["bundle"] == "pretrain" and "error" not in r]
    if not done:
        return []
    lines = [
        "Pre-training, means over seeds. Retrieval: R@5 in per cent within modality, plane and "
        "depth, on cases that it did not see; then that of the same student on a volume of zeros, "
        "and chance. An arm without images (or texts) has not trained that head. Losses of "
        "different kinds have different scales.",
        "",
        "| corpus | arm | seeds | steps | CPU s | s | MB | loss | slice → image | zero | chance | "
        "slice → text | zero | chance |",
        "|---|---|" + "---:|" * 12,
    ]
    rank = {arm: i for i, arm in enumerate(ORDER)}

    def key(record: Record) -> tuple[Any, ...]:
        return (
            record["corpus"],
            record["backbone"],
            rank.get(record["arm"], len(rank)),
            record["arm"],
        )

    for (corpus, backbone, _, arm), group in groupby(sorted(done, key=key), key=key):
        runs = list(group)
        cost = [
            mean(r[name] for r in runs)
            for name in ("steps", "cpu_seconds", "train_seconds", "peak_megabytes")
        ]
        loss = mean(r["last_epoch"]["loss"] for r in runs)
        found = []
        for target in ("image", "text"):
            name = f"{target}_within_r5"
            for part, k in (
                ("student", name),
                ("volume_zero", name),
                ("student", f"{name}_chance"),
            ):
                value = mean(r["retrieval"].get(part, {}).get(k) for r in runs)
                found.append("–" if value is None else points(value, False))
        numbers = [f"{value:.0f}" for value in cost if value is not None]
        row = [f"{corpus} {backbone}", arm, str(len(runs)), *numbers, f"{loss:.3f}", *found]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def noise(found: Sequence[Cell], records: Sequence[Record]) -> list[str]:
    """Scores and retrieval of texts by the share of captions that are of other slices."""
    lines = []
    for cell in (c for c in found if any(f"{arm}_noise_{NOISE[0]}" in c.arms for arm in NOISY)):
        shares = [0, *NOISE]
        heads = [f"{what}, {share} %" for what in (metric(cell), "R@5") for share in shares]
        lines += [
            f"Captions of other slices, {cell.task}, {cell.backbone}, "
            f"{labels_text(cell.labels)} labelled: scores, and R@5 of slice → text as above.",
            "",
            f"| loss | {' | '.join(heads)} |",
            "|---|" + "---:|" * len(heads),
        ]
        for base, name in NOISY.items():
            arms = [base, *(f"{base}_noise_{share}" for share in NOISE)]
            scores = [level(cell.arms[arm])[0] if arm in cell.arms else None for arm in arms]
            recall = [
                mean(
                    r["retrieval"]["student"].get("text_within_r5")
                    for r in records
                    if r.get("arm") == arm and "retrieval" in r
                )
                for arm in arms
            ]
            row = ["–" if x is None else points(x, False) for x in [*scores, *recall]]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines.append("")
    return lines


def failures(records: Sequence[Record]) -> list[str]:
    """Errors of failed runs and of earlier tries."""
    lines = [f"- {r['name']}: {r['error']}" for r in records if "error" in r]
    for r in records:
        lines += [f"- {r['name']}, before it went well: {e}" for e in r.get("failed_before", [])]
    return ["Failed:", "", *lines, ""] if lines else []


def panels(found: Sequence[Cell]) -> list[list[Cell]]:
    """Groups of cells that differ in the number of labels alone."""
    return [list(group) for _, group in groupby(found, key=lambda cell: cell.table)]


def figures(found: Sequence[Cell]) -> dict[str, tuple[str, list[list[Cell]]]]:
    """Figures of a budget: what each shows, and its panels, by the name of its file."""
    made = {}
    grown = [g for g in panels(found) if len(g) > 1]
    against = [
        g
        for group in panels(found)
        if (g := [c for c in group if "scratch" in c.arms and len(c.arms) > 1])
    ]
    if against:
        made["forest"] = ("points above scratch", against)
    if grown:
        made["curves"] = ("scores by labelled cases", grown)
    return made


def frozen(cell: Cell, records: Sequence[Record]) -> bool:
    """Whether the runs of a table fit the head alone."""
    keys = ("task", "backbone", "variant", "labels")
    ours = [r for r in records if all(r.get(key) == getattr(cell, key) for key in keys)]
    return any(r["settings"].get("mode") == "linear" for r in ours)


def section(budget: str, found: Sequence[Cell], records: Sequence[Record]) -> list[str]:
    """Figures, tables, pre-trainings and failures of a budget."""
    scores = dict.fromkeys(r["score"] for r in records if "score" in r)
    scored = " and ".join(SCORED[score] for score in scores)
    lines = [f"### Budget {budget}" + (f", scored on {scored}" if scored else ""), ""]
    for name, (shown, _) in figures(found).items():
        lines += [f"![{budget}: {shown}](figures/{budget}-{name}.png)", ""]
    for cell in found:
        about = f"{cell.task}, {cell.backbone}, {labels_text(cell.labels)} labelled"
        about += f", {cell.variant}" if cell.variant else ""
        about += ", encoder frozen" if frozen(cell, records) else ""
        lines += [f"**{about}**", "", *table(cell), ""]
    return [*lines, *pre_training(records), *noise(found, records), *failures(records)]


def costs(budgets: dict[str, list[Record]]) -> list[str]:
    """Command, time and device of each budget."""
    lines = [
        "## Commands and costs",
        "",
        "From nothing but the data folder; what has its JSON is not repeated. Then `python "
        "benchmarks/evidence/tables.py` writes this page.",
        "",
        "| command | runs | failed | hours, summed over runs | CPU hours of training | device | "
        "commit |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for budget, records in budgets.items():
        failed = sum("error" in r for r in records)
        hours = sum(r["seconds"] for r in records) / 3600
        cpu = sum(r.get("cpu_seconds", 0) for r in records) / 3600
        words = [", ".join(sorted({r[key] for r in records})) for key in ("device", "commit")]
        lines.append(
            f"| `python benchmarks/evidence/run.py ../shared/data --budget {budget}` | "
            f"{len(records)} | {failed} | {hours:.2f} | {cpu:.2f} | {' | '.join(words)} |"
        )
    return lines


def readme(root: Path = HERE) -> str:
    """The page: page.md filled with the runs of ``root/results``."""
    budgets = by_budget(root)
    found = {name: cells(name, records, ORDER) for name, records in budgets.items()}
    tested = [c for group in found.values() for c in group if c.score == "test"]
    held = [c for group in found.values() for c in group if c.score != "test"]
    present = {record.get("arm") for records in budgets.values() for record in records}
    sections: dict[bool, list[str]] = {True: [], False: []}  # by whether there are test cases
    for name, records in budgets.items():
        on_test = any(cell.score == "test" for cell in found[name])
        sections[on_test] += section(name, found[name], records)
    held_answers = [line for line in answers(held) if not line.endswith("Not run yet.")]
    summary = "<details><summary>The questions above, on these runs</summary>"
    shown = [arm for arm in ORDER if arm in present]
    readouts = sorted(root.glob("readout-*.json"))
    blocks: dict[str, Iterable[str]] = {
        "verdict": verdict(tested, list(dict.fromkeys([CHOSEN, "default"]))),
        "arms": [f"| {arm} | {ARMS[arm]} |" for arm in shown],
        "baseline": baseline(root),
        "answers": answers(tested),
        "findings": prose(root / "findings.md"),
        "tested": sections[True] if tested else ["Not run yet."],
        "choices": prose(root / "choices.md"),
        "readouts": chain.from_iterable(map(readout_tables.table, readouts)),
        "held_answers": [summary, "", *held_answers, "", "</details>"] if held else [],
        "held": sections[False],
        "costs": costs(budgets),
    }
    text = {name: "\n".join(lines).strip("\n") for name, lines in blocks.items()}
    page = (HERE / "page.md").read_text().format(share=SHARE, chosen=CHOSEN, **text)
    return re.sub(r"\n{3,}", "\n\n", page)  # of blocks that are empty


def baseline(root: Path) -> list[str]:
    """Table of ../results/frozen.json: features of the teacher, without any 3D training."""
    path = root.parent / "results" / "frozen.json"
    if not path.exists():
        return []
    arms = json.loads(path.read_text())["arms"]
    lines = [
        "## Baseline without 3D training",
        "",
        "Logistic regression on the frozen teacher's features of 12 slices, on adrenal's test "
        "cases, with the same labelled cases "
        "([more](../README.md#frozen-2d-features-without-3d-training)). AUROC with the interval "
        "over cases, then points above the 3D arms with the interval over cases and seeds.",
        "",
        "| labels | ImageNet weights | random weights | above `scratch` | above `reconstruction` | "
        f"above `{CHOSEN}` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for count in arms["trained"]:
        row = [count if count != "None" else "all"]
        for arm in ("trained", "random"):
            found = arms[arm][count]
            ends = (found["low"], found["high"])
            row.append(f"{points(found['mean'], False)} ({span(ends, False)})")
        for arm in (*REFERENCES, CHOSEN):
            gain = arms[arm][count]["trained_above"]
            row.append(f"{points(gain['mean'])} ({span((gain['low'], gain['high']))})")
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def prose(path: Path) -> list[str]:
    """Lines of a file that people wrote; none if it does not exist."""
    return path.read_text().splitlines() if path.exists() else []


def by_budget(root: Path) -> dict[str, list[Record]]:
    """Records of each budget."""
    folder = root / "results"
    found = {name: list(results.read(name, folder).values()) for name in results.budgets(folder)}
    return {name: records for name, records in found.items() if records}


def draw(root: Path = HERE) -> None:
    """Write the figures of the page."""
    (root / "figures").mkdir(exist_ok=True)
    for budget, records in by_budget(root).items():
        for name, (_, groups) in figures(cells(budget, records, ORDER)).items():
            figure = curves(groups) if name == "curves" else forest(groups, ORDER)
            figure.savefig(root / "figures" / f"{budget}-{name}.png", dpi=150)


if __name__ == "__main__":
    draw()
    text = readme()
    write_atomic(HERE / "README.md", lambda draft: draft.write_text(text))
