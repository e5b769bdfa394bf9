"""Simulated corrections of a case, and their statistics, for ``bench_clicks.py``."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import nibabel as nib
import numpy as np
import torch

from common import spread
from med3dinsight_ext.metrics.bootstrap import bootstrap
from med3dinsight_ext.metrics.segmentation import case_scores, summary
from med3dinsight_ext.training.click_simulation import corrective_clicks

CLICKS = 10  # most of a case, when one a step
ROUNDS = 5
GOAL = 0.85  # mean Dice that clicks are counted to
Answer = Callable[[dict], np.ndarray]


def next_clicks(found: np.ndarray, label: np.ndarray, classes: int, each: bool) -> list:
    """The next click, or the next click for each class in the errors that it is part of."""
    if not each:
        return corrective_clicks(found, label)
    clicks = []
    for number in range(1, classes):
        concerned = (found == number) | (label == number)
        clicks += corrective_clicks(np.where(concerned, found, label), label)
    return clicks


def mean_dice(found: np.ndarray, label: np.ndarray, classes: int) -> float:
    """Mean over the classes that the label has."""
    there = [number for number in range(1, classes) if (label == number).any()]
    shares = [
        2 * ((found == n) & (label == n)).sum() / ((found == n).sum() + (label == n).sum())
        for n in there
    ]
    return float(np.mean(shares))


def effect(before: np.ndarray, after: np.ndarray, label: np.ndarray, click: Any) -> list[int]:
    """Of a click: its class, whether it is followed, voxels that it corrects and that it spoils."""
    number, place = click
    right, was_right = after == label, before == label
    return [
        int(number),
        int(after[tuple(place)] == number),
        int((right & ~was_right).sum()),
        int((~right & was_right).sum()),
    ]


def correct(
    answer: Answer, item: dict, names: list[str], steps: int, each: bool
) -> dict[str, list]:
    """Dice of a case after 0 to ``steps`` steps, all scores of the first and of step ``ROUNDS``.

    Seconds are those of the answers with clicks.
    """
    file: Any = nib.load(item["label"])
    label = np.asarray(file.dataobj).astype(int)
    spacing = [float(mm) for mm in file.header.get_zooms()[:3]]
    clicks: dict[str, list] = {name: [] for name in names}
    case: dict[str, list] = {"dice": [], "scores": [], "seconds": [], "clicks": [], "effects": []}
    before, latest = label, list[Any]()
    for step in range(steps + 1):
        begin = perf_counter()
        found = answer({key: item[key] for key in ("image", "modality")} | clicks)
        case["seconds"] += [perf_counter() - begin] if step else []
        case["dice"].append(mean_dice(found, label, len(names)))
        case["clicks"].append(sum(map(len, clicks.values())))
        if len(latest) == 1:
            gain = case["dice"][-1] - case["dice"][-2]
            case["effects"].append([*effect(before, found, label, latest[0]), gain])
        if step in (0, ROUNDS):
            ours, theirs = (torch.from_numpy(x)[None] for x in (found, label))
            case["scores"].append(case_scores(ours, theirs, spacing, names))
        before, latest = found, next_clicks(found, label, len(names), each)
        for number, place in latest:
            clicks[names[number]].append(list(place))
    return case


def interval(values: list[float]) -> dict[str, float]:
    """Mean with its 95 % interval over cases, by bootstrap."""
    found = bootstrap(torch.tensor(values), torch.arange(len(values)))
    return {key: float(value) for key, value in found._asdict().items()}


def effects(rows: list[list[float]], names: list[str]) -> dict[str, dict[str, float]]:
    """Means over the clicks of a class and over all."""
    found = {}
    for name, chosen in [
        *((name, [row for row in rows if row[0] == n]) for n, name in enumerate(names)),
        ("all", rows),
    ]:
        if chosen:
            _, followed, corrected, spoilt, gain = np.mean(chosen, 0).tolist()
            found[name] = {
                "clicks": len(chosen),
                "followed": followed,
                "corrected": corrected,
                "spoilt": spoilt,
                "gain": gain,
            }
    return found


def statistics(cases: list[dict[str, list]], names: list[str]) -> dict[str, Any]:
    """Dice after each step, the gain, the number of clicks to ``GOAL``, seconds of an answer."""
    dice = [case["dice"] for case in cases]
    last = min(ROUNDS, len(dice[0]) - 1)
    needed = [next((n for n, x in enumerate(row) if x >= GOAL), CLICKS) for row in dice]
    seconds = [x for case in cases for x in case["seconds"]]
    return {
        "dice": [interval([row[n] for row in dice]) for n in range(len(dice[0]))],
        "gain": interval([row[last] - row[0] for row in dice]),
        "clicks": [float(np.mean([case["clicks"][n] for case in cases])) for n in range(last + 1)],
        "noc": {
            "goal": GOAL,
            "at_most": CLICKS,
            **interval([float(n) for n in needed]),
            "failed": sum(max(row) < GOAL for row in dice),
        },
        "scores": [
            summary([case["scores"][n] for case in cases]) for n in range(len(cases[0]["scores"]))
        ],
        "seconds": spread(seconds) if seconds else None,
        "effects": effects([row for case in cases for row in case["effects"]], names),
        "dice_of_cases": [[round(x, 5) for x in row] for row in dice],
    }
