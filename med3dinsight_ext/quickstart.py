"""The whole method in one command, by the bundle's own workflows, ending in one HTML report."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from med3dinsight_ext.data import datalists, slicing
from med3dinsight_ext.data.demo_cohort import make_cohort
from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.metrics.retrieval import depth_group
from med3dinsight_ext.reports import report
from med3dinsight_ext.training.history import read_history

BUNDLES = bundles_dir()
PROMPTS = (
    "T1 brain MRI through the cerebellum and brainstem",
    "frontal lobes",
    "a hyperintense lesion",
)
PATCH = 48  # voxels a side, as in quickstart.yaml


def bundle_run(name: str, overlays: list[str], **overrides: Any) -> ConfigWorkflow:
    """Run a bundle in this process, printing the command that does the same.

    Args:
        name: folder in bundles/.
        overlays: config files in its configs/ or with an absolute path; the later ones win.
        overrides: key to value.
    """
    files = [str(BUNDLES / name / "configs" / overlay) for overlay in overlays]
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        raise ValueError(
            f"quickstart must find the bundles, got no {missing[0]}; run it from a clone of the "
            "repository that was installed with pip install -e"
        )
    short = [os.path.relpath(file) for file in files]
    config = short[0] if len(files) == 1 else str(short)
    words = [f"--{key} {quoted(value)}" for key, value in overrides.items()]
    print(f"\n$ python -m monai.bundle run --config_file {quoted(config)} {' '.join(words)}\n")
    logging_file = str(BUNDLES / name / "configs" / "logging.conf")
    workflow = ConfigWorkflow(files, logging_file=logging_file, workflow_type="train", **overrides)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def quoted(value: object) -> str:
    """A value as a shell takes it, in double quotes if it needs any."""
    text = str(value)
    return text if re.fullmatch(r"[\w./:-]+", text) else f'"{text}"'


def fitting_spacing(items: list[dict[str, Any]]) -> float:
    """Isotropic spacing in mm at which the median volume just fits a patch."""
    extents = []
    for item in items[:50]:
        header: Any = nib.load(item["image"]).header
        extents.append(max(np.multiply(header.get_zooms()[:3], header.get_data_shape()[:3])))
    return round(float(np.median(extents)) / PATCH, 2)


def gallery_rows(workflow: ConfigWorkflow, queries: int = 4, found: int = 5) -> list[Any]:
    """Queries from held-out volumes with the slices whose image embedding is nearest their token.

    Candidates share the query's plane and depth bin, as in the table's "within" rows.
    """
    dataset, student, inferer, device = (
        workflow.parser.get_parsed_content(key)
        for key in ("validate::dataset", "student", "validate::inferer", "device")
    )
    student.eval()
    tokens, targets, group, shown = [], [], [], []
    for item in dataset:
        volume: MetaTensor = item["image"]
        plane, position = item["plane"], item["position"]
        with torch.no_grad():
            out = inferer(
                volume.as_tensor()[None].to(device), student, plane[None].to(device),
                position[None].to(device),
            )  # fmt: skip
        tokens.append(out.tokens.get("image", out.tokens.get("joint"))[0].cpu())
        targets.append(item["image_target"])
        group.append(depth_group(plane, position, 4))
        about = json.loads(Path(item["targets"]).with_suffix(".json").read_text())
        name = Path(about["image"]).name.split(".")[0]
        texts = [known["caption"] or "" for known in about["slices"]]
        spacing = volume.pixdim.tolist()
        for i, (p, t) in enumerate(zip(plane.tolist(), position.tolist(), strict=True)):
            image = slicing.cut(volume.as_tensor(), spacing, p, position[i : i + 1], 96)[0, 0]
            caption = texts[i] if len(texts) == len(plane) else ""
            shown.append(report.Slice(image.numpy(), p, t, name, caption))
    token, target, groups = torch.cat(tokens), torch.cat(targets), torch.cat(group)
    score = F.normalize(token, dim=1) @ target.mT
    generator = torch.Generator().manual_seed(0)
    rows = []
    for plane in (2, 1, 0, 2)[:queries]:
        mine = torch.tensor([i for i, s in enumerate(shown) if s.plane == plane and s.caption])
        if not len(mine):
            mine = torch.tensor([i for i, s in enumerate(shown) if s.plane == plane])
        query = int(mine[torch.randint(len(mine), (1,), generator=generator)])
        peers = (groups == groups[query]).nonzero().flatten()
        best = peers[score[query, peers].argsort(descending=True)[:found]].tolist()
        rows.append(
            (
                shown[query],
                [report.Found(shown[i], float(score[query, i]), i == query) for i in best],
            )
        )
    return rows


def picture(path: Path, alt: str) -> str:
    """A PNG as inline HTML."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{alt}" style="width:100%" src="data:image/png;base64,{content}">'


ARMS = {"scratch": "from scratch", "pretrained": "pre-trained"}


def finetune(root: Path, folder: Path, weights: Path, **overrides: Any) -> dict[str, Any]:
    """Train a segmenter on few labels, from scratch and from weights, on one schedule.

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
            "bundle_root": str(folder / arm), "dataset_dir": str(root),
            "datalist": str(root / "dataset.json"), "split": str(root / "split.json"),
            **({"pretrained": str(weights)} if arm == "pretrained" else {}), **overrides,
        }  # fmt: skip
        base = ["train.json", "quickstart.yaml"]
        bundle_run("seg-finetune", base, **settings)
        bundle_run("seg-finetune", [*base, "evaluate.json"], **settings)
        found[arm] = json.loads((folder / arm / "eval" / "metrics.json").read_text())
    return found


def quickstart(data: str | None = None, out: str = "quickstart", max_epochs: int = 0) -> None:
    """Embed, pre-train, evaluate, ask with text, fine-tune, and write out/report.html.

    Args:
        data: folder of .nii or .nii.gz volumes, with captions.jsonl and split.json beside them if
            there are any; by default a cohort is made from a brain template, whose labels are then
            used to fine-tune.
        out: folder to write.
        max_epochs: instead of quickstart.yaml's.
    """
    begin = time.perf_counter()
    folder = Path(out)
    root = Path(data) if data else make_cohort(folder / "data")
    more: dict[str, Any] = {"bundle_root": str(folder / "pretrain"), "dataset_dir": str(root)}
    for key, name in (("split", "split.json"), ("captions", "captions.jsonl")):
        if (root / name).exists():
            more[key] = str(root / name)
    if data:
        spacing = fitting_spacing(datalists.datalist(root))
        more |= {"spacing": [spacing] * 3, "val_fraction": 0.25}
    if max_epochs:
        more |= {"max_epochs": max_epochs}
    base = ["train.json", "quickstart.yaml"]
    times = {"make the cohort" if not data else "read the folder": time.perf_counter() - begin}

    def step(name: str, overlays: list[str], **extra: Any) -> ConfigWorkflow:
        start = time.perf_counter()
        workflow = bundle_run("pretrain", overlays, **more, **extra)
        times[name] = time.perf_counter() - start
        return workflow

    step("embed", [*base, "embed.json"])
    step("pre-train", base)
    evaluated = step("evaluate", [*base, "evaluate.json"])
    items = evaluated.parser.get_parsed_content("val_items")
    chosen = folder / "pretrain" / "eval" / "asked.jsonl"
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text(
        json.dumps({"image": items[0]["image"], "modality": items[0]["modality"]}) + "\n"
    )
    asked = {key: value for key, value in more.items() if key in ("bundle_root", "spacing")}
    start = time.perf_counter()
    bundle_run(
        "pretrain", ["inference.json", "quickstart.yaml"], **asked,
        datalist=str(chosen), prompts=list(PROMPTS),
    )  # fmt: skip
    times["text prompts"] = time.perf_counter() - start
    extra: list[tuple[str, str, Any]] = []
    if not data:
        start = time.perf_counter()
        short = {"max_epochs": max_epochs} if max_epochs else {}
        arms = finetune(root, folder, folder / "pretrain" / "models" / "model.pt", **short)
        times["fine-tune twice"] = time.perf_counter() - start
        cases = arms["scratch"]["cases"]
        text = (
            f"The same network, trained on 4 labelled cases on one schedule, from random weights "
            f"and from the weights above; {cases} test cases. One seed on copies of one brain "
            "shows that the weights arrive and what to expect of the files, not whether "
            "pre-training helps; see benchmarks/README.md."
        )
        figures = {ARMS[arm]: found for arm, found in arms.items()}
        extra = [
            ("Fine-tuning with few labels", text, report.arms(figures)),
            (
                "What the fine-tuned network draws",
                "Best, median and worst test case of the pre-trained arm.",
                picture(folder / "pretrained" / "eval" / "overlays.png", "Overlays of three cases"),
            ),
        ]
    results = folder / "pretrain" / "eval"
    tables = json.loads((results / "retrieval.json").read_text())
    history = read_history(results / "history.jsonl")
    scores = next(results.glob("*_text.png"))
    facts = {
        "data": f"{root}, {len(items)} volumes held out for the tables below",
        "network": type(evaluated.parser.get_parsed_content("backbone")).__name__,
        "epochs": history[-1]["epoch"],
        "time": f"{time.perf_counter() - begin:.0f} s: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()),
    }
    report.html(
        folder / "report.html",
        "Med3DInsight quickstart",
        facts,
        [
            (
                "Training",
                "Loss parts, and retrieval on validation volumes.",
                report.curves(history),
            ),
            (
                "Does a slice token know its slice?",
                "Held-out volumes. Within: candidates of the same modality, plane and depth only, "
                "so that knowing where a slice lies is not enough. Volume zero: the same student "
                "with every voxel set to zero, which answers from plane and position alone. Where "
                "both agree, the student knows where slices lie, not whose they are; so it is for "
                "the built-in cohort, whose brains are copies of one. For real patients see "
                "benchmarks/README.md.",
                report.retrieval_table(tables["student"], tables["volume_zero"]),
            ),
            (
                "What tokens find",
                "Each row: a slice of a held-out volume (the network saw only the volume) and the "
                "slices whose teacher embedding is nearest its token.",
                report.gallery(gallery_rows(evaluated)),
            ),
            (
                "Text to slice",
                "Score of each prompt along the three axes of one held-out volume.",
                picture(scores, "Score of text prompts along each plane, with the best slices"),
            ),
            *extra,
        ],
    )
    print(f"\nreport: {folder / 'report.html'} ({facts['time']})")
