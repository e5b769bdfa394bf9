"""Figures of segmentation scores: classes on images, box plots, and trainings compared."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, ScalarFormatter
from monai.data import MetaTensor
from monai.transforms import Orientation
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, cut, window
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.metrics.segmentation import SCORES, mean_scores, worst_class
from med3dinsight_ext.reports.figures import (
    BLUE,
    GREEN,
    INK,
    STYLE,
    VERMILION,
    class_colors,
    draw_image,
)
from med3dinsight_ext.reports.formatting import number, short

SIZE = 320  # pixels of an overlay's side
FILL = 0.5  # opacity of the prediction
GREY = "#8a94a0"  # of what stands for every class in a legend


class Case(NamedTuple):
    """One scored image.

    image: path.
    scores: from ``case_scores``.
    counts: from ``confusion_counts``.
    slices: from ``three_slices``.
    """

    image: str
    scores: dict[str, dict[str, float]]
    counts: np.ndarray
    slices: bytes


def three_slices(prediction: Tensor, label: MetaTensor, label_class: int = 0) -> bytes:
    """The slice of each plane, in RAS, where the label (else the prediction) marks most.

    Args:
        prediction: (1, x, y, z) map of class numbers.
        label: the same; its affine counts for both.
        label_class: the one to look for; 0 for all.

    Returns:
        An ``.npz``: ``position`` (3,) in [0, 1], ``spacing`` (3,) in mm, and under the name of
        each plane (2, x, y, z), label and prediction, one voxel thick across the plane.
    """
    pair = [torch.as_tensor(x).as_subclass(Tensor).cpu().short() for x in (label, prediction)]
    both = Orientation("RAS", labels=None)(MetaTensor(torch.cat(pair), affine=label.affine))
    volume = both.as_tensor()
    found = volume == label_class if label_class else volume != 0
    marked = found[0] if found[0].any() else found[1]
    kept: dict[str, Any] = {"spacing": both.pixdim.numpy(), "position": []}
    for plane, name in enumerate(PLANES):
        count = marked.sum([axis for axis in range(3) if axis != plane])
        index = int(count.argmax()) if count.any() else len(count) // 2
        kept[name] = volume.narrow(plane + 1, index, 1).numpy()
        kept["position"].append((index + 0.5) / len(count))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    return buffer.getvalue()


def examples(cases: Sequence[Case]) -> dict[str, int]:
    """Numbers of the best, the median and the worst case by mean Dice, as far as they differ."""
    dice = [mean_scores(case.scores)["dice"] for case in cases]
    order = [i for i in range(len(cases)) if not math.isnan(dice[i])] or [0]
    if len(order) == 1:
        return {"Only": order[0]}
    order.sort(key=lambda i: -dice[i])
    middle = {"Median": order[len(order) // 2]} if len(order) > 2 else {}
    return {"Best": order[0], **middle, "Worst": order[-1]}


@rc_context(STYLE)
def overlays(cases: Sequence[Case], names: Sequence[str]) -> Figure:
    """Best, median and worst case in three planes: prediction filled, label outlined.

    A class has one colour in both. The images are read again from their files.

    Args:
        cases: at least one.
        names: of the cases.
    """
    chosen = examples(cases)
    colors = class_colors(list(cases[0].scores))
    figure = Figure((7.4, 2.85 * len(chosen) + 0.35), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    drawn = set[int]()
    for part, (which, i) in zip(parts, chosen.items(), strict=True):
        text = f"{which}: {short(names[i], 40)}, {dice_text(cases[i])}"
        part.suptitle(text, x=0.01, ha="left", fontsize=9.5, weight="bold")
        shown = shown_image(cases[i].image)
        drawn |= draw_slices(part, *shown, cases[i].slices, list(colors.values()))
    add_legend(figure, {name: c for n, (name, c) in enumerate(colors.items(), 1) if n in drawn})
    listing = "; ".join(f"{which.lower()} {names[i]}" for which, i in chosen.items())
    figure.set_label(f"Prediction (filled) and label (outlined) on the image: {listing}")
    return figure


def shown_image(path: str) -> tuple[Tensor, list[float]]:
    """An image's file as (1, x, y, z) in [0, 1], of CT the soft tissue, and its spacing in mm."""
    image = read_volume(path)
    return window(image, guess_modality(image))[:1], image.pixdim.tolist()


def draw_slices(
    part: SubFigure, image: Tensor, spacing: Sequence[float], slices: bytes, colors: Sequence[str]
) -> set[int]:
    """Draw a case in three planes; returns the classes that are shown.

    Args:
        part: of a figure.
        image: (1, x, y, z) in RAS and [0, 1].
        spacing: of the image in mm.
        slices: from ``three_slices``.
        colors: of the classes from 1 on.
    """
    kept = np.load(io.BytesIO(slices))
    drawn = set[int]()
    for plane, ax in enumerate(part.subplots(1, 3)):
        where = torch.tensor([kept["position"][plane]])
        picture = cut(image, spacing, plane, where, SIZE)[0, 0]
        draw_image(ax, picture.numpy(), f"{PLANES[plane]} {where.item():.2f}", INK, 0.6)
        pair = torch.from_numpy(kept[PLANES[plane]])
        drawn |= set(pair.unique().tolist()) - {0}
        draw_classes(ax, pair, kept["spacing"], plane, colors)
    return drawn


def dice_text(case: Case) -> str:
    """Mean Dice of a case and, of several classes, the one with the lowest."""
    text = f"Dice {number(mean_scores(case.scores)['dice'])}"
    worst = worst_class(case.scores)
    if worst is None or len(case.scores) == 1:
        return text
    return f"{text}; worst class {short(worst, 24)} {number(case.scores[worst]['dice'])}"


def draw_classes(
    ax: Axes, pair: Tensor, spacing: Sequence[float], plane: int, colors: Sequence[str]
) -> None:
    """Draw one slice of a prediction as fills and of its label as outlines.

    Args:
        ax: that shows the image.
        pair: (2, x, y, z) label and prediction, one voxel thick across the plane.
        spacing: of x, y, z in mm.
        plane: that is cut.
        colors: of the classes from 1 on.
    """
    halo = [Stroke(linewidth=2.6, foreground="black"), Normal()]
    for n in pair.unique()[pair.unique() > 0].tolist():
        masks = (pair == n).float()
        truth, found = cut(masks, spacing, plane, torch.tensor([0.5]), SIZE)[0].numpy()
        color = colors[n - 1]
        fill = np.zeros((*found.shape, 4))
        fill[..., :3], fill[..., 3] = to_rgb(color), FILL * (found >= 0.5)
        ax.imshow(fill, interpolation="nearest")
        if truth.min() < 0.5 < truth.max():  # else too thin to show, or everywhere
            outline = ax.contour(truth, [0.5], colors=color, linewidths=1.3)
            outline.set_path_effects(halo)


def add_legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Add the colours of classes, and what fill and outline mean, below a figure."""
    marks: list[Any] = [
        Patch(facecolor=(GREY, FILL), label="prediction (fill)"),
        Line2D([], [], color=GREY, linewidth=1.3, label="label (outline)"),
    ]
    marks += [Patch(facecolor=color, label=short(name, 24)) for name, color in colors.items()]
    figure.legend(handles=marks, loc="outside lower left", ncols=5, fontsize=8)


@rc_context(STYLE)
def boxes(cases: Sequence[Case]) -> Figure:
    """For each class its scores over the cases: quartiles as a box, every case a dot.

    HD95 is linear up to 1 mm and logarithmic above, as a missed class costs a whole diagonal.
    """
    classes = list(cases[0].scores)
    colors = class_colors(classes)
    figure = Figure((7.4, 0.9 + 0.42 * len(classes)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for ax, (key, title) in zip(panels, SCORES.items(), strict=True):
        for y, name in enumerate(classes):
            x = np.array([case.scores[name][key] for case in cases])
            x = x[~np.isnan(x)]
            if not len(x):
                continue
            low, middle, high = np.quantile(x, [0.25, 0.5, 0.75])
            ax.plot([x.min(), low, np.nan, high, x.max()], [y] * 5, color=INK, linewidth=0.8)
            ax.barh(y, high - low, 0.56, low, facecolor=(colors[name], 0.45), edgecolor=INK)
            ax.plot([middle] * 2, [y - 0.28, y + 0.28], color=INK, linewidth=2.2)
            spread = y + 0.36 * (np.arange(len(x)) * 0.618 % 1 - 0.5)  # so that equals part
            ax.plot(x, spread, ".", color=INK, markersize=4, alpha=0.6)
        ax.set_title(title)
    panels[0].set(yticks=range(len(classes)), ylim=(len(classes) - 0.5, -0.5))
    panels[0].set_yticklabels([short(name, 24) for name in classes])
    for ax in panels[:2]:
        ax.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1])
    panels[2].set_xscale("symlog", linthresh=1, linscale=0.5)
    panels[2].set_xlim(-0.05, max(1.1, 1.3 * panels[2].dataLim.xmax))
    panels[2].xaxis.set_major_locator(FixedLocator([0, 1, 3, 10, 30, 100, 300, 1000]))
    panels[2].xaxis.set_major_formatter(ScalarFormatter())
    panels[2].minorticks_off()
    figure.set_label(f"Dice, NSD and HD95 of {len(classes)} classes over {len(cases)} cases")
    return figure


@rc_context(STYLE)
def dice_comparison(trainings: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean Dice of each class with its interval, for several trainings.

    Args:
        trainings: name to the content of seg-finetune's metrics.json.
    """
    classes = ["mean", *next(iter(trainings.values()))["classes"]]
    figure = Figure((7.4, 0.55 + 0.5 * len(classes)), layout="constrained")
    ax = figure.subplots()
    values = []
    for rank, (name, metrics) in enumerate(trainings.items()):
        color = (BLUE, VERMILION, GREEN)[rank]
        rows = [metrics["mean"], *metrics["classes"].values()]
        for row, (label, stat) in enumerate(zip(classes, rows, strict=True)):
            stat = stat["dice"]
            if stat["mean"] is None:
                continue
            y = row + 0.3 * (rank - (len(trainings) - 1) / 2)
            ax.plot([stat["low"], stat["high"]], [y, y], color=color, alpha=0.4)
            ax.plot(
                stat["mean"], y, "o", markersize=6, color=color, label=name if row == 0 else None
            )
            values.append(f"{label} {name} {stat['mean']:.3f}")
            end = max(stat["mean"], stat["high"] or 0)
            offset: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
            ax.annotate(f"{stat['mean']:.3f}", (end, y), (6, 0), fontsize=7.5, **offset)
    ax.set(yticks=range(len(classes)), yticklabels=[short(name, 24) for name in classes])
    ax.set(xlim=(-0.02, 1.05), xlabel="Dice, 95 % interval over cases")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=len(trainings), fontsize=8)
    figure.set_label("Dice: " + "; ".join(values))
    return figure
