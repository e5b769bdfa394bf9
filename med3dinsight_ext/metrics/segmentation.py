"""Segmentation metrics: Dice, NSD, HD95 and the confusion of classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice, compute_surface_dice
from monai.metrics import compute_hausdorff_distance as distance
from torch import Tensor

from med3dinsight_ext.metrics.bootstrap import bootstrap

SCORES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm)"}


def case_scores(
    prediction: Tensor,
    label: Tensor,
    spacing: Sequence[float],
    names: Sequence[str],
    tolerance: float = 1.0,
) -> dict[str, dict[str, float]]:
    """Dice, normalised surface Dice and 95th percentile Hausdorff distance of every class.

    All are computed by MONAI. A class in neither map gets NaN and does not count. A class in only
    one of them gets Dice 0, NSD 0, and the diagonal of the volume as its distance. Voxels at the
    border of the volume belong to the surface.

    Args:
        prediction: (1, x, y, z) map of class numbers.
        label: the same, on the same grid.
        spacing: voxel size along x, y, z in mm.
        names: of the classes, by number; the first is the background and is not scored.
        tolerance: distance in mm up to which NSD counts a surface as right.

    Returns:
        class name to ``dice`` and ``nsd`` in [0, 1] and ``hd95`` in mm.

    Raises:
        ValueError: the shapes differ, or a map holds other values than the classes' numbers.

    Examples:
        >>> prediction, label = torch.zeros(2, 1, 4, 4, 4)
        >>> label[:, :2], prediction[:, 1:2] = 1, 1
        >>> case_scores(prediction, label, (1.0, 1.0, 1.0), ["background", "liver"])
        {'liver': {'dice': 0.6666666865348816, 'nsd': 1.0, 'hd95': 1.0}}
    """
    prediction, label = _class_maps(prediction, label, names)
    diagonal = math.hypot(*(n * mm for n, mm in zip(label.shape[1:], spacing, strict=True)))
    prediction, label = _crop(prediction, label)
    scores = {}
    limit = tolerance * (1 + 1e-5)  # headers hold spacings like 1.0000001
    for number, name in enumerate(names[1:], 1):
        pair = [(x == number)[None] for x in (prediction, label)]
        there = [bool(x.any()) for x in pair]
        if not any(there):
            scores[name] = dict.fromkeys(SCORES, math.nan)
        elif not all(there):
            scores[name] = {"dice": 0.0, "nsd": 0.0, "hd95": diagonal}
        else:
            with warnings.catch_warnings():  # MONAI 1.6 warns about a call of its own
                warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
                scores[name] = {
                    "dice": compute_dice(*pair).item(),
                    "nsd": compute_surface_dice(*pair, [limit], True, spacing=spacing).item(),
                    "hd95": distance(*pair, True, percentile=95, spacing=spacing).item(),
                }
    return scores


def _class_maps(prediction: Tensor, label: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Both maps as integers on the CPU, checked."""
    maps = [torch.as_tensor(x).as_subclass(Tensor).cpu() for x in (prediction, label)]
    if maps[0].shape != maps[1].shape or maps[0].ndim != 4 or len(maps[0]) != 1:
        raise ValueError(
            f"prediction and label must share one shape (1, x, y, z), got {tuple(maps[0].shape)} "
            f"and {tuple(maps[1].shape)}; bring both to the image's grid (Invertd), "
            "as class numbers (AsDiscreted)"
        )
    numbers = [x.short() for x in maps]
    for name, x, n in zip(("prediction", "label"), maps, numbers, strict=True):
        if not (n == x).all() or n.min() < 0 or n.max() >= len(names):
            raise ValueError(
                f"{name} must hold class numbers 0 to {len(names) - 1}, got {x.min():g} to "
                f"{x.max():g}; name every class, and let AsDiscreted(argmax=True) make the map"
            )
    return numbers


def _crop(prediction: Tensor, label: Tensor) -> list[Tensor]:
    """Both maps cropped to the foreground of either, with a margin of one voxel where there is one.

    No surface changes: MONAI treats what lies outside a volume as background.
    """
    marked = (prediction[0] != 0) | (label[0] != 0)
    box = [slice(None)]
    for axis in range(3):
        index = marked.amax([a for a in range(3) if a != axis]).nonzero()
        if len(index):
            box.append(slice(max(0, int(index[0]) - 1), int(index[-1]) + 2))
    return [x[tuple(box)] for x in (prediction, label)]


def confusion_counts(prediction: Tensor, label: Tensor, names: Sequence[str]) -> np.ndarray:
    """Voxels of each class of the label by the class that is predicted.

    Args:
        prediction: (1, x, y, z) map of class numbers.
        label: the same, on the same grid.
        names: of the classes, by number; the first is the background.

    Returns:
        (classes, classes) int64: rows are the label's classes, columns the prediction's.

    Raises:
        ValueError: as ``case_scores``.
    """
    maps = _class_maps(prediction, label, names)
    k, voxels = len(names), maps[0].numel()
    found, truth = (x[0].numpy().astype(np.int32) for x in _crop(*maps))
    counts: np.ndarray = np.zeros(k * k, np.int64)
    for slab, right in zip(found, truth, strict=True):  # bincount makes int64 of what it counts
        counts += np.bincount((right * k + slab).ravel(), minlength=k * k)
    counts[0] += voxels - found.size
    return counts.reshape(k, k)


def confusion(counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Shares of each class's voxels that are predicted as each class, ready for JSON.

    Args:
        counts: (classes, classes) from ``confusion_counts``, summed over the cases.
        names: of the classes, the first is the background.

    Returns:
        ``classes``; ``voxels``, the counts; ``share``, each row divided by its sum (None for a
        class without a voxel); ``confused`` and ``missed``, the largest share of a class that is
        predicted as another class and as background: ``label``, ``prediction`` and ``share``, or
        None where there is none.
    """
    total = counts.sum(1, keepdims=True)
    share = counts / total.clip(1)

    def largest(table: np.ndarray) -> dict[str, Any] | None:
        i, j = (int(x) for x in np.unravel_index(table.argmax(), table.shape))
        value = float(table[i, j])
        return {"label": names[i], "prediction": names[j], "share": value} if value > 0 else None

    between, missed = np.zeros_like(share), np.zeros_like(share)
    between[1:, 1:] = share[1:, 1:] * ~np.eye(len(names) - 1, dtype=bool)
    missed[1:, 0] = share[1:, 0]
    rows = [row.tolist() if n else None for row, n in zip(share, total[:, 0], strict=True)]
    return {
        "classes": list(names),
        "voxels": counts.tolist(),
        "share": rows,
        "confused": largest(between),
        "missed": largest(missed),
    }


def worst_class(scores: Mapping[str, Mapping[str, float]]) -> str | None:
    """The class of a case with the lowest Dice, the first if several have it; None if none does."""
    dice = {name: row["dice"] for name, row in scores.items() if not math.isnan(row["dice"])}
    return min(dice, key=dice.__getitem__) if dice else None


def mean_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean of each score over the classes of a case that count; NaN if none does."""
    rows = [[row[key] for key in SCORES] for row in scores.values()]
    return dict(
        zip(SCORES, torch.tensor(rows, dtype=torch.float64).nanmean(0).tolist(), strict=True)
    )


def summary(
    rows: Sequence[Mapping[str, Mapping[str, float]]], draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Statistics of each score over the cases, ready for JSON.

    Args:
        rows: ``case_scores`` of each case.
        draws: bootstrap samples of the cases.
        seed: of the bootstrap.

    Returns:
        ``classes`` (class name to score to statistics) and ``mean`` (score to statistics, of each
        case's mean over its classes). Statistics are ``mean``, ``std`` (of a sample), ``median``,
        ``low`` and ``high`` (95 % interval of the mean), and ``n``, the cases that count; None
        where there are too few cases to define them.
    """

    def statistics(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
        return {key: _statistics([row[key] for row in rows], draws, seed) for key in SCORES}

    return {
        "mean": statistics([mean_scores(row) for row in rows]),
        "classes": {name: statistics([row[name] for row in rows]) for name in rows[0]},
    }


def _statistics(scores: list[float], draws: int, seed: int) -> dict[str, float | None]:
    values = np.array([x for x in scores if not math.isnan(x)])
    n = len(values)
    mean, low, high = bootstrap(torch.from_numpy(values), torch.arange(n), draws, seed=seed)
    found: dict[str, float | None] = dict.fromkeys(("mean", "std", "median", "low", "high"))
    if n > 0:
        found |= {"mean": mean, "median": float(np.median(values))}
    if n > 1:
        found |= {"std": float(values.std(ddof=1)), "low": low, "high": high}
    return found | {"n": n}
