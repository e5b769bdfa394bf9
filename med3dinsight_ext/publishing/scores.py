"""Scores of a bundle's ``evaluate``, as numbers and as a Markdown table."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from med3dinsight_ext.reports.formatting import short
from med3dinsight_ext.training.origin import HELD, TRAINED, origin_text

INFERENCE = ("spacing", "patch_size", "ct_range", "overlap", "tta_axes")  # predictions depend on it

logger = logging.getLogger(__name__)


class Scores(NamedTuple):
    """Measured performance.

    Attributes:
        flat: names to numbers.
        table: in Markdown, with intervals.
        cases: sentence on where they come from.
        validated: some of them were held out for validation.
    """

    flat: dict[str, float]
    table: str
    cases: str = ""
    validated: bool = False


def read_scores(
    path: str | Path | None,
    kind: str,
    classes: Sequence[str] = (),
    weights: str | None = None,
    inference: Mapping[str, Any] | None = None,
) -> Scores:
    """Scores that a bundle's ``evaluate`` wrote.

    Args:
        path: eval/metrics.json of the two fine-tuning bundles, eval/retrieval.json of pretrain.
        kind: of ``TASKS``.
        classes: that the model has, without a background; none in pre-training.
        weights: ``state_hash`` of the model's weights; None compares nothing.
        inference: values of the published inference.json; those that the scores depend on must be
            the same.

    Raises:
        ValueError: it is another file, of a model with other classes or weights, of another
            inference, or of cases that the network was trained on.
    """
    if path is None:
        return Scores({}, "")
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        read = {"segmentation": _segmentation, "classification": _classification}
        flat, rows = read.get(kind, _retrieval)(found)
        scored = list(found.get("classes") or found.get("per_class") or ())
        cases_from = found.get("cases_from")
        cases = origin_text(cases_from)
        trained, held = ((cases_from or {}).get(name, 0) for name in (TRAINED, HELD))
        flat = {key: round(x, 4) for key, x in flat.items() if x is not None and math.isfinite(x)}
    except Exception as error:  # of a parser, or of a table that is another one
        raise ValueError(
            f"metrics must be the file that evaluate wrote of this {kind}, got {path}: {error!r}"
        ) from error
    if scored != list(classes):
        raise ValueError(
            f"metrics must be of a model with the classes {list(classes)}, got "
            f"{short(str(scored), 80)} in {path}; evaluate this one"
        )
    measured = found.get("weights_sha256")
    if weights and measured is None:
        logger.warning(f"{path} does not name the weights that it was measured with")
    elif weights and measured not in (None, weights):
        raise ValueError(
            f"metrics must be of the weights that are published, got those of others in {path}; "
            "evaluate these"
        )
    used = found.get("inference") or {}
    for key, value in sorted((inference or {}).items()):
        if key in used and used[key] != (published := json.loads(json.dumps(value))):
            raise ValueError(
                f"metrics must be of the inference that is published, got {key} {used[key]} "
                f"where the bundle has {published}, in {path}; evaluate without --{key}, or train "
                "with it"
            )
    if trained:
        raise ValueError(
            f"metrics must be of cases that the network was not trained on, got {trained} of its "
            f"training in {path}; evaluate others, or publish without metrics"
        )
    return Scores(flat, _table(rows), cases, bool(held))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[escaped(text) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def escaped(text: str) -> str:
    """A text in one line or cell of Markdown, whatever a class is called."""
    return re.sub(r"([|*<`\\])", r"\\\1", " ".join(text.split()))


def _interval(mean: Any, low: Any, high: Any, digits: int = 3) -> str:
    mean, low, high = (math.nan if x is None else float(x) for x in (mean, low, high))
    ends = "" if math.isnan(low) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return "–" if math.isnan(mean) else f"{mean:.{digits}f}{ends}"


def _segmentation(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    flat = {f"mean_{key}": value["mean"] for key, value in found["mean"].items()}
    flat |= {f"dice_{name}": row["dice"]["mean"] for name, row in found["classes"].items()}
    rows = [["class", "cases", "Dice", f"NSD at {found['tolerance_mm']:g} mm", "HD95 in mm"]]
    for name, row in {**found["classes"], "mean of the classes": found["mean"]}.items():
        cells = (
            _interval(row[key]["mean"], row[key]["low"], row[key]["high"], digits)
            for key, digits in (("dice", 3), ("nsd", 3), ("hd95", 1))
        )
        rows.append([name, str(row["dice"]["n"]), *cells])
    return flat, rows


def _classification(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    titles = {
        "auroc": "AUROC",
        "balanced_accuracy": "balanced accuracy",
        "f1": "F1",
        "ece": "calibration error",
    }
    per_class = found["per_class"]
    flat = {key: found[key] for key in (*titles, "accuracy")}
    if several := len(per_class) > 2:  # of two classes both have the same
        flat |= {f"auroc_{name}": row["auroc"] for name, row in per_class.items()}
    rows = [["score", "cases", "all classes", *per_class]]
    for key, title in titles.items():
        shown = several or key != "auroc"
        cells = [
            _interval(row.get(key) if shown else None, None, None) for row in per_class.values()
        ]
        ends = found[key], found[f"{key}_low"], found[f"{key}_high"]
        rows.append([title, str(found["n"]), _interval(*ends), *cells])
    for key in ("sensitivity", "specificity"):
        cells = [_interval(row[key], None, None) for row in per_class.values()]
        rows.append([key, str(found["n"]), "", *cells])
    return flat, [*rows, ["cases of the class", "", "", *(str(r["n"]) for r in per_class.values())]]


def _retrieval(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    student, zero = found["student"], found["volume_zero"]
    names = [key.removesuffix("_chance") for key in student if key.endswith("_chance")]
    rows = [["retrieval", "slices", "recall", "volume set to zero", "chance"]]
    for name in names:
        recall = _interval(*(student[name + end] for end in ("", "_low", "_high")))
        queries = f"{student[name.rpartition('_')[0] + '_queries']:.0f}"
        others = (_interval(x, None, None) for x in (zero[name], student[f"{name}_chance"]))
        rows.append([name.replace("_r", " R@").replace("_", " "), queries, recall, *others])
    return {name: student[name] for name in names}, rows
