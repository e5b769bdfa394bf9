"""Evaluator handler that scores classifications and writes numbers, figures and a page."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import Tensor

from med3dinsight_ext.metrics.classification import SCORES, scores
from med3dinsight_ext.reports.classification_figures import (
    ActivationMap,
    calibration_figure,
    confusion_figure,
    heat_figure,
    roc_figure,
)
from med3dinsight_ext.reports.figures import save_png
from med3dinsight_ext.reports.formatting import percent, short
from med3dinsight_ext.reports.pages import write_csv, write_page, write_text
from med3dinsight_ext.reports.run_facts import run_block
from med3dinsight_ext.training.origin import origin_text, scored

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One case: probability (k,), and the true class or None."""

    probability: Tensor
    label: int | None


class ClassificationReport:
    """Scores an evaluator's classifications, writes them, and adds the scores to its metrics.

    Attach it to a ``SupervisedEvaluator`` with decollated output: ``pred`` (k,) probabilities,
    ``label`` a class or None (or -1) if unknown, and ``image`` (1, x, y, z) in RAS with its path.
    Without any label only ``cases.csv`` is written; a case without one is in no score.

    Args:
        output_dir: gets ``cases.csv``, ``metrics.json``, ``report.html``, ``confusion.png`` and
            ``calibration.png``.
        class_names: in the order of the network's outputs.
        title: of the page.
        cam: image (1, 1, x, y, z) and class to a map of that shape, high where it matters.
            MONAI's ``GradCAM`` inverts its map unless ``postprocessing`` is identity.
        cam_cases: to show with ``cam``: half of them right, half wrong, the most confident first.
        weights: file of the network; the page shows the training that wrote it.
        inference: as for ``SegmentationReport``.
    """

    def __init__(
        self,
        output_dir: str | Path,
        class_names: Sequence[str],
        title: str = "Classification",
        cam: Callable[[Tensor, int], Tensor] | None = None,
        cam_cases: int = 6,
        weights: str | Path | None = None,
        inference: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir, self.title = Path(output_dir), title
        self.class_names = list(map(str, class_names))
        self.cam, self.cam_cases, self.weights = cam, cam_cases, weights
        self.inference = dict(inference or {})
        self.start()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self) -> None:
        self.rows: dict[str, Row] = {}
        self.images: dict[str, MetaTensor] = {}  # the most confident right and wrong ones

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
            if not probability.isfinite().all():
                raise ValueError(
                    f"probability must be finite, got NaN of {name}; run with --amp false"
                )
            number = -1 if label is None else int(torch.as_tensor(label))
            if number >= len(self.class_names):
                raise ValueError(
                    f"label must be the index of one of {self.class_names}, got {number} of "
                    f"{name}; convert the items with datalists.class_items"
                )
            self.rows[name] = Row(probability.double(), None if number < 0 else number)
            if self.cam is not None:
                self.images[name] = image.detach().cpu()
                kept = self.candidates({name: self.rows[name] for name in self.images})
                self.images = {name: self.images[name] for name in kept}

    def candidates(self, rows: Mapping[str, Row]) -> list[str]:
        """Names of the cases to show: the most confident, half right and half wrong."""
        order = sorted(rows, key=lambda name: (-float(rows[name].probability.max()), name))
        known = [name for name in order if rows[name].label is not None]
        right = [n for n in known if int(rows[n].probability.argmax()) == rows[n].label]
        wrong = [n for n in known if n not in set(right)]
        return right[: (self.cam_cases + 1) // 2] + wrong[: self.cam_cases // 2]

    def finish(self, engine: Engine) -> None:
        rows: dict[str, Row] = {}
        images: dict[str, MetaTensor] = {}
        for rank_rows, rank_images in idist.all_gather((self.rows, self.images)):
            rows |= rank_rows  # by name: cases that a sampler repeats count once
            images |= rank_images
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
            about = scored(known, self.weights)
            told = json.dumps({**result, **about, "inference": self.inference})
            strict = json.loads(told, parse_constant=lambda _: None)  # NaN to null
            write_text(self.output_dir / "metrics.json", json.dumps(strict, indent=1))
            maps = [self.show(name, rows[name], images[name], device) for name in chosen]
            self.write_report(result, probability, label, len(rows), maps, about)

    def write_report(
        self,
        result: Mapping[str, Any],
        probability: Tensor,
        label: Tensor,
        count: int,
        maps: Sequence[ActivationMap],
        about: Mapping[str, Any],
    ) -> None:
        figures = {
            "confusion": confusion_figure(result),
            "calibration": calibration_figure(probability, label),
        }
        for name, figure in figures.items():
            save_png(self.output_dir / f"{name}.png", figure)
        facts = {"Cases": count, "Without label": count - len(label)}
        facts |= {f"Cases of {name}": row["n"] for name, row in result["per_class"].items()}
        page = self.output_dir / "report.html"
        write_page(
            page,
            "classification.html",
            title=self.title,
            facts=facts,
            origin=origin_text(about["cases_from"]),
            cases_from=about["cases_from"],
            result=result,
            scores=SCORES,
            roc=roc_figure(probability, label, self.class_names),
            maps=heat_figure(maps) if maps else None,
            run=run_block(self.weights),
            **figures,
        )
        values = ", ".join(f"{name} {result[key]:.3f}" for key, name in SCORES.items())
        logger.info(f"{len(label)} cases: {values}; wrote {page}")

    def write_cases(self, rows: Mapping[str, Row]) -> None:
        names = self.class_names
        table = [["image", "label", "prediction", *(f"p_{name}" for name in names)]]
        for image, (probability, label) in rows.items():
            truth = "" if label is None else names[label]
            predicted = names[int(probability.argmax())]
            table.append([image, truth, predicted, *(f"{p:.6g}" for p in probability.tolist())])
        write_csv(self.output_dir / "cases.csv", table)
        logger.info(f"wrote {self.output_dir / 'cases.csv'} with {len(rows)} cases")

    def show(self, name: str, row: Row, image: MetaTensor, device: Any) -> ActivationMap:
        """The case with its map of the predicted class."""
        assert self.cam is not None and row.label is not None  # for mypy
        predicted = int(row.probability.argmax())
        with torch.enable_grad():
            heat = self.cam(image.as_tensor()[None].to(device), predicted).detach().cpu()
        if heat.shape != (1, *image.shape):
            raise ValueError(
                f"cam must give a map of the image's shape {(1, *image.shape)}, got "
                f"{tuple(heat.shape)}; resample it to the image"
            )
        truth, call = self.class_names[row.label], self.class_names[predicted]
        confidence = percent(float(row.probability[predicted]))
        title = f"{short(Path(name).name, 80)}\ntruth {truth}, prediction {call} ({confidence} %)"
        return ActivationMap(image, heat[0].as_subclass(Tensor).float(), title)
