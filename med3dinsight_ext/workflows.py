"""Plan, pre-train, fine-tune, predict and evaluate: each one call that runs a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.labels import check_order
from med3dinsight_ext.data.layouts import Dataset, check_trainable, read_dataset
from med3dinsight_ext.io.bundles import kind_of
from med3dinsight_ext.io.files import volume_stem, write_atomic
from med3dinsight_ext.io.folder_lock import only_training
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS, real_path
from med3dinsight_ext.planning.plan import read_plan
from med3dinsight_ext.planning.run_folder import (
    DATALIST,
    OUT,
    PLAN,
    PROGRAM,
    WEIGHTS,
    as_trained,
    check_keys,
    check_start,
    images_of,
    overlay,
    prepare,
    results,
    settle,
    trained,
    weights_of,
    write_items,
)
from med3dinsight_ext.reports.predictions import write_predictions
from med3dinsight_ext.training.launch import launch

UNLABELLED = "unlabelled.json"
FEW = 5  # labelled cases
PAGE, REPORT, INPUTS = "predictions.html", "report.html", "inputs-{}.json"
PREDICTED = {
    "segmentation": "{}_seg.nii.gz", "pretraining": "{}_tokens.safetensors",
    "classification": "cases.csv",
}  # fmt: skip


def plan(
    data: str,
    labels: str | None = None,
    out: str | None = None,
    base: str | None = None,
    nnunet: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Look at a dataset and write settings for it and this machine as a config overlay.

    Args:
        data: folder of volumes (imagesTr and labelsTr, images alone, labels beside images), or
            a list: Decathlon JSON, JSONL, CSV or npz.
        labels: folder of labels that are named like the images, or a list with image and label.
        out: YAML file to write; default: runs/<name of data>/plan.yaml.
        base: plan to take settings from: another file, or the folder of a training.
        nnunet: nnU-Net's plan of this dataset, as nnUNetResEncUNetMPlans.json, to take network,
            spacing and patch from, so that ``export --to nnunet`` fits it.
        quiet: print nothing.

    Returns:
        The settings.

    Raises:
        ValueError: no usable images, labels of other images, or ``out`` exists.
    """
    dataset = read_dataset(data, labels)
    dataset.check_split()
    path = Path(out) if out else OUT / _name(data) / PLAN
    if path.exists():
        raise ValueError(f"out must be a new file, got {path}; edit it, delete it or name another")
    if base and nnunet:
        raise ValueError("plan must have base or nnunet, got both; leave one out")
    settings = settle(dataset, path, base, quiet, nnunet)
    if not quiet:
        print(f"next: {PROGRAM} pretrain {quote(data)} --plan {quote(str(path))}")
    return settings


def pretrain(
    data: str,
    out: str | None = None,
    plan: str | None = None,
    labels: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **overrides: Any,
) -> Path:
    """Pre-train a network on a folder of volumes, without their labels.

    The same call resumes a training that was interrupted.

    Args:
        data: as for ``plan``.
        out: folder of the training; default: runs/<name of data>/pretrain.
        plan: file of the command plan; default: one is made.
        labels: as for ``plan``; they are only looked at by the plan.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the pretrain bundle, as in ``--steps 2000``.

    Returns:
        ``out``: models/model.pt in it is the network.
    """
    check_keys(overrides)
    dataset = read_dataset(data, labels)
    dataset.check_split()
    if (count := len(dataset.training().items)) < 2:
        raise ValueError(
            f"data must hold at least 2 volumes to pre-train on, got {count} in {data}"
        )
    folder = Path(out) if out else OUT / _name(data) / "pretrain"
    with only_training(folder / "models"):
        settings = prepare(folder, dataset, plan, [], quiet)
        if dataset.captions:
            settings["captions"] = str(dataset.captions.absolute())
        launch("pretrain", ["train.json", overlay(folder)], settings | overrides, quiet, verbose)
    if not quiet:
        _close(folder, f"finetune {quote(data)} --pretrained {quote(str(folder))}")
    return folder


def finetune(
    data: str,
    labels: str | None = None,
    pretrained: str | None = None,
    self_training: str | None = None,
    out: str | None = None,
    plan: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **overrides: Any,
) -> Path:
    """Fine-tune a network on labelled volumes: segmentation, or classification with a list.

    The same call resumes a training that was interrupted.

    Args:
        data: as for ``plan``.
        labels: as for ``plan``.
        pretrained: folder of a pre-training, owner/name of a repository of Hugging Face, or a
            weights file; without it training starts from scratch.
        self_training: folder of a segmentation training on the same cases; its network gives the
            images without labels soft labels, which are trained on too.
        out: folder of the training; default: runs/<name of data>/finetune, or self-training.
        plan: file of the command plan; default: that of ``pretrained`` or ``self_training``, or one
            is made.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the bundle, as in ``--steps 2000``.

    Returns:
        ``out``: models/model.pt in it is the network.
    """
    check_keys(overrides)
    dataset = read_dataset(data, labels)
    dataset.check_labels()
    labelled = dataset.labelled()
    if not labelled:
        raise ValueError(
            f"data must have labels, got none for {len(dataset.items)} images in {data}; name "
            "their folder or list with --labels"
        )
    dataset.check_split()
    others = [i for i in dataset.training().items if i.get("label") in (None, "")]
    dataset = dataset._replace(items=labelled)
    check_trainable(dataset)
    name = "self-training" if self_training else "finetune"
    folder = Path(out) if out else OUT / _name(data) / name
    more: dict[str, Any] = {}
    overlays = ["train.json"]
    weights = None
    if pretrained:
        weights, home = weights_of(pretrained)
        more["pretrained"] = str(weights)
        plan = plan or home
    bundle = "seg-finetune" if dataset.segments() else "cls-finetune"
    if self_training:
        _check_self_training(self_training, dataset, others)
        overlays.append("unlabelled.yaml")
        plan = plan or self_training
    with only_training(folder / "models"):
        settings = prepare(folder, dataset, plan, ["label"], quiet) | more
        check_start(folder, weights or read_plan(folder / PLAN).get("pretrained"))
        settings |= _soft_labels(self_training, others, folder) if self_training else {}
        launch(bundle, [*overlays, overlay(folder)], settings | overrides, quiet, verbose)
    if not quiet:
        shown = quote(str(folder))
        _close(folder, f"predict {shown} FILES", f"evaluate {shown} {quote(data)}")
        if bundle == "seg-finetune" and others and len(labelled) <= FEW and not self_training:
            print(f"with few labels: {PROGRAM} finetune {quote(data)} --self_training {shown}")
    return folder


def _check_self_training(model: str, dataset: Dataset, others: Sequence[Mapping[str, Any]]) -> None:
    """Stop if a network cannot label images for a training on these cases."""
    if not dataset.segments():
        raise ValueError("self_training must have label maps, got classes; leave it out")
    if not others:
        raise ValueError(
            f"data must hold images without labels for self_training, got none in {dataset.root}"
        )
    cases = {str(item["image"]) for item in dataset.items}
    if images_of(Path(model)) != cases or not (Path(model) / WEIGHTS).is_file():
        raise ValueError(
            f"self_training must be the folder of a training on these {len(cases)} cases, got "
            f"{model}; run {PROGRAM} finetune without it first"
        )


def _soft_labels(model: str, others: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """Settings of unlabelled.yaml, whose list of images is written.

    Args:
        model: folder of the training whose network labels them.
        others: images without labels; none is kept for testing.
        folder: of the training that learns from them.
    """
    rows = [{key: str(item[key]) for key in ("image", "modality")} for item in others]
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / UNLABELLED, lambda draft: draft.write_text(text, "utf-8"))
    return {
        "unlabelled": str(folder / UNLABELLED),
        "soft_weights": str(Path(model) / WEIGHTS),
        "soft_head": False,
        "store_dir": str(folder / "store"),
    }


def predict(
    model: str,
    *files: str,
    out: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **overrides: Any,
) -> list[Path]:
    """Apply a trained network to volumes; segmentations are on the grids of their images.

    Args:
        model: folder of a training or of a published bundle, or owner/name of a repository of
            Hugging Face.
        files: volumes (NIfTI, NRRD, MetaImage, folders of a DICOM series), or folders of them.
        out: folder to write; default: predictions in ``model``.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the inference config.

    Returns:
        The files that this call wrote.

    Raises:
        ValueError: a file is missing, or would be overwritten.
    """
    home, bundle, overlays = trained(model)
    items = [item for file in files for item in _images(Path(str(file)))]
    images = [str(item["image"]) for item in items]
    if not images:
        raise ValueError(f"files must be given, got none; like {PROGRAM} predict {model} a.nii.gz")
    stems = [volume_stem(image) for image in images]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(
            f"files must have different names, got {twice} twice; one call for "
            "each, with an --out of its own"
        )
    folder = Path(out) if out else results(model, home, "predictions")
    due = {
        image: PREDICTED[kind_of(bundle)].format(stem)
        for image, stem in zip(images, stems, strict=True)
    }
    if there := sorted({name for name in due.values() if (folder / name).exists()}):
        raise ValueError(
            f"out must be a folder without these predictions, got {folder} with {there[0]} and "
            f"{len(there) - 1} more; name another with --out, or move them away"
        )
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*")}
    used = infer(home, bundle, overlays, items, folder, overrides, quiet, verbose)
    written = sorted(
        path
        for path in folder.iterdir()
        if not path.match(INPUTS.format("*")) and before.get(path) != path.stat().st_mtime_ns
    )
    if kind_of(bundle) == "segmentation":
        names = class_names(home, bundle, overlays, used)
        found = {image: folder / name for image, name in due.items()}
        write_predictions(folder / PAGE, _earlier(folder, home, due) | found, names)
        own = {*found.values()}  # beside what another process writes
        written = [*(path for path in written if path in own), folder / PAGE]
    if not quiet:
        print(f"\nwrote {len(written)} files to {folder}; look at {written[-1]}")
    return written


def class_names(
    home: Path, bundle: Path, overlays: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """Names of a segmentation network's classes by number; see ``infer`` for the arguments."""
    config = home / PLAN if overlays else bundle / "configs" / "inference.json"
    names: list[str] = (read_plan(config) | dict(settings))["label_names"]  # JSON is YAML
    return names


def _earlier(folder: Path, home: Path, due: Mapping[str, str]) -> dict[str, Path]:
    """Segmentations that earlier calls of a network wrote into a folder, by image, for the page."""
    images: dict[Path, str] = {}  # of two calls for one file, it was moved away after the first
    for listed in sorted(folder.glob(INPUTS.format("*")), key=lambda path: path.stat().st_mtime):
        for row in read_json(listed, "list of inputs"):
            path = folder / PREDICTED["segmentation"].format(volume_stem(row["image"]))
            if row.get("network") == str(home.absolute()) and Path(row["image"]).exists():
                images[path] = row["image"]
    others = {path: image for path, image in images.items() if path.name not in {*due.values()}}
    return {image: path for path, image in others.items() if path.is_file()}


def infer(
    home: Path,
    bundle: Path,
    overlays: list[str],
    items: Sequence[Mapping[str, Any]],
    folder: Path,
    overrides: Mapping[str, Any],
    quiet: bool,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run the inference config of a trained network on some images, as it was trained.

    What is written is in ``folder`` itself, wherever the images are.

    Args:
        home: folder of the network; with ``bundle`` and ``overlays`` from ``trained``.
        bundle: its bundle.
        overlays: of the config.
        items: images, and their modality where it is known.
        folder: to write; several processes may.
        overrides: keys of the config.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.

    Returns:
        The overrides of the config.
    """
    network = str(home.absolute())
    rows = [
        {"image": i["image"], "modality": i.get("modality", "auto"), "network": network}
        for i in items
    ]
    text = json.dumps(rows, indent=1)
    listed = folder / INPUTS.format(hashlib.sha256(text.encode()).hexdigest()[:12])
    write_atomic(listed, lambda draft: draft.write_text(text))
    settings = {"bundle_root": str(home), "output_dir": str(folder), "datalist": str(listed)}
    # A file, which no image is below: so there are no subfolders.
    settings["dataset_dir"] = str(listed)
    settings |= as_trained(home, bundle, overlays, "inference.json") | dict(overrides)
    launch(bundle, ["inference.json", *overlays], settings, quiet, verbose)
    return settings


def evaluate(
    model: str,
    data: str,
    labels: str | None = None,
    out: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **overrides: Any,
) -> Path:
    """Score a trained network on labelled volumes, with a page of figures.

    With a split.json in ``data`` the cases of its list "test"; else the cases that the training
    kept for validation if ``data`` is what it was trained on; else all, none of which it may have
    had.

    Args:
        model: as for ``predict``.
        data: as for ``plan``.
        labels: as for ``plan``.
        out: folder to write; default: evaluation-<name of data> in ``model``.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the bundle.

    Returns:
        ``out``: metrics.json (a pre-training: retrieval.json) and report.html are in it.

    Raises:
        ValueError: there are no labels, ``out`` holds an evaluation, or ``data`` holds the cases
            of the training and others.
    """
    home, bundle, overlays = trained(model)
    dataset = read_dataset(data, labels)
    scored = kind_of(bundle) != "pretraining"
    if scored:
        dataset.check_labels()
        dataset = dataset._replace(items=dataset.labelled())
    if not dataset.items:
        raise ValueError(f"data must have labels, got none in {data}; name them with --labels")
    folder = Path(out) if out else results(model, home, f"evaluation-{_name(data)}")
    if (folder / DATALIST).exists():
        raise ValueError(f"out must be a new folder, got {folder}; name another with --out")
    images = {real_path(item["image"]) for item in dataset.items}
    trained_on = {real_path(image) for image in images_of(home)}
    known = bool(images & trained_on)
    if known and images != trained_on and not dataset.split:
        raise ValueError(
            f"data must be the cases of the training or others, got {len(images & trained_on)} of "
            f"its {len(trained_on)} and {len(images - trained_on)} others in {data}; name "
            f"{home / DATALIST}, or a list of the others"
        )
    if scored and dataset.names and kind_of(bundle) == "segmentation":
        check_order(class_names(home, bundle, overlays, overrides), dataset.names, data)
    settings: dict[str, Any] = {"bundle_root": str(home), "output_dir": str(folder)}
    settings |= as_trained(home, bundle, overlays, "train.json")
    settings |= write_items(dataset, folder, ["label"] if scored else [], home)
    if not known:  # captions are those of other volumes
        settings.pop("captions", None)
        settings |= {"captions": str(dataset.captions)} if dataset.captions and not scored else {}
        settings |= {} if dataset.split else {"val_fraction": 0}
    launch(bundle, ["train.json", *overlays, "evaluate.json"], settings | overrides, quiet, verbose)
    if not quiet:
        print(f"\nwrote {', '.join(sorted(p.name for p in folder.iterdir()))} to {folder}")
        if (page := folder / REPORT).is_file():
            print(f"look at {page}")
        if known and not dataset.split:
            print("these are cases of the training: validation cases if it kept any, else all")
    return folder


def _close(folder: Path, *following: str) -> None:
    """Print where the results of a training are, and the next commands."""
    print(f"\n{folder}: {WEIGHTS} is the network, eval/history.jsonl has a line an epoch")
    for command in following:
        print(f"next: {PROGRAM} {command}")


def _name(data: str) -> str:
    """Name of a dataset's folder or list."""
    return Path(data).resolve().name.partition(".")[0] or "data"


def _images(path: Path) -> Sequence[dict[str, Any]]:
    """Items of a file or folder."""
    if path.is_file() and path.name.endswith(VOLUME_ENDINGS):
        return [{"image": str(path.absolute())}]
    if not path.exists():
        raise ValueError(f"files must exist, got {path}; correct the path")
    return datalist(path) if path.is_file() else read_dataset(path).items
