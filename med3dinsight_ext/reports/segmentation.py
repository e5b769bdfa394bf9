"""What an evaluator's segmentations are worth: numbers, figures and one page."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, ScalarFormatter
from monai.data import MetaTensor
from monai.transforms import Orientation
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, cut, window
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.metrics.segmentation import SCORES, case_scores, mean_scores, summary
from med3dinsight_ext.reports.report import (
    INK,
    ORANGE,
    SKY,
    STYLE,
    VERMILION,
    html,
    save,
    short,
    show,
)

SIZE = 320  # pixels of an overlay's side
OUTLINES = {"label": (SKY, 2.8), "prediction": (ORANGE, 1.1)}  # in the order of drawing
TEXT = (
    "A class that neither label nor prediction has is not counted. One that only one of them has "
    "counts with Dice 0, NSD 0 and the diagonal of the volume as HD95."
)
VIEW = (
    "Each plane is cut where the label marks most voxels. Patient's right is on the left; in the "
    "sagittal plane anterior is."
)


logger = logging.getLogger(__name__)


class Case(NamedTuple):
    """One scored image: its path, ``case_scores``, and ``three_slices``, packed."""

    image: str
    scores: dict[str, dict[str, float]]
    slices: bytes


def case_names(images: Sequence[str]) -> list[str]:
    """File names without .nii or .nii.gz, with as many folders as it takes to tell them apart."""
    bare = [re.sub(r"\.nii(\.gz)?$", "", image) for image in images]
    twice = Counter(bare)
    parts = [Path(b if twice[b] == 1 else i).parts for b, i in zip(bare, images, strict=True)]
    deep = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, deep, strict=True)]
        count = Counter(names)
        more = [count[n] > 1 and d < len(p) for n, d, p in zip(names, deep, parts, strict=True)]
        if not any(more):
            return names
        deep = [d + m for d, m in zip(deep, more, strict=True)]


def three_slices(prediction: Tensor, label: MetaTensor) -> bytes:
    """The slice of each plane, in RAS, where the label (else the prediction) marks most.

    Args:
        prediction: (1, x, y, z) map of class numbers.
        label: the same; its affine counts for both.

    Returns:
        An ``.npz``: ``position`` (3,) in [0, 1], ``spacing`` (3,) in mm, and under the name of
        each plane (2, x, y, z), label and prediction, one voxel thick across the plane.
    """
    pair = [torch.as_tensor(x).as_subclass(Tensor).cpu().short() for x in (label, prediction)]
    both = Orientation("RAS", labels=None)(MetaTensor(torch.cat(pair), affine=label.affine))
    volume = both.as_tensor()
    marked = volume[0] != 0 if volume[0].any() else volume[1] != 0
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
    """Best, median and worst case in three planes: the image with both outlines on it.

    The images are read again from their files.

    Args:
        cases: at least one.
        names: what to call them.
    """
    chosen = examples(cases)
    figure = Figure((7.4, 2.85 * len(chosen) + 0.35), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for part, (which, i) in zip(parts, chosen.items(), strict=True):
        name = names[i]
        dice = mean_scores(cases[i].scores)["dice"]
        text = f"{which}: {short(name, 60)}, Dice {_number(dice, 3)}"
        part.suptitle(text, x=0.01, ha="left", fontsize=9.5, weight="bold")
        image = read_volume(cases[i].image)
        shown = window(image, guess_modality(image))[:1]  # of CT the soft tissue
        kept = np.load(io.BytesIO(cases[i].slices))
        for plane, ax in enumerate(part.subplots(1, 3)):
            where = torch.tensor([kept["position"][plane]])
            picture = cut(shown, image.pixdim.tolist(), plane, where, SIZE)[0, 0]
            show(ax, picture.numpy(), f"{PLANES[plane]} {where.item():.2f}", INK, 0.6)
            pair = torch.from_numpy(kept[PLANES[plane]])
            for marks, (color, width) in zip(pair, OUTLINES.values(), strict=True):
                for number in marks.unique()[marks.unique() > 0]:
                    mask = (marks == number)[None].float()
                    flat = cut(mask, kept["spacing"], plane, torch.tensor([0.5]), SIZE)[0, 0]
                    if flat.min() < 0.5 < flat.max():  # else too thin to show, or everywhere
                        ax.contour(flat, [0.5], colors=color, linewidths=width)
    lines = [Line2D([], [], color=color, linewidth=width) for color, width in OUTLINES.values()]
    figure.legend(lines, list(OUTLINES), loc="outside upper right", ncols=2, fontsize=8)
    listing = "; ".join(f"{which.lower()} {names[i]}" for which, i in chosen.items())
    figure.set_label(f"Outlines of label and prediction on the image: {listing}")
    return figure


@rc_context(STYLE)
def boxes(cases: Sequence[Case]) -> Figure:
    """For each class its scores over the cases: quartiles as a box, every case a dot.

    HD95 is linear up to 1 mm and logarithmic above, as a missed class costs a whole diagonal.
    """
    classes = list(cases[0].scores)
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
            ax.barh(y, high - low, 0.56, low, facecolor=(SKY, 0.45), edgecolor=INK)
            ax.plot([middle] * 2, [y - 0.28, y + 0.28], color=INK, linewidth=2.2)
            spread = y + 0.36 * (np.arange(len(x)) * 0.618 % 1 - 0.5)  # so that equals part
            ax.plot(x, spread, ".", color=VERMILION, markersize=5)
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


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(row: Mapping[str, Mapping[str, float | None]], key: str) -> tuple[str, str]:
    digits = 1 if key == "hd95" else 3
    mean, low, high = (_number(row[key][name], digits) for name in ("mean", "low", "high"))
    return mean, f"{low} to {high}"


def score_table(found: Mapping[str, Any]) -> str:
    """Mean and interval of each score, a row for each class and one for their mean, as HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Cases", *SCORES.values()))
    body = []
    for name, row in {**found["classes"], None: found["mean"]}.items():
        label = "mean of the classes" if name is None else escape(name)
        texts = (_interval(row, key) for key in SCORES)
        cells = "".join(f"<td>{mean}<br><small>{ends}</small></td>" for mean, ends in texts)
        body.append(f'<tr><th scope="row">{label}</th><td>{row["dice"]["n"]}</td>{cells}</tr>')
    return (
        f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table><p><small>95 % interval below, from drawing whole cases again.</small></p>"
    )


class SegmentationReport:
    """Scores every case of a MONAI evaluator and writes numbers, figures and one page.

    The evaluator's post-processing leaves items (``decollate=True``) with ``pred`` and ``label``,
    (1, x, y, z) class numbers on the grid of the image's file, and ``image``, whose meta names that
    file. A file that comes twice, as when ranks are filled up, counts once. All ranks get the
    results in ``engine.state.metrics`` (``dice``, ``nsd``, ``hd95``, ``dice_<class>``), the first
    writes ``cases.csv``, ``metrics.json``, ``boxes.png``, ``overlays.png`` and ``report.html``.

    Args:
        output_dir: folder to write to.
        label_names: of the classes, by number; the first is the background.
        tolerance: mm that a surface may be off and still be right for NSD.
        title: of the page.
    """

    def __init__(
        self,
        output_dir: str | Path,
        label_names: Sequence[str],
        tolerance: float = 1.0,
        title: str = "Segmentation",
    ) -> None:
        if len(label_names) < 2 or len(set(label_names)) < len(label_names):
            raise ValueError(
                "label_names must be the background and one or more classes, all different, got "
                f"{list(label_names)}; name every class number"
            )
        self.output_dir = Path(output_dir)
        self.label_names = list(label_names)
        self.tolerance = tolerance
        self.title = title
        self.cases: list[Case] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        self.cases = []

    def score(self, engine: Engine) -> None:
        for item in engine.state.output:
            image = str(item["image"].meta["filename_or_obj"])
            prediction, label = item["pred"], item["label"]
            spacing = label.pixdim.tolist()
            try:
                scores = case_scores(prediction, label, spacing, self.label_names, self.tolerance)
            except ValueError as error:
                raise ValueError(f"{error}; case {image}") from error
            self.cases.append(Case(image, scores, three_slices(prediction, label)))

    def write(self, engine: Engine) -> None:
        every = [case for rank in idist.all_gather(self.cases) for case in rank]
        cases = list({case.image: case for case in every}.values())
        if not cases:
            raise ValueError("cases must be at least one, got none; give the evaluator data")
        found = summary([case.scores for case in cases])
        means = {key: found["mean"][key]["mean"] for key in SCORES}
        means |= {f"dice_{name}": row["dice"]["mean"] for name, row in found["classes"].items()}
        engine.state.metrics |= {k: math.nan if v is None else v for k, v in means.items()}
        if idist.get_rank() == 0:
            self.write_files(cases, found)

    def write_files(self, cases: Sequence[Case], found: Mapping[str, Any]) -> None:
        """Write the numbers first: the overlays need the images, which may have gone."""
        names = case_names([case.image for case in cases])
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["case", "image", "class", "dice", "nsd", "hd95_mm"])
        for name, case in zip(names, cases, strict=True):
            for label, row in case.scores.items():
                writer.writerow([name, case.image, label, *(row[key] for key in SCORES)])
        save(self.output_dir / "cases.csv", table.getvalue())
        result = {"cases": len(cases), "tolerance_mm": self.tolerance, **found}
        save(
            self.output_dir / "metrics.json",
            json.dumps(result, indent=2, ensure_ascii=False) + "\n",
        )
        box, overlay = boxes(cases), overlays(cases, names)
        save(self.output_dir / "boxes.png", box)
        save(self.output_dir / "overlays.png", overlay)
        facts = {"Cases": len(cases), "Classes": ", ".join(self.label_names[1:])}
        for key, name in SCORES.items():
            mean, ends = _interval(found["mean"], key)
            facts[f"Mean {name}"] = f"{mean} (95 % interval {ends})"
        facts["NSD tolerance"] = f"{self.tolerance:g} mm"
        html(
            self.output_dir / "report.html",
            self.title,
            facts,
            [
                ("Scores", TEXT, score_table(found)),
                ("Spread over the cases", "Box: quartiles. Line: range. Dot: one case.", box),
                ("Best, median and worst case", "By mean Dice. " + VIEW, overlay),
            ],
        )
        means = ", ".join(
            f"{name} {_interval(found['mean'], key)[0]}" for key, name in SCORES.items()
        )
        logger.info(f"mean of {len(cases)} cases: {means}; wrote {self.output_dir / 'report.html'}")
