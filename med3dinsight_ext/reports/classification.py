"""What an evaluator's classifications are worth: numbers, figures and one page."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from monai.data import MetaTensor
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, cut
from med3dinsight_ext.metrics.classification import BINS, SCORES, auroc_of, calibration, scores
from med3dinsight_ext.reports.report import (
    BLUE,
    COLORS,
    DASHED,
    INK,
    ORANGE,
    SKY,
    STYLE,
    VERMILION,
    cell,
    html,
    percent,
    save,
    short,
    show,
)

logger = logging.getLogger(__name__)
COUNTS = LinearSegmentedColormap.from_list("counts", ["#eef3f7", BLUE])


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
    """How often the classifier is right against how sure it is, above how often it is so sure.

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
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that is right")
    ax.set_title(f"expected calibration error {percent(float(error))} %", loc="left")
    ax.legend(loc="upper left")
    below.bar((np.arange(BINS) + 0.5) / BINS, count, 0.9 / BINS, color=BLUE)
    below.set(xlabel="probability of the predicted class", ylabel="cases")
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
    looks = cycle([(c, s) for s in ("-", "--", ":") for c in (*COLORS, SKY, ORANGE, "#CC79A7")])
    said = []
    for c in range(len(names)) if len(names) > 2 else (1,):
        positive = (label == c).double()
        area = float(auroc_of(probability, label, torch.ones(len(label), 1).double(), c))
        if math.isnan(area):
            continue
        _, group = probability[:, c].neg().unique(return_inverse=True)  # surest first, ties at once
        counts = torch.zeros(2, int(group.max()) + 2).double()
        counts[0].index_add_(0, group + 1, 1 - positive)
        counts[1].index_add_(0, group + 1, positive)
        x, y = counts.cumsum(1) / counts.sum(1, keepdim=True)
        color, dash = next(looks)
        said.append(f"{short(names[c], 24)} {percent(area)}")
        ax.plot(x.numpy(), y.numpy(), dash, color=color, label=said[-1])
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.set(xlabel="1 − specificity", ylabel="sensitivity")
    figure.legend(loc="outside right upper", title="AUROC in per cent", alignment="left")
    figure.set_label("ROC curves; AUROC in per cent: " + ", ".join(said))
    return figure


class Shown(NamedTuple):
    """A case to show: image (1, x, y, z), heat (1, x, y, z) high where it mattered, its title."""

    image: MetaTensor
    heat: Tensor
    title: str


@rc_context(STYLE)
def heat_figure(cases: Sequence[Shown]) -> Figure:
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
            show(ax, picture, f"{PLANES[plane]} {place:.2f}", INK, 0.6)
            ax.imshow(warm, cmap="inferno", alpha=0.65 * warm, vmin=0, vmax=1)
    figure.set_label("Where the network looked: " + "; ".join(case.title for case in cases))
    return figure


class Row(NamedTuple):
    """One case: probability (k,), and the true class or None."""

    probability: Tensor
    label: int | None


class ClassificationReport:
    """Writes what an evaluator's classifications are worth, and puts the scores into its metrics.

    Attach it to a ``SupervisedEvaluator`` with decollated output: ``pred`` (k,) probabilities,
    ``label`` a class or None (or -1) if unknown, and ``image`` (1, x, y, z) in RAS with its path.
    Without any label only ``cases.csv`` is written; a case without one is in no score.

    Args:
        output_dir: gets ``cases.csv``, ``metrics.json``, ``report.html``, ``confusion.png`` and
            ``calibration.png``.
        class_names: in the order of the network's outputs.
        title: of the page.
        cam: image (1, 1, x, y, z) and class to a map of that shape, high where it matters.
            MONAI's ``GradCAM`` turns its map upside down unless ``postprocessing`` is identity.
        cam_cases: to show with ``cam``: half the surest right, half the surest wrong ones.
    """

    def __init__(
        self,
        output_dir: str | Path,
        class_names: Sequence[str],
        title: str = "Classification",
        cam: Callable[[Tensor, int], Tensor] | None = None,
        cam_cases: int = 6,
    ) -> None:
        self.output_dir, self.class_names, self.title = Path(output_dir), list(class_names), title
        self.cam, self.cam_cases = cam, cam_cases
        self.start()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self) -> None:
        self.rows: dict[str, Row] = {}
        self.images: dict[str, MetaTensor] = {}  # the surest right and wrong ones

    def collect(self, engine: Engine) -> None:
        output = engine.state.output
        if not isinstance(output, list):
            raise TypeError(
                f"the engine's output must be a list of cases, got {type(output).__name__}; "
                "set decollate: true in the evaluator"
            )
        for case in output:
            image, label = case["image"], case.get("label")
            name = str(getattr(image, "meta", {}).get("filename_or_obj", ""))
            if not name:
                raise ValueError(
                    "image must be a MetaTensor with meta['filename_or_obj'], got none; "
                    "load it with LoadImaged or read_volume and keep its meta data"
                )
            probability = torch.as_tensor(case["pred"]).detach().as_subclass(Tensor).cpu().flatten()
            if len(probability) != len(self.class_names):
                raise ValueError(
                    f"class_names must name the network's {len(probability)} outputs, got "
                    f"{self.class_names}; correct the names or the network"
                )
            number = -1 if label is None else int(torch.as_tensor(label))
            if number >= len(self.class_names):
                raise ValueError(
                    f"label must be the index of one of {self.class_names}, got {number} of "
                    f"{name}; convert the items with data.class_items"
                )
            self.rows[name] = Row(probability.double(), None if number < 0 else number)
            if self.cam is not None:
                self.images[name] = image.detach().cpu()
                kept = self.candidates({name: self.rows[name] for name in self.images})
                self.images = {name: self.images[name] for name in kept}

    def candidates(self, rows: Mapping[str, Row]) -> list[str]:
        """Names of the cases to show: half the surest right, half the surest wrong ones."""
        order = sorted(rows, key=lambda name: (-float(rows[name].probability.max()), name))
        known = [name for name in order if rows[name].label is not None]
        right = [n for n in known if int(rows[n].probability.argmax()) == rows[n].label]
        wrong = [n for n in known if n not in set(right)]
        return right[: (self.cam_cases + 1) // 2] + wrong[: self.cam_cases // 2]

    def finish(self, engine: Engine) -> None:
        rows: dict[str, Row] = {}
        images: dict[str, MetaTensor] = {}
        for their_rows, their_images in idist.all_gather((self.rows, self.images)):
            rows |= their_rows  # by name: what a sampler repeats to even out the ranks counts once
            images |= their_images
        rows = dict(sorted(rows.items()))
        if idist.get_rank() == 0:
            self.write_cases(rows)
        known = {name: row for name, row in rows.items() if row.label is not None}
        if not known:
            return
        probability = torch.stack([row.probability for row in known.values()])
        label = torch.tensor([row.label for row in known.values()])
        result = scores(probability, label, self.class_names)
        for key in (*SCORES, "accuracy"):
            engine.state.metrics[key] = result[key]
        if idist.get_rank() == 0:
            device = getattr(engine.state, "device", "cpu")
            chosen = self.candidates({name: rows[name] for name in images})
            self.write_metrics(result)
            shown = [self.show(name, rows[name], images[name], device) for name in chosen]
            self.write_report(result, probability, label, len(rows), shown)

    def write_metrics(self, result: Mapping[str, Any]) -> None:
        strict = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN becomes null
        save(self.output_dir / "metrics.json", json.dumps(strict, indent=1))

    def write_report(
        self,
        result: Mapping[str, Any],
        probability: Tensor,
        label: Tensor,
        count: int,
        shown: Sequence[Shown],
    ) -> None:
        confusion, sureness = confusion_figure(result), calibration_figure(probability, label)
        for name, figure in (("confusion", confusion), ("calibration", sureness)):
            save(self.output_dir / f"{name}.png", figure)
        sections: list[tuple[str, str, Figure | str]] = [
            ("Scores", "", score_table(result)),
            ("Confusion matrix", "Per cent are of the row, the true class.", confusion),
            ("Calibration", "On the diagonal, 80 % sure is 80 % right.", sureness),
            ("ROC", "", roc_figure(probability, label, self.class_names)),
        ]
        if shown:
            text = (
                "The surest right cases, then the surest wrong ones; brighter matters more. "
                "A map is as coarse as the network's deepest features."
            )
            sections.append(("Where the network looked", text, heat_figure(shown)))
        facts = {"Cases": count, "Without label": count - len(label)}
        facts |= {f"Cases of {name}": row["n"] for name, row in result["per_class"].items()}
        html(self.output_dir / "report.html", self.title, facts, sections)
        values = ", ".join(f"{name} {result[key]:.3f}" for key, name in SCORES.items())
        logger.info(f"{len(label)} cases: {values}; wrote {self.output_dir / 'report.html'}")

    def write_cases(self, rows: Mapping[str, Row]) -> None:
        names, buffer = self.class_names, io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(["image", "label", "prediction", *(f"p_{name}" for name in names)])
        for image, (probability, label) in rows.items():
            truth = "" if label is None else names[label]
            said = names[int(probability.argmax())]
            table.writerow([image, truth, said, *(f"{p:.6g}" for p in probability.tolist())])
        save(self.output_dir / "cases.csv", buffer.getvalue())
        logger.info(f"wrote {self.output_dir / 'cases.csv'} with {len(rows)} cases")

    def show(self, name: str, row: Row, image: MetaTensor, device: Any) -> Shown:
        """The case with its map for the class predicted."""
        assert self.cam is not None and row.label is not None  # for mypy
        said = int(row.probability.argmax())
        with torch.enable_grad():
            heat = self.cam(image.as_tensor()[None].to(device), said).detach().cpu()
        if heat.shape != (1, *image.shape):
            raise ValueError(
                f"cam must give a map of the image's shape {(1, *image.shape)}, got "
                f"{tuple(heat.shape)}; resample it to the image"
            )
        truth, call = self.class_names[row.label], self.class_names[said]
        sure = percent(float(row.probability[said]))
        title = f"{short(Path(name).name, 80)}\ntruth {truth}, prediction {call} ({sure} %)"
        return Shown(image, heat[0].as_subclass(Tensor).float(), title)


def score_table(result: Mapping[str, Any]) -> str:
    """All cases with intervals, then each class, as HTML tables in per cent.

    Args:
        result: from ``scores``.
    """

    def row(tag: str, scope: str, values: Sequence[str]) -> str:
        return "".join(f'<{tag} scope="{scope}">{escape(value)}</{tag}>' for value in values)

    columns = ("auroc", "sensitivity", "specificity", "f1")
    classes = "".join(
        f"<tr>{row('th', 'row', [name])}"
        + "".join(f"<td>{percent(values[key])}</td>" for key in columns)
        + f"<td>{values['n']}</td></tr>"
        for name, values in result["per_class"].items()
    )
    whole = "".join(cell(result, key) for key in SCORES) + f"<td>{percent(result['accuracy'])}</td>"
    return (
        f'<table class="scores"><thead><tr>{row("th", "col", ["", *SCORES.values(), "Accuracy"])}'
        f"</tr></thead><tbody><tr>{row('th', 'row', ['All cases'])}{whole}</tr></tbody></table>"
        f'<table class="scores"><thead><tr>'
        f"{row('th', 'col', ['', 'AUROC', 'Sensitivity', 'Specificity', 'F1', 'Cases'])}"
        f"</tr></thead><tbody>{classes}</tbody></table>"
        "<p><small>Per cent; 95 % interval below, from drawing the cases again.</small></p>"
    )
