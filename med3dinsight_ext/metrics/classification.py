"""Classification metrics: AUROC, balanced accuracy, F1 and calibration, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import EpochMetric
from monai.metrics import compute_roc_auc
from torch import Tensor

from med3dinsight_ext.metrics.bootstrap import percentiles, resamples

BINS = 15  # of the calibration, Guo et al. (2017), arXiv:1706.04599
SCORES = {
    "auroc": "AUROC",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "ece": "Expected calibration error",
}


def scores(
    probability: Tensor, label: Tensor, names: Sequence[str], bootstraps: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Scores of class probabilities, with 95 % percentile intervals over resampled cases.

    Of two classes, ``auroc`` and ``f1`` are those of the second; of more, the mean over the
    classes for which they are defined. What is undefined is NaN.

    Args:
        probability: (n, k), rows sum to 1.
        label: (n,) long, classes in [0, k).
        names: k classes.
        bootstraps: resamplings; 0 makes all intervals NaN.
        seed: of `resamples`.

    Returns:
        ``auroc``, ``balanced_accuracy``, ``f1``, ``ece``, each with ``_low`` and ``_high``;
        ``accuracy``, ``n``, ``confusion`` (rows are the truth) and ``per_class``.

    Raises:
        ValueError: names repeat, shapes differ, rows are no probabilities, or a label is not in
            [0, k).

    Examples:
        >>> probability = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
        >>> found = scores(probability, torch.tensor([0, 0, 1, 1]), ["healthy", "ill"])
        >>> found["auroc"], found["f1"], found["confusion"]
        (0.75, 0.5, [[1, 1], [1, 1]])
    """
    probability, label = probability.detach().cpu().double(), label.detach().cpu().long()
    _check(probability, label, names)
    n, k = probability.shape
    once = torch.ones(n, 1).double()
    table = _confusion(probability, label, once)[..., 0]
    hit, true, called = table.diagonal(), table.sum(1), table.sum(0)
    columns = {
        "auroc": torch.cat([auroc_of(probability, label, once, c) for c in range(k)]),
        "sensitivity": hit / true,
        "specificity": (n - true - called + hit) / (n - true),
        "f1": 2 * hit / (true + called),
    }
    per_class = {
        name: {key: float(column[c]) for key, column in columns.items()} | {"n": int(true[c])}
        for c, name in enumerate(names)
    }
    draws = []
    for rows in resamples(n, bootstraps, seed):
        weight = once.new_zeros(n, len(rows)).scatter_add_(0, rows.T, once.expand(rows.T.shape))
        draws.append(_measure(probability, label, weight))
    result: dict[str, Any] = {}
    for key, value in _measure(probability, label, once).items():
        low, high = math.nan, math.nan
        if bootstraps and n > 1:  # one case resampled is the same case
            low, high = percentiles(torch.cat([draw[key] for draw in draws]))
        result |= {key: float(value), f"{key}_low": low, f"{key}_high": high}
    accuracy, confusion = float(hit.sum() / n), table.long().tolist()
    return result | {"accuracy": accuracy, "n": n, "confusion": confusion, "per_class": per_class}


def _check(probability: Tensor, label: Tensor, names: Sequence[str]) -> None:
    n, k = len(label), len(names)
    if k < 2 or len(set(names)) < k:
        raise ValueError(f"names must be two or more different ones, got {list(names)}; rename")
    if n == 0 or probability.shape != (n, k):
        raise ValueError(
            f"probability must be ({n or '>= 1'}, {k}) for {n} labels and {k} names, got "
            f"{tuple(probability.shape)}; give the network {k} outputs and each case a label"
        )
    if not bool(((probability.sum(1) - 1).abs() < 0.01).all() and (probability >= 0).all()):
        raise ValueError(
            f"probability must be >= 0 and sum to 1 in each row, got {probability.min():.3g} to "
            f"{probability.max():.3g}; apply Activationsd(softmax=True) to the prediction"
        )
    if not 0 <= int(label.min()) <= int(label.max()) < k:
        raise ValueError(
            f"label must be in [0, {k}), got {int(label.min())} to {int(label.max())}; "
            "correct the labels or name all classes"
        )


def _measure(probability: Tensor, label: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The scores that get intervals, each (b,), for b weightings of the cases (n, b)."""
    k = probability.shape[1]
    table = _confusion(probability, label, weight)
    hit, true, called = table.diagonal().T, table.sum(1), table.sum(0)
    f1 = 2 * hit / (true + called)
    classes = range(k) if k > 2 else (1,)
    auroc = torch.stack([auroc_of(probability, label, weight, c) for c in classes])
    return {
        "auroc": auroc.nanmean(0),
        "balanced_accuracy": (hit / true).nanmean(0),
        "f1": f1.nanmean(0) if k > 2 else f1[1],
        "ece": calibration(probability, label, weight)[0],
    }


def _confusion(probability: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Confusion matrices (k, k, b), rows are the truth, of b weightings of the cases (n, b)."""
    k = probability.shape[1]
    place = label * k + probability.argmax(1)
    return weight.new_zeros(k * k, weight.shape[1]).index_add_(0, place, weight).view(k, k, -1)


def auroc_of(probability: Tensor, label: Tensor, weight: Tensor, c: int) -> Tensor:
    """Area under the ROC curve of class ``c`` against the rest, for b weightings of the cases.

    Args:
        probability: (n, k).
        label: (n,) long.
        weight: (n, b) double, how often each case counts.
        c: class, in [0, k).

    Returns:
        (b,) share of pairs in the right order, ties half; NaN without positives or negatives.
    """
    score, group = probability[:, c].unique(return_inverse=True)
    positive = (label == c)[:, None]
    zeros = weight.new_zeros(len(score), weight.shape[1])
    hits = zeros.index_add(0, group, weight * positive)
    misses = zeros.index_add(0, group, weight * ~positive)
    below = misses.cumsum(0) - misses / 2
    return (hits * below).sum(0) / (hits.sum(0) * misses.sum(0))


def calibration(probability: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Expected calibration error over 15 bins, for b weightings of the cases.

    Args:
        probability: (n, k).
        label: (n,) long.
        weight: (n, b) double, how often each case counts.

    Returns:
        The error (b,), and per bin the sums of weight, confidence and accuracy (3, bins, b).
    """
    confidence, prediction = probability.max(1)
    bin_ = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    parts = (torch.ones_like(confidence), confidence, (prediction == label).double())
    sums = weight.new_zeros(3, BINS, weight.shape[1])
    for total, part in zip(sums, parts, strict=True):
        total.index_add_(0, bin_, weight * part[:, None])
    return (sums[1] - sums[2]).abs().sum(0) / weight.sum(0), sums


def class_scores(probability: Tensor, labels: Tensor) -> dict[str, float]:
    """Balanced accuracy and AUROC, without intervals, as the mean over the classes present.

    Args:
        probability: (m, classes).
        labels: (m,) long; at least two classes.

    Raises:
        ValueError: ``labels`` holds fewer than two classes, or one without a probability.
    """
    present = labels.unique()
    if len(present) < 2:
        raise ValueError(
            f"labels must hold two classes, got only class {present.tolist()}; "
            "hold out cases of both by another seed or a larger val_fraction, or none by "
            "val_fraction 0; test on a split that has both"
        )
    if int(present.max()) >= probability.shape[1]:
        raise ValueError(
            f"test labels must be among the {probability.shape[1]} classes fitted, got class "
            f"{int(present.max())}; put cases of it into the training split"
        )
    hit = (probability.argmax(1) == labels).double()
    recall = torch.stack([hit[labels == c].mean() for c in present])
    aucs = [compute_roc_auc(probability[:, c], (labels == c).long()) for c in present]
    auroc = torch.tensor(aucs, dtype=torch.float64)
    return {"balanced_accuracy": float(recall.mean()), "auroc": float(auroc.mean())}


class ClassAUROC(EpochMetric):
    """AUROC of ``class_scores`` over the cases of all ranks, which may have different numbers.

    Args:
        output_transform: from the engine's output to probabilities (b, classes) and labels (b,).
    """

    def __init__(self, output_transform: Any = lambda output: output) -> None:
        def auroc(probability: Tensor, labels: Tensor) -> float:
            return class_scores(probability, labels)["auroc"]

        super().__init__(auroc, output_transform, check_compute_fn=False)

    def compute(self) -> float:
        rows = torch.cat(self._predictions).float().cpu(), torch.cat(self._targets).cpu()
        parts: Any = idist.all_gather(rows)  # of one rank it is a list, too
        self._result = self.compute_fn(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return self._result
