"""Evaluator handler that scores segmentations and writes numbers, figures and a page."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from med3dinsight_ext.metrics.segmentation import (
    SCORES,
    case_scores,
    confusion,
    confusion_counts,
    mean_scores,
    summary,
    worst_class,
)
from med3dinsight_ext.reports.figures import class_colors, save_png
from med3dinsight_ext.reports.formatting import case_names, number
from med3dinsight_ext.reports.pages import write_csv, write_page, write_text
from med3dinsight_ext.reports.run_facts import run_block
from med3dinsight_ext.reports.segmentation_figures import Case, boxes, overlays, three_slices
from med3dinsight_ext.reports.viewer import write_viewer
from med3dinsight_ext.training.origin import origin_text, scored

DIGITS = {"dice": 3, "nsd": 3, "hd95": 1}
LOWEST = 10  # cases in the page's table, with viewers

logger = logging.getLogger(__name__)


class SegmentationReport:
    """Scores every case of a MONAI evaluator and writes numbers, figures and one page.

    The evaluator's post-processing leaves items (``decollate=True``) with ``pred`` and ``label``,
    (1, x, y, z) class numbers on the grid of the image's file, and ``image``, whose meta names that
    file. A repeated file, as when a sampler pads the ranks, counts once. All ranks get the results
    in ``engine.state.metrics`` (``dice``, ``nsd``, ``hd95``, ``dice_<class>``), the first writes
    ``cases.csv``, ``metrics.json`` (with the ``confusion`` of classes over all cases and the
    ``worst_class`` of each case), ``boxes.png``, ``overlays.png``, ``report.html`` and, of
    those of its cases with the lowest Dice, ``viewer``.

    Args:
        output_dir: folder to write to.
        label_names: of the classes, by number; the first is the background.
        tolerance: mm that a surface may be off and still be right for NSD.
        title: of the page.
        weights: file of the network; the page shows the training that wrote it.
        inference: settings of the bundle's configs that the predictions depend on, by their keys;
            they go into ``metrics.json``, and ``publish`` compares them.
    """

    def __init__(
        self,
        output_dir: str | Path,
        label_names: Sequence[str],
        tolerance: float = 1.0,
        title: str = "Segmentation",
        weights: str | Path | None = None,
        inference: Mapping[str, Any] | None = None,
    ) -> None:
        if len(label_names) < 2 or len(set(label_names)) < len(label_names):
            raise ValueError(
                "label_names must be the background and one or more classes, all different, got "
                f"{list(label_names)}; name every class number"
            )
        self.output_dir = Path(output_dir)
        self.label_names = list(label_names)
        self.tolerance = tolerance
        self.title, self.weights = title, weights
        self.inference = dict(inference or {})
        self.cases: list[Case] = []
        self.viewers: dict[str, tuple[float, str]] = {}  # mean Dice and page by image

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        self.cases, self.viewers = [], {}

    def score(self, engine: Engine) -> None:
        for item in engine.state.output:
            image = str(item["image"].meta["filename_or_obj"])
            prediction, label = item["pred"], item["label"]
            spacing = label.pixdim.tolist()
            try:
                scores = case_scores(prediction, label, spacing, self.label_names, self.tolerance)
            except ValueError as error:
                raise ValueError(f"{error}; case {image}") from error
            counts = confusion_counts(prediction, label, self.label_names)
            worst = worst_class(scores)
            shown = self.label_names.index(worst, 1) if worst else 0
            slices = three_slices(prediction, label, shown)
            self.cases.append(Case(image, scores, counts, slices))
            if idist.get_rank() == 0 and worst and Path(image).exists():
                self.view(image, mean_scores(scores)["dice"], prediction, label)

    def view(self, image: str, dice: float, prediction: MetaTensor, label: MetaTensor) -> None:
        """Write the viewer of a case with one of the lowest Dice; the highest of them makes way."""
        if image in self.viewers:
            return
        page, highest = f"viewer/case-{len(self.viewers) + 1:02d}.html", None
        if len(self.viewers) == LOWEST:
            highest = max(self.viewers, key=self.viewers.__getitem__)
            limit, page = self.viewers[highest]
            if dice >= limit:
                return
        maps = {"Prediction": prediction, "Label": label}
        target = self.output_dir / page
        if write_viewer(target, image, maps, self.label_names[1:], "../report.html"):
            if highest:
                del self.viewers[highest]
            self.viewers[image] = dice, page

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
        table: list[list[object]] = [["case", "image", "class", "dice", "nsd", "hd95_mm"]]
        for name, case in zip(names, cases, strict=True):
            for label, row in case.scores.items():
                table.append([name, case.image, label, *(row[key] for key in SCORES)])
        write_csv(self.output_dir / "cases.csv", table)
        mixed = confusion(np.sum([case.counts for case in cases], 0), self.label_names)
        worst = lowest(cases, names)
        about = scored((case.image for case in cases), self.weights)
        result = {
            "cases": len(cases),
            **about,
            "inference": self.inference,
            "tolerance_mm": self.tolerance,
            **found,
            "confusion": mixed,
            "worst_class": {row["case"]: row["class"] for row in worst},
        }
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_text(self.output_dir / "metrics.json", text)
        figures = {"boxes": boxes(cases), "overlays": overlays(cases, names)}
        for name, figure in figures.items():
            save_png(self.output_dir / f"{name}.png", figure)
        viewed = {image: page for image, (_, page) in self.viewers.items()}
        viewers = {n: viewed.get(c.image) for n, c in zip(names, cases, strict=True)}
        page = self.output_dir / "report.html"
        write_page(
            page,
            "segmentation.html",
            title=self.title,
            facts=self.facts(len(cases), found),
            origin=origin_text(about["cases_from"]),
            cases_from=about["cases_from"],
            found=found,
            viewers=viewers,
            scores=SCORES,
            digits=DIGITS,
            confusion=mixed,
            worst=worst[:LOWEST],
            colors=class_colors(self.label_names[1:]),
            run=run_block(self.weights),
            **figures,
        )
        means = {SCORES[key]: number(found["mean"][key]["mean"], DIGITS[key]) for key in SCORES}
        text = ", ".join(f"{name} {mean}" for name, mean in means.items())
        logger.info(f"mean of {len(cases)} cases: {text}; wrote {page}")

    def facts(self, cases: int, found: Mapping[str, Any]) -> dict[str, object]:
        """The table at the top of the page."""
        facts: dict[str, object] = {"Cases": cases, "Classes": ", ".join(self.label_names[1:])}
        for key, name in SCORES.items():
            stats = found["mean"][key]
            mean, low, high = (number(stats[k], DIGITS[key]) for k in ("mean", "low", "high"))
            facts[f"Mean {name}"] = f"{mean} (95 % interval {low} to {high})"
        return facts | {"NSD tolerance": f"{self.tolerance:g} mm"}


def lowest(cases: Sequence[Case], names: Sequence[str]) -> list[dict[str, Any]]:
    """Each case that has a score: ``case``, ``dice`` (mean), ``class`` and ``class_dice`` (worst).

    Lowest mean Dice first.
    """
    rows = []
    for name, case in zip(names, cases, strict=True):
        if worst := worst_class(case.scores):
            dice = mean_scores(case.scores)["dice"]
            class_dice = case.scores[worst]["dice"]
            rows.append({"case": name, "dice": dice, "class": worst, "class_dice": class_dice})
    return sorted(rows, key=lambda row: row["dice"])
