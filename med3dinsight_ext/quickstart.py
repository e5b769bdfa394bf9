"""The whole method in one command: runs the bundles' workflows and writes one HTML report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow

from med3dinsight_ext.data import datalists
from med3dinsight_ext.data.demo_cohort import make_cohort
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.reports.pages import write_page
from med3dinsight_ext.reports.retrieval import TASKS, gallery, retrieval_tasks, retrieved_slices
from med3dinsight_ext.reports.segmentation_figures import dice_comparison
from med3dinsight_ext.reports.training_curves import curves
from med3dinsight_ext.training.history import read_history
from med3dinsight_ext.training.launch import bundle_run

PROMPTS = (
    "T1 brain MRI through the cerebellum and brainstem",
    "frontal lobes",
    "a hyperintense lesion",
)
ARMS = {"scratch": "from scratch", "pretrained": "pre-trained"}
PATCH = 48  # voxels a side, as in quickstart.yaml


def fitting_spacing(items: list[dict[str, Any]]) -> float:
    """Isotropic spacing in mm at which the median volume just fits a patch."""
    extents = []
    for item in items[:50]:
        header: Any = nib.load(item["image"]).header
        extents.append(max(np.multiply(header.get_zooms()[:3], header.get_data_shape()[:3])))
    return round(float(np.median(extents)) / PATCH, 2)


def finetune(root: Path, folder: Path, weights: Path, **overrides: Any) -> dict[str, Any]:
    """Train and evaluate a segmenter on few labels, from scratch and from weights.

    Args:
        root: a cohort with labels, dataset.json and split.json.
        folder: gets a bundle_root for each arm.
        weights: of the pre-trained arm.
        overrides: of the seg-finetune bundle.

    Returns:
        Arm to the content of its metrics.json.
    """
    found = {}
    for arm in ARMS:
        settings = {
            "bundle_root": str(folder / arm),
            "dataset_dir": str(root),
            "datalist": str(root / "dataset.json"),
            "split": str(root / "split.json"),
            **({"pretrained": str(weights)} if arm == "pretrained" else {}),
            **overrides,
        }
        base = ["train.json", "quickstart.yaml"]
        bundle_run("seg-finetune", base, **settings)
        bundle_run("seg-finetune", [*base, "evaluate.json"], **settings)
        found[arm] = json.loads((folder / arm / "eval" / "metrics.json").read_text())
    return found


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a step to ``times``."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def quickstart(data: str | None = None, out: str = "quickstart", max_epochs: int = 0) -> None:
    """Embed, pre-train, evaluate, score text prompts, fine-tune, and write out/report.html.

    Args:
        data: folder of .nii or .nii.gz volumes, with captions.jsonl and split.json beside them if
            there are any; by default a cohort is made from a brain template, whose labels are then
            used to fine-tune.
        out: folder to write.
        max_epochs: instead of quickstart.yaml's.
    """
    times: dict[str, float] = {}
    begin, folder = time.perf_counter(), Path(out)
    epochs = {"max_epochs": max_epochs} if max_epochs else {}
    with timed(times, "read the folder" if data else "make the cohort"):
        root = Path(data) if data else make_cohort(folder / "data")
        settings: dict[str, Any] = {"bundle_root": str(folder / "pretrain")}
        settings |= {"dataset_dir": str(root)}
        record = folder / "pretrain" / "models" / "run.json"
        before = read_json(record, "record")["config"]["dataset_dir"] if record.is_file() else root
        if Path(before).absolute() != root.absolute():
            raise ValueError(
                f"out must be new or a quickstart on {root}, got {folder} on {before}; name "
                "another with --out"
            )
        files = {"split": root / "split.json", "captions": root / "captions.jsonl"}
        settings |= {key: str(file) for key, file in files.items() if file.exists()}
        if data:
            spacing = fitting_spacing(datalists.datalist(root))
            settings |= {"spacing": [spacing] * 3, "val_fraction": 0.25}
        settings |= epochs
    base = ["train.json", "quickstart.yaml"]
    with timed(times, "embed"):
        bundle_run("pretrain", [*base, "embed.json"], **settings)
    with timed(times, "pre-train"):
        bundle_run("pretrain", base, **settings)
    with timed(times, "evaluate"):
        evaluated = bundle_run("pretrain", [*base, "evaluate.json"], **settings)
    items = evaluated.parser.get_parsed_content("val_items")
    with timed(times, "text prompts"):
        score_prompts(folder / "pretrain" / "eval", items[0], settings)
    values = pretrain_values(evaluated, folder / "pretrain" / "eval", items[0]["image"])
    if not data:
        with timed(times, "fine-tune twice"):
            weights = folder / "pretrain" / "models" / "model.pt"
            arms = finetune(root, folder, weights, **epochs)
        values |= {
            "dice": dice_comparison({ARMS[arm]: metrics for arm, metrics in arms.items()}),
            "test_cases": arms["scratch"]["cases"],
            "overlays": folder / "pretrained" / "eval" / "overlays.png",
        }
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    facts = {
        "data": f"{root}, {len(items)} volumes held out for the tables below",
        "network": type(evaluated.parser.get_parsed_content("backbone")).__name__,
        "epochs": values["epochs"],
        "time": f"{time.perf_counter() - begin:.0f} s: {steps}",
    }
    page = folder / "report.html"
    write_page(page, "quickstart.html", title="Med3DInsight quickstart", facts=facts, **values)
    print(f"\nreport: {page} ({facts['time']})")


def score_prompts(folder: Path, item: dict[str, Any], settings: dict[str, Any]) -> None:
    """Score ``PROMPTS`` in one volume with the pretrain bundle's inference.

    Args:
        folder: gets the datalist of this one volume.
        item: the volume.
        settings: of the training.
    """
    datalist = folder / "prompted.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    datalist.write_text(json.dumps({key: item[key] for key in ("image", "modality")}) + "\n")
    kept = {key: settings[key] for key in ("bundle_root", "spacing") if key in settings}
    files = ["inference.json", "quickstart.yaml"]
    bundle_run("pretrain", files, **kept, datalist=str(datalist), prompts=list(PROMPTS))


def pretrain_values(evaluated: ConfigWorkflow, results: Path, prompted: str) -> dict[str, Any]:
    """Values of the page's section on pre-training.

    Args:
        evaluated: workflow of evaluate.json.
        results: folder of its files and of those of the inference.
        prompted: image of the inference.
    """
    tables = json.loads((results / "retrieval.json").read_text())
    history = read_history(results / "history.jsonl")
    keys = ("validate::dataset", "student", "validate::inferer", "device")
    rows = retrieved_slices(*(evaluated.parser.get_parsed_content(key) for key in keys))
    return {
        "epochs": history[-1]["epoch"],
        "curves": curves(history),
        "student": tables["student"],
        "volume_zero": tables["volume_zero"],
        "tasks": retrieval_tasks(tables["student"]),
        "task_names": TASKS,
        "gallery": gallery(rows),
        "text_scores": results / f"{volume_stem(prompted)}_text.png",
        "dice": None,
    }
