"""Curves of losses and retrieval over the epochs of a pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from med3dinsight_ext.reports.figures import BLUE, DASHED, INK, ORANGE, SKY, STYLE, VERMILION
from med3dinsight_ext.reports.retrieval import TASKS

LOSSES = ("loss", "image", "text", "reconstruction")
HUES = dict(zip(TASKS, (BLUE, VERMILION, SKY, ORANGE), strict=True))


def merge_epochs(events: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row an epoch, in order; a resumed run's later rows replace earlier ones."""
    rows: dict[float, dict[str, float]] = {}
    for event in events:
        rows.setdefault(event["epoch"], {}).update(event)
    return [rows[epoch] for epoch in sorted(rows)]


def _line(ax: Axes, rows: list[dict[str, float]], key: str, **style: Any) -> list[float]:
    """Draw one key over the epochs that have it; returns its values."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    ax.plot(epochs, values, marker="o" if len(points) < 2 else "", markersize=4, **style)
    return values


@rc_context(STYLE)
def curves(events: Sequence[Mapping[str, float]]) -> Figure:
    """Loss parts (one panel each, own scale) above held-out R@1 with its chance level dashed.

    Args:
        events: rows with ``epoch`` and any of ``loss``, ``image``, ``text``, ``reconstruction``
            and ``RetrievalTable``'s ``<target>_<scope>_r1`` and ``…_r1_chance``.
    """
    rows = merge_epochs(events)
    losses = [key for key in LOSSES if any(row.get(key) is not None for row in rows)]
    scores = [key for key in TASKS if any(row.get(f"{key}_r1") is not None for row in rows)]
    if not losses + scores:
        raise ValueError(
            f"events must hold a loss or R@1, got {sorted(set().union(*rows))}; "
            f"name losses {LOSSES} and scores like image_within_r1"
        )
    heights = [1.6] * bool(losses) + [3.2] * bool(scores)
    figure = Figure((7, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    final = []
    panels = parts[0].subplots(1, len(losses), squeeze=False)[0] if losses else ()
    for ax, key in zip(panels, losses, strict=True):
        values = _line(ax, rows, key, color=INK if key == "loss" else BLUE)
        final.append(f"{'loss (sum)' if key == 'loss' else key} {values[-1]:.3g}")
        ax.set_title(final[-1], loc="left")
        ax.margins(x=0.02)
        ax.locator_params(nbins=4)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if scores:
        ax = parts[-1].subplots()
        for key in scores:
            values = _line(ax, rows, f"{key}_r1", color=HUES[key], label=TASKS[key])
            _line(ax, rows, f"{key}_r1_chance", color=HUES[key], **DASHED)
            final.append(f"R@1 {TASKS[key]}: {values[-1]:.3g}")
        ax.plot([], [], color=INK, label="chance", **DASHED)
        ax.set_title("R@1 on held-out volumes", loc="left")
        ax.set(xlabel="epoch", ylim=(0, None))
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        parts[-1].legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.set_label(f"Curves over {len(rows)} epochs; at the end " + ", ".join(final))
    return figure
