"""Figures of the evidence: learning curves and forest plots of differences to scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from evidence.differences import Cell, difference, level
from evidence.questions import CASES, CHOSEN, MAIN, labels_text
from med3dinsight_ext.reports.figures import BLUE, GREEN, INK, ORANGE, SKY, STYLE, VERMILION

HELD_OUT = 0.75  # share of the cases that train where a quarter is held out
STYLES: dict[str, dict[str, Any]] = {  # the same in all panels; other arms are in tables alone
    "scratch": {"color": INK, "marker": "o"},
    "scratch_matched": {"color": "#8a929c", "marker": "s"},
    "reconstruction": {"color": ORANGE, "marker": "^"},
    "cosine_image": {"color": SKY, "marker": "v"},
    "siglip": {"color": GREEN, "marker": "D"},
    "transport_paper": {"color": "#CC79A7", "marker": "P"},
    "default": {"color": BLUE, "marker": "X"},
} | {CHOSEN: {"color": VERMILION, "marker": "o"}}
COLUMNS = 3  # of panels


def title(cell: Cell) -> str:
    """Task, backbone and variant of a panel."""
    how = [cell.backbone, *([cell.variant] if cell.variant not in MAIN else [])]
    return f"{cell.task}\n{' · '.join(how)}"


def metric(cell: Cell) -> str:
    """Name of a cell's score."""
    return "AUROC" if next(iter(cell.arms.values()))[0].positive is not None else "Dice"


def labelled(cell: Cell) -> int:
    """Number of labelled cases."""
    whole = CASES[cell.task] * (HELD_OUT if cell.score == "held_out" else 1)
    return cell.labels or round(whole)


@rc_context(STYLE)
def curves(groups: Sequence[Sequence[Cell]]) -> Figure:
    """Score against labelled cases.

    Args:
        groups: for each panel its cells, few labels first.
    """
    columns, rows = min(COLUMNS, len(groups)), -(-len(groups) // COLUMNS)
    figure = Figure((max(4.2, 2.7 * columns), 2.5 * rows + 0.7), layout="constrained")
    shown: dict[str, Any] = {}
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(groups) :]:
        ax.remove()
    for ax, cells in zip(axes, groups, strict=False):
        arms = [arm for arm in STYLES if any(arm in cell.arms for cell in cells)]
        for i, arm in enumerate(arms):
            here = [cell for cell in cells if arm in cell.arms]
            found = [level(cell.arms[arm]) for cell in here]
            x = [labelled(cell) * 1.035 ** (i - (len(arms) - 1) / 2) for cell in here]
            y = [100 * value for value, _ in found]
            error = [[100 * abs(value - ends[k]) for value, ends in found] for k in (0, 1)]
            bold = arm == CHOSEN
            style = STYLES[arm] | {"lw": 2.2 if bold else 1.2, "zorder": 3 if bold else 2}
            shown[arm] = ax.errorbar(x, y, error, ms=4, elinewidth=0.9, **style)
        ax.set_xscale("log")
        ax.set_xticks([labelled(cell) for cell in cells], [str(labelled(cell)) for cell in cells])
        ax.set_xticks([], minor=True)
        ax.set_title(title(cells[0]), loc="left")
        ax.set(xlabel="labelled cases", ylabel=f"{metric(cells[0])} in per cent")
    order = [arm for arm in STYLES if arm in shown]
    figure.legend(
        [shown[arm] for arm in order], order, loc="outside lower center", ncols=min(4, len(order))
    )
    return figure


def present(groups: Sequence[Sequence[Cell]], order: Sequence[str]) -> list[str]:
    """Arms beside scratch, in the order of ``order``."""
    found = {arm for cells in groups for cell in cells for arm in cell.arms} - {"scratch"}
    return [*(arm for arm in order if arm in found), *sorted(found - {*order})]


@rc_context(STYLE)
def forest(groups: Sequence[Sequence[Cell]], order: Sequence[str]) -> Figure:
    """Differences to scratch, from the fewest labels (filled) to the most (open).

    Args:
        groups: for each panel its cells, few labels first.
        order: arms from top to bottom.
    """
    groups = sorted(groups, key=lambda cells: -len(present([cells], order)))
    rows = [groups[i : i + COLUMNS] for i in range(0, len(groups), COLUMNS)]
    heights = [1.1 + 0.24 * len(present(row, order)) for row in rows]
    width = max(6.4, 1.7 + 2.1 * len(rows[0]))
    figure = Figure((width, sum(heights) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    for row, line in zip(rows, axes, strict=True):
        arms = present(row, order)
        for ax in line[len(row) :]:
            ax.remove()
        for i, (ax, cells) in enumerate(zip(line, row, strict=False)):
            _differences(ax, cells, arms)
            ax.set_yticks(range(len(arms)), [""] * len(arms) if i else arms)
    return figure


def _differences(ax: Axes, cells: Sequence[Cell], arms: Sequence[str]) -> None:
    step = min(0.32, 0.72 / len(cells))
    for k, cell in enumerate(cells):
        for row, arm in enumerate(arms):
            d = arm in cell.arms and difference(cell.arms[arm], cell.arms["scratch"])
            if not d:
                continue
            color = STYLES.get(arm, {}).get("color", BLUE)
            fill = to_rgba(color, 1 - k / max(1, len(cells) - 1))
            y = row + (k - (len(cells) - 1) / 2) * step
            ax.hlines(y, 100 * d.both[0], 100 * d.both[1], color=color, lw=0.9)
            ax.hlines(y, 100 * d.cases[0], 100 * d.cases[1], color=color, lw=2.6)
            ax.plot(100 * d.above, y, "o", ms=4.5, mfc="white", mec="white", zorder=3)
            ax.plot(100 * d.above, y, "o", ms=4.5, mfc=fill, mec=color, zorder=4)
    ax.axvline(0, color=INK, lw=0.8)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -1), max(high, 1))
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_title(title(cells[0]), loc="left")
    shown = ", ".join(labels_text(cell.labels) for cell in cells)
    ax.set_xlabel(f"{metric(cells[0])} points above scratch\n{shown} labelled")
