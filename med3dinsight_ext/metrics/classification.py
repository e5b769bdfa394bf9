"""What a classifier's probabilities are worth: scores with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BINS = 15  # of the calibration, Guo et al. (2017), arXiv:1706.04599
CHUNK = 2**22  # resampled cases held at once
SCORES = {
    "auroc": "AUROC",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "ece": "Expected calibration error",
}


def scores(
    probability: Tensor, label: Tensor, names: Sequence[str], bootstraps: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Score class probabilities, with 95 % percentile intervals from drawing the cases again.

    Of two classes, ``auroc`` and ``f1`` are those of the second; of more, the mean over the
    classes for which they are defined. What is undefined is NaN.

    Args:
        probability: (n, k), rows sum to 1.
        label: (n,) long, classes in [0, k).
        names: k classes.
        bootstraps: resamplings; 0 makes all intervals NaN.
        seed: of the resampling, which leaves the global random state alone.

    Returns:
        ``auroc``, ``balanced_accuracy``, ``f1``, ``ece``, each with ``_low`` and ``_high``;
        ``accuracy``, ``n``, ``confusion`` (rows are the truth) and ``per_class``.
    """
    probability, label = probability.detach().cpu().double(), label.detach().cpu().long()
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
    generator, draws = torch.Generator().manual_seed(seed), []
    for part in torch.arange(bootstraps).split(max(1, CHUNK // n)):
        drawn = torch.randint(n, (len(part), n), generator=generator).T
        weight = torch.zeros(drawn.shape).double().scatter_add_(0, drawn, once.expand(drawn.shape))
        draws.append(_measure(probability, label, weight))
    result: dict[str, Any] = {}
    for key, value in _measure(probability, label, once).items():
        ends = [math.nan, math.nan]
        if bootstraps and n > 1:  # one case drawn again is the same case
            levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
            ends = torch.cat([draw[key] for draw in draws]).nanquantile(levels).tolist()
        result |= {key: float(value), f"{key}_low": ends[0], f"{key}_high": ends[1]}
    accuracy, confusion = float(hit.sum() / n), table.long().tolist()
    return result | {"accuracy": accuracy, "n": n, "confusion": confusion, "per_class": per_class}


def _measure(probability: Tensor, label: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The scores that get intervals, (b,) for how often each case was drawn, (n, b)."""
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
    """Weight of each truth and prediction, (k, k, b)."""
    k = probability.shape[1]
    place = label * k + probability.argmax(1)
    return weight.new_zeros(k * k, weight.shape[1]).index_add_(0, place, weight).view(k, k, -1)


def auroc_of(probability: Tensor, label: Tensor, weight: Tensor, c: int) -> Tensor:
    """Share of pairs in the right order, ties half, (b,); NaN without positives or negatives."""
    score, group = probability[:, c].unique(return_inverse=True)
    positive = (label == c)[:, None]
    zeros = weight.new_zeros(len(score), weight.shape[1])
    hits = zeros.index_add(0, group, weight * positive)
    misses = zeros.index_add(0, group, weight * ~positive)
    below = misses.cumsum(0) - misses / 2
    return (hits * below).sum(0) / (hits.sum(0) * misses.sum(0))


def calibration(probability: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Expected calibration error (b,), and count, confidence and accuracy sums (3, bins, b)."""
    confidence, prediction = probability.max(1)
    bin_ = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    parts = (torch.ones_like(confidence), confidence, (prediction == label).double())
    sums = weight.new_zeros(3, BINS, weight.shape[1])
    for total, part in zip(sums, parts, strict=True):
        total.index_add_(0, bin_, weight * part[:, None])
    return (sums[1] - sums[2]).abs().sum(0) / weight.sum(0), sums
