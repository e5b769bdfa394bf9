"""Questions and verdict of the evidence, answered by the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from evidence.differences import Cell, Difference, Interval, difference, interval

CHOSEN: str = yaml.safe_load(Path(__file__).with_name("plan.yaml").read_text())["chosen"]
CASES = {  # number of training cases of each task
    "hippocampus": 140, "sarcoma_ct": 29, "sarcoma_mr": 29, "adrenal": 1188,
    "adrenal_long": 1188, "adrenal_from_both": 1188,
}  # fmt: skip
DATA_SETS = {
    "hippocampus": ("hippocampus",), "sarcoma": ("sarcoma_ct", "sarcoma_mr"),
    "adrenal": ("adrenal",),
}  # fmt: skip
MAIN = ("", "chosen")  # variants of the fine-tuning that the verdict uses
SHARE = 0.1  # "few labels" is at most this share, or 3 cases
NOISE = (20, 40)  # per cent of the captions that are of other slices
NOISY = {  # arms that are trained with such captions
    "info_nce": "InfoNCE",
    "siglip": "SigLIP",
    "transport_sharp": "partial transport at ε 0.03",
    "transport": "partial transport at ε 0.1",
}
QUESTIONS = {  # pairs of arms that differ in one thing
    "Does pre-training help beyond the time it takes?": [
        ("default", "scratch_matched"),
        ("default_reconstruction_100", "scratch_matched"),
        ("default_reconstruction_100", "scratch_matched_100"),
    ],
    "Do the 2D models add to masked reconstruction?": [(CHOSEN, "reconstruction")],
    "Do the 2D models add to it with weights of one?": [("default", "reconstruction")],
    "Does more weight for reconstruction help?": [
        ("default_reconstruction_10", "default"),
        ("default_reconstruction_100", "default"),
    ],
    "Does a mask help?": [
        ("reconstruction", "reconstruction_unmasked"),
        ("default_reconstruction_100", "default_unmasked_100"),
    ],
    "Do the 2D models add to unmasked reconstruction?": [
        ("default_unmasked_100", "reconstruction_unmasked")
    ],
    "Does reconstruction add to alignment?": [
        ("default", "siglip"),
        ("transport_reconstruction", "transport"),
    ],
    "Does text add to images?": [("siglip", "siglip_image"), ("info_nce", "info_nce_image")],
    "Do images add to text?": [("siglip", "siglip_text"), ("info_nce", "info_nce_text")],
    "Does a contrast with other slices add to the cosine?": [
        ("siglip_image", "cosine_image"),
        ("info_nce_image", "cosine_image"),
    ],
    "Does partial transport add to SigLIP?": [
        ("transport", "siglip"),
        ("transport_reconstruction", "default"),
    ],
    "Is the default better than the loss of the paper?": [(CHOSEN, "transport_paper")],
    "Does PSAT add to pooling at the slice?": [
        ("default", "default_pooling"),
        ("default_reconstruction_100", "default_100_pooling"),
    ],
    "Do positions add to planes?": [
        ("default", "default_no_positions"),
        ("default_reconstruction_100", "default_100_no_positions"),
    ],
    "Do more slices a volume help?": [
        ("default", "default_1_slice"),
        ("default", "default_4_slices"),
    ],
    "Do negatives from the same plane and depth help?": [("default_near", "default")],
    "Does the training of the teacher matter?": [
        ("default", "default_untrained_teacher"),
        ("default_reconstruction_100", "default_100_untrained_teacher"),
    ],
    "Does it matter that a caption belongs to its slice?": [("default", "default_shuffled")],
    "Do the captions of a model add to templates?": [("default", "default_template")],
    "Does it matter what the volume shows?": [("siglip", "default_blank")],
    **{
        f"Do captions of other slices (20 %, 40 %) cost {name} anything?": [
            (arm, f"{arm}_noise_{share}") for share in NOISE
        ]
        for arm, name in NOISY.items()
    },
}


def points(value: float, sign: bool = True) -> str:
    """A share in per cent, with one digit."""
    rounded = round(100 * value, 1)
    if not rounded:
        return "0.0"
    return (f"{rounded:+.1f}" if sign else f"{rounded:.1f}").replace("-", "−")


def span(ends: Interval, sign: bool = True) -> str:
    """An interval in per cent."""
    if isnan(ends[0]):
        return "one seed"
    return f"{points(ends[0], sign)} to {points(ends[1], sign)}"


def compared(cell: Cell, one: str, other: str) -> Difference | None:
    """Difference between two arms; None if one was not run."""
    if one not in cell.arms or other not in cell.arms:
        return None
    return difference(cell.arms[one], cell.arms[other])


def labels_text(labels: int | None) -> str:
    """Number of labelled cases, "all" for None."""
    return "all" if labels is None else str(labels)


def place(cell: Cell, backbones: bool) -> str:
    """Task, variant, backbone (if there are several) and number of labels."""
    words = [cell.task, cell.variant, *([cell.backbone] if backbones else [])]
    return f"{' '.join(word for word in words if word)}, {labels_text(cell.labels)} labelled"


def answers(cells: Sequence[Cell]) -> Iterator[str]:
    """A list item for each question: the mean where labels are fewest, then all comparisons."""
    many = len({cell.backbone for cell in cells}) > 1
    for question, pairs in QUESTIONS.items():
        lines, small, better, worse, total = [], [], 0, 0, 0
        for pair in pairs:
            found = [(cell, d) for cell in cells if (d := compared(cell, *pair))]
            fewest: dict[tuple[str, ...], Difference] = {}  # where both arms were run
            for cell, d in found:
                fewest.setdefault(cell.table, d)
            small += [d for d in fewest.values() if len(d.seeds) > 1]
            better += sum(d.both[0] > 0 for _, d in found)
            worse += sum(d.both[1] < 0 for _, d in found)
            total += len(found)
            texts = [f"{place(cell, many)} {points(d.above)} ({span(d.both)})" for cell, d in found]
            if texts:
                lines.append(f"  - `{pair[0]}` − `{pair[1]}`: {'; '.join(texts)}")
        if not small:
            yield f"- **{question}** {'Not known from one seed.' if lines else 'Not run yet.'}"
            yield from lines
            continue
        mean = sum(d.above for d in small) / len(small)
        ends = interval(torch.stack([d.drawn for d in small]).mean(0))
        word = "Yes" if ends[0] > 0 else "On the contrary" if ends[1] < 0 else "Not seen"
        yield (
            f"- **{question}** {word}: {points(mean)} ({span(ends)}) with the fewest labels"
            + (f", mean of {len(small)} comparisons" if len(small) > 1 else "")
            + f"; in all, higher in {better} and lower in {worse} of {total}."
        )
        yield from lines


class DataSetVerdict(NamedTuple):
    """Verdict on one data set; None is not run yet.

    Attributes:
        wins: above scratch with few labels.
        keeps: not below scratch with all labels.
        level: not below masked reconstruction with few labels.
    """

    wins: bool | None
    keeps: bool | None
    level: bool | None


def certain(cell: Cell, arm: str, other: str) -> Difference | None:
    """Difference between two arms if two seeds or more have both."""
    d = compared(cell, arm, other)
    return d if d and len(d.seeds) > 1 else None


def data_set_verdict(cells: Sequence[Cell], arm: str) -> DataSetVerdict:
    """Verdict on an arm in the tasks of a data set: it wins if one task wins and none loses."""
    wins, keeps, level = [], [], []
    for _, group in groupby(cells, key=lambda cell: cell.task):
        here = list(group)
        limit = max(3, round(SHARE * CASES[here[0].task]))
        fewest = [cell for cell in here if cell.labels and cell.labels <= limit][:1]  # decides
        for cell in fewest:
            if d := certain(cell, arm, "scratch"):
                wins.append((d.both[0] > 0, d.both[1] < 0))
            if d := certain(cell, arm, "reconstruction"):
                level.append(d.both[1] >= 0)
        full = (certain(cell, arm, "scratch") for cell in here if cell.labels is None)
        keeps += [d.both[1] >= 0 for d in full if d]
    return DataSetVerdict(
        any(w for w, _ in wins) and not any(loses for _, loses in wins) if wins else None,
        all(keeps) if keeps else None,
        all(level) if level else None,
    )


def main_cells(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that decide each data set: those of the backbone with the most arms."""
    found = {}
    for name, tasks in DATA_SETS.items():
        ours = [cell for task in tasks for cell in cells if cell.task == task]
        backbones = [cell.backbone for cell in ours for _ in cell.arms]
        most = max(dict.fromkeys(backbones), key=backbones.count, default="")
        found[name] = [cell for cell in ours if cell.backbone == most]
    return found


def verdict(cells: Sequence[Cell], arms: Sequence[str] = (CHOSEN,)) -> list[str]:
    """Whether arms reach the aim on test cases: sentences and a table for each budget."""
    lines = []
    for budget in dict.fromkeys(cell.budget for cell in cells if cell.score == "test"):
        here = [c for c in cells if (c.budget, c.score) == (budget, "test") and c.variant in MAIN]
        decisive = main_cells(here)
        if not any(decisive.values()):
            continue
        for arm in arms:
            found = {name: data_set_verdict(ours, arm) for name, ours in decisive.items()}
            wins = [name for name, j in found.items() if j.wins]
            unknown = [name for name, j in found.items() if None in j]
            could = [name for name, j in found.items() if j.wins or j.wins is None]
            lost = [name for name, j in found.items() if False in (j.keeps, j.level)]
            word = "Not complete yet" if unknown else "Reached"
            if lost or len(could) < 2:
                word = "Not reached"
            names = f" ({', '.join(wins)})" if wins else ""
            parts = [
                f"**{word}** (budget `{budget}`): with few labels `{arm}` beats training "
                f"from scratch on {len(wins)} of {len(DATA_SETS)} data sets{names}",
                f"it falls behind (scratch with all labels, or masked reconstruction) on "
                f"{' and '.join(lost)}"
                if lost
                else "",
                f"not complete: {', '.join(unknown)}" if unknown else "",
            ]
            lines += [f"{'; '.join(part for part in parts if part)}.", ""]
        lines += [*_glance([cell for ours in decisive.values() for cell in ours], arms), ""]
    return lines or [
        "**Not known yet**: no run has been scored on test cases. The scores below are those on "
        "held-out development cases, which were used for choices; they are not evidence.",
        "",
    ]


def _glance(cells: Sequence[Cell], arms: Sequence[str]) -> list[str]:
    """Table of differences to scratch and to masked reconstruction, a row for each cell."""
    pairs = [(arm, other) for arm in arms for other in ("scratch", "reconstruction")]
    heads = [f"`{arm}` − {other}" for arm, other in pairs]
    lines = [
        f"| task, network | labels | {' | '.join(heads)} |",
        "|---|---:|" + "---:|" * len(pairs),
    ]
    for cell in cells:
        row = [f"{cell.task}, {cell.backbone}", labels_text(cell.labels)]
        for d in (certain(cell, *pair) for pair in pairs):
            text = f"{points(d.above)} ({span(d.both)})" if d else "–"
            row.append(f"**{text}**" if d and d.both[0] * d.both[1] > 0 else text)
        lines.append(f"| {' | '.join(row)} |")
    return lines
