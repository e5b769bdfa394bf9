"""README.md and its figures from results/*/*.json.

python benchmarks/evidence/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import Any

import yaml
from differences import Cell, Difference, Record, cells, holm, level, results
from drawing import curves, forest, metric
from questions import (
    CHOSEN,
    NOISE,
    NOISY,
    SHARE,
    answers,
    compared,
    few,
    points,
    span,
    verdict,
)

from med3dinsight_ext.io.files import write_atomic

HERE = Path(__file__).parent
ORDER = list(yaml.safe_load((HERE / "plan.yaml").read_text())["arms"])
REFERENCES = ("scratch", "reconstruction")
JUDGED = {"test": "test cases", "held_out": "development cases that were held out"}
ARMS = {
    "scratch": "no pre-training",
    "scratch_matched": "no pre-training; trained for as long as `default` took for both",
    "scratch_matched_100": "the same of `default_reconstruction_100`",
    "reconstruction": "masked reconstruction alone",
    "reconstruction_unmasked": "reconstruction of what it sees, alone",
    "cosine_image": "cosine to the image embeddings alone",
    "info_nce_image": "InfoNCE with images",
    "info_nce_text": "InfoNCE with texts",
    "info_nce": "InfoNCE with both",
    "siglip_image": "SigLIP with images",
    "siglip_text": "SigLIP with texts",
    "siglip": "SigLIP with both",
    "transport_paper": "partial transport as the papers have it: ε 0.03, mass 0.95, Mahalanobis; "
    "unmasked reconstruction",
    "transport": "partial transport, ε 0.1, cosine",
    "transport_sharp": "partial transport, ε 0.03, cosine",
    "transport_reconstruction": "`transport` and masked reconstruction",
    "default": "SigLIP with both, and masked reconstruction, at weights of one: the defaults of "
    "bundles/pretrain until budget `choice`",
    "residual_image": "regression to what of the image embedding plane and depth do not tell",
    "residual": "the same with both, and masked reconstruction",
    "regression_image": "regression to standardised image embeddings alone (not kept)",
    "regression": "the same with both, and masked reconstruction (not kept)",
    "default_shuffled": "control: all captions are of other slices",
    "default_template": "control: texts that name modality, plane and depth alone",
    "default_untrained_teacher": "control: a teacher with random weights",
    "default_blank": "control: `siglip` whose student sees zeros",
    "default_1_slice": "1 slice a volume and step in place of 16",
    "default_4_slices": "4 slices a volume and step in place of 16",
    "default_near": "negatives of the same plane and depth alone",
    **{
        f"{arm}_reconstruction_{weight}": f"{losses}, and {weight} times masked reconstruction"
        for arm, losses in {"default": "SigLIP with both", "image": "SigLIP with images"}.items()
        for weight in (10, 100)
    },
    "default_reconstruction_100": "the defaults of bundles/pretrain: SigLIP with both, and masked "
    "reconstruction at a weight of 100",
    "default_unmasked_100": "the same that sees all that it reconstructs",
    "default_pooling": "in PSAT's place the mean of the features at the slice",
    "default_no_positions": "PSAT asked about planes alone",
    **{
        f"default_100_{part}": f"`default_{part}` with the reconstruction weighed by 100"
        for part in ("untrained_teacher", "pooling", "no_positions")
    },
    **{
        f"{arm}_noise_{share}": f"`{arm}`, {share} % of the captions are of other slices"
        for arm in NOISY
        for share in NOISE
    },
}
RULE = f"""The aim counts as reached if, on test cases, the default is above scratch on two of the
three data sets with few labels (at most {SHARE:.0%}, or 3 cases; the fewest that were run decide)
by an interval over cases and seeds that excludes zero, on none below scratch with all labels, and
on none below masked reconstruction with few. Of the sarcomas, CT or MR must win and neither may
lose. The default is `{CHOSEN}`; until budget `choice` it was `default`. In the table
stand points above another arm, with the 95 % interval over cases and seeds; bold excludes zero."""
SET_UP = """## Question and set-up

Does pre-training that a frozen 2D image model and a frozen text model guide improve a 3D network,
when, and which part of it does? All arms of a table have one network, one schedule and, a seed, the
same labelled cases; they differ in what `plan.yaml` says of them. The teacher comes by pip:
EfficientNet-Lite0 (ImageNet) at 128 pixels for images, MiniLM for the captions that a multimodal
model wrote. Pre-training sees the images of the development cases and no label of them. Whatever
was chosen was chosen on development cases that were held out."""
READING = """Scores are per cent, differences are points. A score is the mean over seeds, with its
95 % interval over cases. Differences are paired by case and by seed: the first interval is over
cases (how sure for these trainings), the second over cases and seeds (how sure for the next one);
2000 bootstrap draws each. p is of a paired test over cases, averaged over seeds: for Dice the signs
of the cases' differences are flipped at random (10 000 times), for AUROC it is DeLong's; corrected
by Holm for all p of a table. In the figures thick lines are intervals over cases, thin ones over
cases and seeds, and marks go from the fewest labels (filled) to the most (open). Where a table says
so the encoder stays frozen and a linear head is fitted to its features; so with the 12 labels of
adrenal, but not with more."""
THREATS = """## Threats to validity

- **Small**: small networks, hundreds of steps, low resolution and at most a few hundred volumes. A
  pre-training of this size may show nothing that a long one would show, and the other way round.
- **The teacher is no medical model.** An ImageNet tower at 128 pixels sees less in a slice than
  BiomedCLIP or MedSigLIP would; a line of `plan.yaml` changes it. Captions are those of one
  multimodal model, and there are some for a part of the slices alone.
- **In-domain**: pre-training and fine-tuning use the same volumes' images, so that gains on other
  data may be smaller. Test cases are in neither.
- **Three to five seeds** make the interval over seeds coarse, and drawing so few again makes it too
  narrow. A seed also chooses the labelled cases, so that with few labels it is much of the spread.
- **Short schedules**: 250 steps of fine-tuning leave the transformer far from what it can reach, so
  that its gain with few labels may be one of time.
- **One fine-tuning schedule** for all arms: what is best for random weights need not be for others.
- **Few test cases** of sarcoma (12 CT, 12 MR): only large differences can be seen there.
- **Many comparisons**: p is corrected within a table and not over tables; the answers to the
  questions are not corrected at all.
- **Matched compute** counts processor (or device) seconds of the trainings; making the teacher's
  embeddings once is not in it."""


def pair_cells(d: Difference | None, p: float | None) -> str:
    if d is None or p is None:
        return "– | –"
    small = "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"{points(d.above)} ({span(d.cases)}; {span(d.both)}) | {small}"


def table(cell: Cell) -> list[str]:
    """An arm a row: score, and what it is above each reference."""
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
    ]  # fmt: skip
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
            f"Captions of other slices, {cell.task}, {cell.backbone}, {few(cell.labels)} labelled: "
            "scores, and R@5 of slice → text as above.", "",
            f"| loss | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads),
        ]  # fmt: skip
        for base, name in NOISY.items():
            arms = [base, *(f"{base}_noise_{share}" for share in NOISE)]
            scores = [level(cell.arms[arm])[0] if arm in cell.arms else None for arm in arms]
            recall = [
                mean(r["retrieval"]["student"].get("text_within_r5") for r in records
                     if r.get("arm") == arm and "retrieval" in r)
                for arm in arms
            ]  # fmt: skip
            row = ["–" if x is None else points(x, False) for x in [*scores, *recall]]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines.append("")
    return lines


def failures(records: Sequence[Record]) -> list[str]:
    lines = [f"- {r['name']}: {r['error']}" for r in records if "error" in r]
    for r in records:
        lines += [f"- {r['name']}, before it went well: {e}" for e in r.get("failed_before", [])]
    return ["Failed:", "", *lines, ""] if lines else []


def panels(found: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ in the number of labels alone."""
    return [list(group) for _, group in groupby(found, key=lambda cell: cell.table)]


def figures(found: Sequence[Cell]) -> dict[str, tuple[str, list[list[Cell]]]]:
    """What can be drawn of a budget: name of the file, what it shows, its panels."""
    made = {}
    grown = [g for g in panels(found) if len(g) > 1]
    against = [
        g for group in panels(found)
        if (g := [c for c in group if "scratch" in c.arms and len(c.arms) > 1])
    ]  # fmt: skip
    if against:
        made["forest"] = ("points above scratch", against)
    if grown:
        made["curves"] = ("scores by labelled cases", grown)
    return made


def frozen(cell: Cell, records: Sequence[Record]) -> bool:
    """Whether a table's runs fit a head alone."""
    keys = ("task", "backbone", "variant", "labels")
    ours = [r for r in records if all(r.get(key) == getattr(cell, key) for key in keys)]
    return any(r["settings"].get("mode") == "linear" for r in ours)


def section(folder: str, found: Sequence[Cell], records: Sequence[Record]) -> list[str]:
    """Figures, tables, pre-trainings and failures of a budget."""
    scores = dict.fromkeys(r["score"] for r in records if "score" in r)
    judged = " and ".join(JUDGED[score] for score in scores)
    lines = [f"### Budget {folder}" + (f", judged on {judged}" if judged else ""), ""]
    for name, (shown, _) in figures(found).items():
        lines += [f"![{folder}: {shown}](figures/{folder}-{name}.png)", ""]
    for cell in found:
        about = f"{cell.task}, {cell.backbone}, {few(cell.labels)} labelled"
        about += f", {cell.variant}" if cell.variant else ""
        about += ", encoder frozen" if frozen(cell, records) else ""
        lines += [f"**{about}**", "", *table(cell), ""]
    return [*lines, *pre_training(records), *noise(found, records), *failures(records)]


def costs(budgets: dict[str, list[Record]]) -> list[str]:
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
    for folder, records in budgets.items():
        failed = sum("error" in r for r in records)
        hours = sum(r["seconds"] for r in records) / 3600
        cpu = sum(r.get("cpu_seconds", 0) for r in records) / 3600
        words = [", ".join(sorted({r[key] for r in records})) for key in ("device", "commit")]
        lines.append(
            f"| `python benchmarks/evidence/run.py ../shared/data --budget {folder}` | "
            f"{len(records)} | {failed} | {hours:.2f} | {cpu:.2f} | {' | '.join(words)} |"
        )
    return lines


def prose(path: Path) -> list[str]:
    """What people wrote of these results, if they did."""
    return [path.read_text()] if path.exists() else []


def readout(path: Path) -> list[str]:
    """The table of a file that readout.py wrote."""
    found = json.loads(path.read_text())["auroc"]
    counts = list(found["scratch"])
    lines = [
        f"### Read-outs of budget {path.stem.removeprefix('readout-')}", "",
        "Linear probes on adrenal, judged on held-out development cases: AUROC, mean of "
        f"{len(found['scratch'][counts[0]])} draws of labelled cases and of the pre-trainings, and "
        "the least and greatest of several pre-trainings. The teacher's row is the mean of its "
        "embeddings over a volume's slices, scratch is a fresh network; the others are the deepest "
        "features of pre-trained ones. Written by `readout.py`.", "",
        "| features | pre-trainings | " + " | ".join(f"{n} labelled" for n in counts) + " |",
        "|---" + "|---:" * (1 + len(counts)) + "|",
    ]  # fmt: skip
    for name, group in groupby(sorted(found, key=_network), key=_network):
        runs = list(group)
        row = [name, str(len(runs)) if name not in ("scratch", "teacher") else "–"]
        for n in counts:
            means = [sum(found[run][n]) / len(found[run][n]) for run in runs]
            ends = f" ({span((min(means), max(means)), False)})" if len(runs) > 1 else ""
            row.append(points(sum(means) / len(means), False) + ends)
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *_ranked(found)]


def _ranked(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Arms with three pre-trainings or more on each of two corpora, the best first."""
    scores: dict[str, dict[str, list[float]]] = {}  # by arm and corpus, one a pre-training
    for name, by_labels in found.items():
        if "-pretrain-s" in name:
            corpus, _, arm = _network(name).split("-")
            draws = [sum(values) / len(values) for values in by_labels.values()]
            scores.setdefault(arm, {}).setdefault(corpus, []).append(mean(draws) or 0)
    means, errors = {}, {}
    for arm, corpora in scores.items():
        if len(corpora) > 1 and min(map(len, corpora.values())) > 2:
            means[arm] = sum(map(statistics.mean, corpora.values())) / len(corpora)
            parts = [statistics.variance(v) / len(v) for v in corpora.values()]
            errors[arm] = sum(parts) ** 0.5 / len(corpora)
    if not means:
        return []
    best = sorted(means, key=lambda arm: -means[arm])
    said = (f"`{arm}` {points(means[arm], False)} ± {points(errors[arm], False)}" for arm in best)
    return [f"Means of both corpora and both columns, ± standard error: {', '.join(said)}.", ""]


def _network(name: str) -> str:
    """A pre-training's name without its seed."""
    return name.partition("-pretrain-s")[0]


def readme(root: Path = HERE) -> str:
    budgets = by_budget(root)
    found = {name: cells(name, records, ORDER) for name, records in budgets.items()}
    tested = [c for group in found.values() for c in group if c.score == "test"]
    held = [c for group in found.values() for c in group if c.score != "test"]
    present = {record.get("arm") for records in budgets.values() for record in records}
    lines = ["# Evidence: does it help, when, and which part?", ""]
    lines += verdict(tested, list(dict.fromkeys([CHOSEN, "default"])))
    lines += [RULE, "", "Written by `tables.py` from `results/*/*.json`.", "", SET_UP, ""]
    lines += ["| arm | what it is |", "|---|---|"]
    shown = [arm for arm in ORDER if arm in present]
    lines += [f"| {arm} | {ARMS.get(arm, 'as `plan.yaml` says')} |" for arm in shown] + [""]
    lines += [
        "## Which part?", "",
        "On test cases. Points and 95 % intervals over cases and seeds; an interval that excludes "
        "zero decides. Means are over tasks, backbones, variants and pairs of arms.", "",
        *answers(tested), "",
    ]  # fmt: skip
    lines += [*prose(root / "findings.md"), "## Results", "", READING, ""]
    for name, records in budgets.items():
        if any(cell.score == "test" for cell in found[name]):
            lines += section(name, found[name], records)
    if not tested:
        lines += ["Not run yet.", ""]
    lines += [
        "## Choices", "",
        "Judged on development cases; kept apart, since these runs favour what they chose.", "",
    ]  # fmt: skip
    lines += prose(root / "choices.md")
    for path in sorted(root.glob("readout-*.json")):
        lines += readout(path)
    if held:
        lines += ["<details><summary>The questions above, on these runs</summary>", ""]
        lines += [line for line in answers(held) if not line.endswith("Not run yet.")]
        lines += ["", "</details>", ""]
    for name, records in budgets.items():
        if not any(cell.score == "test" for cell in found[name]):
            lines += section(name, found[name], records)
    return "\n".join([*lines, THREATS, "", *costs(budgets), ""])


def by_budget(root: Path) -> dict[str, list[Record]]:
    folders = sorted(path for path in (root / "results").iterdir() if any(path.glob("*.json")))
    return {path.name: results(path) for path in folders}


def draw(root: Path = HERE) -> None:
    """Write the figures that the page shows."""
    (root / "figures").mkdir(exist_ok=True)
    for folder, records in by_budget(root).items():
        for name, (_, groups) in figures(cells(folder, records, ORDER)).items():
            figure = curves(groups) if name == "curves" else forest(groups, ORDER)
            figure.savefig(root / "figures" / f"{folder}-{name}.png", dpi=150)


if __name__ == "__main__":
    draw()
    text = readme()
    write_atomic(HERE / "README.md", lambda draft: draft.write_text(text))
