"""Figures of classifications: confusion matrix, calibration, ROC curves, activation maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from monai.data import MetaTensor
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, cut
from med3dinsight_ext.metrics.classification import BINS, auroc_of, calibration
from med3dinsight_ext.reports.figures import (
    BLUE,
    DASHED,
    INK,
    ORANGE,
    PLANE_COLORS,
    SKY,
    STYLE,
    VERMILION,
    draw_image,
)
from med3dinsight_ext.reports.formatting import percent, short

COUNTS = LinearSegmentedColormap.from_list("counts", ["#eef3f7", BLUE])
LINES = [
    (color, dash) for dash in ("-", "--", ":") for color in (*PLANE_COLORS, SKY, ORANGE, "#CC79A7")
]


@rc_context(STYLE)
def confusion_figure(result: Mapping[str, Any]) -> Figure:
    """Cases of each truth and prediction, coloured by their share of the truth.

    Args:
        result: from ``scores``.
    """
    names, table = list(result["per_class"]), np.array(result["confusion"])
    share = table / table.sum(1, keepdims=True).clip(1)
    ticks, labels = range(len(names)), [short(name, 24) for name in names]
    room, side = 0.6 + 0.08 * max(map(len, labels)), 0.6 * len(names)
    figure = Figure((max(6.2, side + 0.6 + room), side + 0.2 + room), layout="constrained")
    ax = figure.subplots()
    ax.imshow(share, cmap=COUNTS, vmin=0, vmax=1, aspect="auto")
    for (i, j), count in np.ndenumerate(table):
        color = "white" if share[i, j] > 0.75 else "#101418"  # on its cell, in a dark page too
        text = f"{count}\n{100 * share[i, j]:.0f} %"
        ax.text(j, i, text, color=color, ha="center", va="center", fontsize=8)
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(ticks, labels, **(turned if max(map(len, labels)) > 8 else {}))
    ax.set_yticks(ticks, labels)
    ax.set(xlabel="prediction", ylabel="truth")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    right = int(table.trace())
    figure.set_label(f"Confusion matrix; {right} of {table.sum()} cases are on its diagonal")
    return figure


@rc_context(STYLE)
def calibration_figure(probability: Tensor, label: Tensor) -> Figure:
    """Accuracy against confidence in each bin, above the number of cases in the bin.

    Args:
        probability: (n, k).
        label: (n,) long.
    """
    error, sums = calibration(probability.double(), label, torch.ones(len(label), 1).double())
    count, confidence, right = sums[..., 0].numpy()
    full = count > 0
    figure = Figure((6.2, 4.6), layout="constrained")
    ax, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    ax.plot([0, 1], [0, 1], color=INK, label="perfect", **DASHED)
    mean, share = confidence[full] / count[full], right[full] / count[full]
    ax.vlines(mean, mean, share, color=VERMILION, linewidth=2, label="gap")
    ax.plot(mean, share, "o-", color=BLUE, markersize=4, linewidth=1.2, label="classifier")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="accuracy")
    ax.set_title(f"expected calibration error {percent(float(error))} %", loc="left")
    ax.legend(loc="upper left")
    below.bar((np.arange(BINS) + 0.5) / BINS, count, 0.9 / BINS, color=BLUE)
    below.set(xlabel="probability of the predicted class", ylabel="cases")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.set_label(f"Calibration; expected error {percent(float(error))} per cent")
    return figure


@rc_context(STYLE)
def roc_figure(probability: Tensor, label: Tensor, names: Sequence[str]) -> Figure:
    """ROC curve of the second of two classes, or of each of more against the rest.

    Args:
        probability: (n, k).
        label: (n,) long.
        names: k classes.
    """
    figure = Figure((6.2, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=INK, label="chance", **DASHED)
    styles, areas = cycle(LINES), []
    for c in range(len(names)) if len(names) > 2 else (1,):
        positive = (label == c).double()
        area = float(auroc_of(probability, label, torch.ones(len(label), 1).double(), c))
        if math.isnan(area):
            continue
        _, group = (
            probability[:, c].neg().unique(return_inverse=True)
        )  # highest first, ties at once
        counts = torch.zeros(2, int(group.max()) + 2).double()
        counts[0].index_add_(0, group + 1, 1 - positive)
        counts[1].index_add_(0, group + 1, positive)
        x, y = counts.cumsum(1) / counts.sum(1, keepdim=True)
        color, dash = next(styles)
        areas.append(f"{short(names[c], 24)} {percent(area)}")
        ax.plot(x.numpy(), y.numpy(), dash, color=color, label=areas[-1])
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.set(xlabel="1 − specificity", ylabel="sensitivity")
    figure.legend(loc="outside right upper", title="AUROC in per cent", alignment="left")
    figure.set_label("ROC curves; AUROC in per cent: " + ", ".join(areas))
    return figure


class ActivationMap(NamedTuple):
    """Image (1, x, y, z), heat (1, x, y, z) of the predicted class, and the case's title."""

    image: MetaTensor
    heat: Tensor
    title: str


@rc_context(STYLE)
def heat_figure(cases: Sequence[ActivationMap]) -> Figure:
    """For each case the three planes through the hottest voxel, with the heat over the image.

    Args:
        cases: one row each.
    """
    figure = Figure((6.6, 2.55 * len(cases)), layout="constrained")
    parts = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
    for part, (image, heat, title) in zip(parts, cases, strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=8.5)
        heat = heat.clamp(min=0) / heat.max().clamp(min=1e-12)
        low, high = np.percentile(image.numpy(), (0.5, 99.5))
        gray = ((image.as_tensor() - low) / max(high - low, 1e-12)).clamp(0, 1)
        peak = np.unravel_index(int(heat.argmax()), heat.shape)[1:]
        for plane, ax in enumerate(part.subplots(1, 3)):
            place = (int(peak[plane]) + 0.5) / heat.shape[plane + 1]
            picture, warm = (
                cut(volume, image.pixdim.tolist(), plane, torch.tensor([place]), 192)[0, 0].numpy()
                for volume in (gray, heat)
            )
            draw_image(ax, picture, f"{PLANES[plane]} {place:.2f}", INK, 0.6)
            ax.imshow(warm, cmap="inferno", alpha=0.65 * warm, vmin=0, vmax=1)
    figure.set_label("Class activation maps: " + "; ".join(case.title for case in cases))
    return figure
