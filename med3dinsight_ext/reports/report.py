"""Figures of a run, and one HTML file that holds them all."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from med3dinsight_ext.data.slicing import PLANES
from med3dinsight_ext.io.files import write_atomic

DPI = 120
INK = "#1d2530"  # text and axes; becomes the page's own text colour in the HTML
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"  # colours of Okabe and Ito
SKY, ORANGE = "#56B4E9", "#E69F00"
COLORS = (BLUE, VERMILION, GREEN)  # of the planes
ENDS = ("left → right", "posterior → anterior", "inferior → superior")  # of the planes' axes
LOSSES = ("loss", "image", "text", "reconstruction")
LABELS = {
    "image_within": "slice → image, same modality, plane and depth",
    "text_within": "slice → text, same modality, plane and depth",
    "image_all": "slice → image, among all slices",
    "text_all": "slice → text, among all slices",
}
HUES = dict(zip(LABELS, (BLUE, VERMILION, SKY, ORANGE), strict=True))
DASHED: dict[str, Any] = {"linestyle": (0, (3, 2)), "linewidth": 1}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "text.parse_math": False,  # a caption may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}
CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2530; --soft: #5c6673;
  --line: #dfe3e8; --accent: #0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1a2029; --ink: #e4e8ee; --soft: #9aa5b3; --line: #2f3844;
    --accent: #56B4E9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1.25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin: 1rem 0; padding: .75rem; overflow-x: auto; }
.card > svg, .card > img { display: block; width: 100%; min-width: 32rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; }
tr + tr > * { border-top: 1px solid var(--line); }
.facts th { font-weight: 500; color: var(--soft); width: 40%; }
.facts td { overflow-wrap: anywhere; }
.scores th, .scores td { text-align: right; white-space: nowrap; }
.scores tbody th { text-align: left; white-space: normal; }
.scores th[scope=row] { font-weight: 500; }
.scores th[scope=rowgroup] { padding-top: 1.1rem; }
.scores thead th, .scores small { color: var(--soft); font-weight: 400; font-size: .8rem; }
.scores .strip { width: 34%; min-width: 7rem; vertical-align: middle; }
.scores .strip svg { display: block; width: 100%; height: 1rem; overflow: visible; }
@media (max-width: 40rem) { .scores .strip { display: none; } th, td { padding: .3rem .35rem; } }
"""


class Slice(NamedTuple):
    """A slice to show: image (h, w) in [0, 1], plane 0 to 2, position in [0, 1], volume's name."""

    image: np.ndarray
    plane: int
    position: float
    volume: str
    caption: str = ""


class Found(NamedTuple):
    """A retrieved slice, its cosine similarity to the query, and whether it is the right one."""

    slice: Slice
    similarity: float
    correct: bool


def _epochs(events: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
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
    rows = _epochs(events)
    losses = [key for key in LOSSES if any(row.get(key) is not None for row in rows)]
    scores = [key for key in LABELS if any(row.get(f"{key}_r1") is not None for row in rows)]
    if not losses + scores:
        raise ValueError(
            f"events must hold a loss or R@1, got {sorted(set().union(*rows))}; "
            f"name losses {LOSSES} and scores like image_within_r1"
        )
    heights = [1.6] * bool(losses) + [3.2] * bool(scores)
    figure = Figure((7, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    said = []
    if losses:
        for ax, key in zip(
            parts[0].subplots(1, len(losses), squeeze=False)[0], losses, strict=True
        ):
            values = _line(ax, rows, key, color=INK if key == "loss" else BLUE)
            said.append(f"{'loss (sum)' if key == 'loss' else key} {values[-1]:.3g}")
            ax.set_title(said[-1], loc="left")
            ax.margins(x=0.02)
            ax.locator_params(nbins=4)
    if scores:
        ax = parts[-1].subplots()
        for key in scores:
            values = _line(ax, rows, f"{key}_r1", color=HUES[key], label=LABELS[key])
            _line(ax, rows, f"{key}_r1_chance", color=HUES[key], **DASHED)
            said.append(f"R@1 {LABELS[key]}: {values[-1]:.3g}")
        ax.plot([], [], color=INK, label="chance", **DASHED)
        ax.set_title("R@1 on held-out volumes", loc="left")
        ax.set_xlabel("epoch")
        ax.set_ylim(bottom=0)
        ax.margins(x=0.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        parts[-1].legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.set_label(f"Curves over {len(rows)} epochs; at the end " + ", ".join(said))
    return figure


def percent(value: float) -> str:
    """A share as per cent with one decimal, NaN as a dash."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def cell(metrics: Mapping[str, float], key: str) -> str:
    """A table cell with ``key`` and, below it, ``key_low`` to ``key_high``, in per cent."""
    interval = f"{percent(metrics[key + '_low'])} to {percent(metrics[key + '_high'])}"
    return f"<td>{percent(metrics[key])}<br><small>{interval}</small></td>"


def _strip(metrics: Mapping[str, float], control: Mapping[str, float] | None, key: str) -> str:
    """A line from 0 to 100 %: tick at chance, ring at the control, dot with interval."""

    def bar(low: float, high: float, style: str) -> str:
        return f'<line x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="8" y2="8" {style}/>'

    chance, x = 100 * metrics[f"{key}_chance"], 100 * metrics[key]
    marks = [bar(0, 1, 'stroke="var(--line)"')]
    marks += [
        f'<line x1="{chance:.2f}%" x2="{chance:.2f}%" y1="1" y2="15" stroke="var(--soft)"'
        ' stroke-width="1.5"/>'
    ]
    if not math.isnan(metrics[f"{key}_low"]):
        style = 'stroke="var(--accent)" stroke-width="3" opacity=".5"'
        marks += [bar(metrics[f"{key}_low"], metrics[f"{key}_high"], style)]
    if control:
        marks += [
            f'<circle cx="{100 * control[key]:.2f}%" cy="8" r="4" fill="var(--card)"'
            ' stroke="var(--soft)" stroke-width="1.5"/>'
        ]
    marks += [f'<circle cx="{x:.2f}%" cy="8" r="4.5" fill="var(--accent)"/>']
    return f'<td class="strip"><svg aria-hidden="true">{"".join(marks)}</svg></td>'


def retrieval_table(
    metrics: Mapping[str, float], control: Mapping[str, float] | None = None
) -> str:
    """R@k with intervals beside chance and the control, as an HTML table in per cent.

    Args:
        metrics: what ``RetrievalTable`` gives.
        control: the same with every volume set to zero.
    """
    head = ["", "Student", *(["Volume zero"] if control else []), "Chance"]
    body = []
    for task in (task for task in LABELS if f"{task}_queries" in metrics):
        count = f"{metrics[f'{task}_queries']:,.0f} queries, "
        count += f"median {metrics[f'{task}_candidates']:,.0f} candidates"
        name = LABELS[task][0].upper() + LABELS[task][1:]
        rows = [
            f'<tr><th scope="rowgroup" colspan="{len(head) + 1}">{name}'
            f"<br><small>{count}</small></th></tr>"
        ]
        ks = sorted(
            int(key.removeprefix(f"{task}_r").removesuffix("_chance"))
            for key in metrics
            if key.startswith(f"{task}_r") and key.endswith("_chance")
        )
        for k in ks:
            key = f"{task}_r{k}"
            cells = cell(metrics, key) + (cell(control, key) if control else "")
            cells += f"<td>{percent(metrics[f'{key}_chance'])}</td>"
            strip = _strip(metrics, control, key)
            rows.append(f'<tr><th scope="row">R@{k}</th>{cells}{strip}</tr>')
        body.append(f"<tbody>{''.join(rows)}</tbody>")
    if not body:
        raise ValueError(
            f"metrics must come from RetrievalTable, got {sorted(metrics)}; pass its whole result"
        )
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    ring = ", ring: volume zero" if control else ""
    legend = f'<th class="strip" scope="col">0 – 100 % (dot: student{ring}, tick: chance)</th>'
    return (
        f'<table class="scores"><thead><tr>{names}{legend}</tr></thead>{"".join(body)}</table>'
        "<p><small>Per cent; 95 % interval below, from drawing whole volumes again.</small></p>"
    )


@rc_context(STYLE)
def arms(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean Dice of each class with its interval, for several ways of training.

    Args:
        found: name of the way to the content of seg-finetune's metrics.json.
    """
    classes = ["mean", *next(iter(found.values()))["classes"]]
    figure = Figure((7.4, 0.55 + 0.5 * len(classes)), layout="constrained")
    ax = figure.subplots()
    said = []
    for number, (name, metrics) in enumerate(found.items()):
        stats = [metrics["mean"]["dice"], *(m["dice"] for m in metrics["classes"].values())]
        for row, (label, stat) in enumerate(zip(classes, stats, strict=True)):
            if stat["mean"] is None:
                continue
            y = row + 0.3 * (number - (len(found) - 1) / 2)
            style: dict[str, Any] = {"color": COLORS[number], "label": name if row == 0 else None}
            ax.plot([stat["low"], stat["high"]], [y, y], color=COLORS[number], alpha=0.4)
            ax.plot(stat["mean"], y, "o", markersize=6, **style)
            said.append(f"{label} {name} {stat['mean']:.3f}")
            ax.annotate(
                f"{stat['mean']:.3f}", (max(stat["mean"], stat["high"] or 0), y), (6, 0),
                fontsize=7.5, textcoords="offset points", va="center",
            )  # fmt: skip
    ax.set(yticks=range(len(classes)), yticklabels=[short(name, 24) for name in classes])
    ax.set(xlim=(-0.02, 1.05), xlabel="Dice, 95 % interval over cases")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=len(found), fontsize=8)
    figure.set_label("Dice: " + "; ".join(said))
    return figure


def show(ax: Axes, image: np.ndarray, title: str, color: str, width: float) -> None:
    """Draw an image (h, w) in [0, 1] with a title and a frame."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=7.5, pad=5)
    ax.spines[:].set(visible=True, color=color, linewidth=width)


def short(text: str, width: int) -> str:
    """A text of at most ``width`` letters, cut in the middle."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[-(width // 2) + 1 :]}"


@rc_context(STYLE)
def gallery(rows: Sequence[tuple[Slice, Sequence[Found]]]) -> Figure:
    """For each query slice the slices found, best first, the right one framed and ticked.

    Args:
        rows: a query and what its token found, for instance five.
    """
    columns = max(len(found) for _, found in rows)
    figure = Figure(
        (1.25 * (columns + 1.15), 2.05 * len(rows)), layout=ConstrainedLayoutEngine(h_pad=0.08)
    )
    for part, (query, found) in zip(
        figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True
    ):
        text = textwrap.wrap(query.caption, 24 * columns, max_lines=2, placeholder=" …")
        text = [*(text or ["no caption"]), " "][:2]  # two lines each, so that rows are alike
        part.suptitle("\n".join(text), x=0.01, ha="left", fontsize=8.5)
        axes = part.subplots(1, columns + 2, width_ratios=[1, 0.15, *[1] * columns])
        for ax in axes[1:]:
            ax.set_axis_off()
        place = f"{PLANES[query.plane]} {query.position:.2f}"
        show(axes[0], query.image, f"{place}\n{short(query.volume, 16)}\nquery", INK, 2)
        for ax, (hit, similarity, correct) in zip(axes[2:], found, strict=False):
            ax.set_axis_on()
            title = f"{PLANES[hit.plane]} {hit.position:.2f}\n{short(hit.volume, 16)}\n"
            title += f"{'✓ ' if correct else ''}{similarity:.2f}"
            show(ax, hit.image, title, GREEN if correct else "#8a94a0", 3 if correct else 0.6)
    right = sum(any(hit.correct for hit in found) for _, found in rows)
    figure.set_label(
        f"{len(rows)} query slices, each with the {columns} most similar; "
        f"for {right} of them the right slice is among these"
    )
    return figure


@rc_context(STYLE)
def text_curves(
    scores: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]],
    slices: Mapping[str, Mapping[int, np.ndarray]],
) -> Figure:
    """For each prompt its score along the three axes, and the best slice of each plane.

    Args:
        scores: prompt to plane to (position (s,) in [0, 1], score (s,), NaN where nothing shows).
        slices: prompt to plane to the image (h, w) in [0, 1] where that score is highest.
    """
    figure = Figure((7.4, 2.0 * len(scores) + 0.3), layout="constrained")
    said = []
    parts = figure.subfigures(len(scores), 1, squeeze=False)[:, 0]
    for part, (prompt, by_plane) in zip(parts, scores.items(), strict=True):
        text = textwrap.wrap(prompt, 95, max_lines=2, placeholder=" …")
        part.suptitle("\n".join(text), x=0.01, ha="left", fontsize=9.5, weight="bold")
        axes = part.subplots(1, 1 + len(by_plane), width_ratios=[2.6, *[1] * len(by_plane)])
        for ax, (plane, (position, score)) in zip(axes[1:], by_plane.items(), strict=True):
            best = int(np.nanargmax(score))
            axes[0].plot(position, score, color=COLORS[plane], label=PLANES[plane])
            axes[0].plot(position[best], score[best], "o", color=COLORS[plane], markersize=5)
            title = f"{PLANES[plane]} {position[best]:.2f}\nscore {score[best]:.2f}"
            show(ax, slices[prompt][plane], title, COLORS[plane], 2)
            said.append(f"“{prompt}” {PLANES[plane]} {position[best]:.2f}")
        axes[0].set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes[0].set(xlabel="position along the axis", ylabel="similarity")
    lines = [axes[0].get_lines()[2 * i] for i in range(len(by_plane))]
    names = [f"{PLANES[plane]} ({ENDS[plane]})" for plane in by_plane]
    figure.legend(lines, names, loc="outside upper left", ncols=3, fontsize=8)
    figure.set_label("Score of each text along each axis, best at " + "; ".join(said))
    return figure


def save_text_scores(
    path: str | Path,
    scores: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]],
    slices: Mapping[str, Mapping[int, np.ndarray]],
) -> None:
    """Write ``text_curves`` as a PNG."""
    save(path, text_curves(scores, slices))


def save(path: str | Path, content: str | Figure) -> None:
    """Write a text, or a figure as a PNG, in one piece or not at all."""
    data = io.BytesIO()
    if isinstance(content, Figure):
        content.savefig(data, format="png", dpi=DPI)
    else:
        data.write(content.encode("utf-8", "replace"))
    write_atomic(Path(path), lambda draft: draft.write_bytes(data.getvalue()))


def svg(figure: Figure) -> str:
    """A figure as inline SVG: text stays text, and takes the page's colour (light or dark)."""
    buffer = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "med3dinsight"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the fonts
        figure.savefig(buffer, format="svg", dpi=DPI, transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    label = escape(str(figure.get_label()), quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def html(
    path: str | Path,
    title: str,
    facts: Mapping[str, object],
    sections: Sequence[tuple[str, str, Figure | str]],
) -> None:
    """Write one self-contained page: title, key facts, then sections.

    Args:
        path: file to write, in one piece or not at all.
        title: of the page.
        facts: name to value, the table at the top.
        sections: heading, text (paragraphs part at blank lines), and a figure or trusted HTML.
            Title, facts, headings and texts are escaped.
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    body = []
    for number, (heading, text, content) in enumerate(sections):
        paragraphs = "".join(f"<p>{escape(p)}</p>" for p in text.split("\n\n") if p.strip())
        card = svg(content) if isinstance(content, Figure) else content
        tag = "figure" if isinstance(content, Figure) else "div"
        body.append(
            f'<section aria-labelledby="s{number}"><h2 id="s{number}">{escape(heading)}</h2>'
            f'{paragraphs}<{tag} class="card">{card}</{tag}></section>'
        )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>"
        f'<div class="card"><table class="facts"><tbody>{rows}</tbody></table></div></header>\n'
        f"{chr(10).join(body)}\n</main></body></html>\n"
    )
    save(path, page)
