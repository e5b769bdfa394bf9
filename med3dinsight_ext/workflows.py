"""Plan, pre-train, fine-tune, predict and evaluate: each one call that runs a bundle."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from med3dinsight_ext.data.layouts import Dataset, read_dataset
from med3dinsight_ext.io.bundles import bundles_dir, kind_of
from med3dinsight_ext.io.errors import advice
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.planning.plan import TASK, make_plan, read_plan, shown, write_plan
from med3dinsight_ext.reports.predictions import write_predictions
from med3dinsight_ext.training.launch import launch

PROGRAM = "python -m med3dinsight_ext"
PLAN, DATALIST, PAGE = "plan.yaml", "datalist.json", "predictions.html"
OUT = Path("runs")


def plan(
    data: str, labels: str | None = None, out: str | None = None, base: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Look at a dataset and write settings for it and this machine as a config overlay.

    Args:
        data: folder of NIfTI files (imagesTr and labelsTr, images alone, labels beside images), or
            a list: Decathlon JSON, JSONL, CSV or npz.
        labels: folder of labels that are named like the images, or a list with image and label.
        out: YAML file to write; default: runs/<name of data>/plan.yaml.
        base: plan to take settings from: another file, or the folder of a training.
        quiet: print nothing.

    Returns:
        The settings.

    Raises:
        ValueError: no usable images, labels of other images, or ``out`` exists.
    """
    dataset = read_dataset(data, labels)
    path = Path(out) if out else OUT / _name(data) / PLAN
    if path.exists():
        raise ValueError(f"out must be a new file, got {path}; edit it, delete it or name another")
    settings = _write_plan(dataset, path, data, base, quiet)
    if not quiet:
        print(f"next: {PROGRAM} pretrain {_word(data)} --plan {path}")
    return settings


def pretrain(
    data: str, out: str | None = None, plan: str | None = None, labels: str | None = None,
    quiet: bool = False, verbose: bool = False, **overrides: Any,
) -> Path:  # fmt: skip
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
    dataset = read_dataset(data, labels)
    if len(dataset.training().items) < 2:
        raise ValueError(f"data must hold at least 2 volumes to pre-train on, got 1 in {data}")
    folder = Path(out) if out else OUT / _name(data) / "pretrain"
    settings = _prepare(folder, dataset, data, plan, quiet, ["patient"])
    if dataset.captions:
        settings["captions"] = str(dataset.captions)
    launch(
        "pretrain", ["train.json", _absolute(folder / PLAN)], settings | overrides, quiet, verbose
    )
    if not quiet:
        _close(folder, f"finetune {_word(data)} --pretrained {folder}")
    return folder


def finetune(
    data: str, labels: str | None = None, pretrained: str | None = None, out: str | None = None,
    plan: str | None = None, quiet: bool = False, verbose: bool = False, **overrides: Any,
) -> Path:  # fmt: skip
    """Fine-tune a network on labelled volumes: segmentation, or classification with a list.

    The same call resumes a training that was interrupted.

    Args:
        data: as for ``plan``.
        labels: as for ``plan``.
        pretrained: folder of a pre-training or a weights file; without it training starts from
            scratch.
        out: folder of the training; default: runs/<name of data>/finetune.
        plan: file of the command plan; default: that of ``pretrained``, or one is made.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the bundle, as in ``--steps 2000``.

    Returns:
        ``out``: models/model.pt in it is the network.
    """
    dataset = read_dataset(data, labels)
    labelled = dataset.labelled()
    if not labelled:
        raise ValueError(
            f"data must have labels, got none for {len(dataset.items)} images in {data}; name "
            "their folder or list with --labels"
        )
    dataset = dataset._replace(items=labelled)
    folder = Path(out) if out else OUT / _name(data) / "finetune"
    more: dict[str, Any] = {}
    if pretrained:
        weights, home = _weights(pretrained)
        more["pretrained"] = str(weights)
        plan = plan or (str(home) if (home / PLAN).is_file() else None)
    settings = _prepare(folder, dataset, data, plan, quiet, ["patient", "label"]) | more
    bundle = "seg-finetune" if dataset.segments() else "cls-finetune"
    launch(bundle, ["train.json", _absolute(folder / PLAN)], settings | overrides, quiet, verbose)
    if not quiet:
        _close(folder, f"predict {folder} FILES", f"evaluate {folder} {_word(data)}")
    return folder


def predict(
    model: str, *files: str, out: str | None = None, quiet: bool = False, verbose: bool = False,
    **overrides: Any,
) -> list[Path]:  # fmt: skip
    """Apply a trained network to volumes; segmentations are on the grids of their images.

    Args:
        model: folder of a training, or of a published bundle.
        files: NIfTI files, or folders of them.
        out: folder to write; default: predictions in ``model``.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the inference config.

    Returns:
        The files that were written.

    Raises:
        ValueError: a file is missing, or would be overwritten.
    """
    home, bundle, overlays = _trained(model)
    images = [str(i["image"]) for file in files for i in _images(Path(str(file)))]
    if not images:
        raise ValueError(f"files must be given, got none; like {PROGRAM} predict {model} a.nii.gz")
    stems = [Path(image).name.removesuffix(".gz").removesuffix(".nii") for image in images]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"files must have different names, got {twice} twice; predict them apart")
    folder = Path(out) if out else home / "predictions"
    if there := [stem for stem in stems if any(folder.glob(f"{stem}_*"))]:
        raise ValueError(
            f"out must be a folder without these predictions, got {folder} with {there[0]} and "
            f"{len(there) - 1} more; name another with --out, or move them away"
        )
    listed = folder / "inputs.json"
    text = json.dumps([{"image": image} for image in images], indent=1)
    write_atomic(listed, lambda draft: draft.write_text(text))
    settings = {"bundle_root": str(home), "output_dir": str(folder), "datalist": str(listed)}
    launch(bundle, ["inference.json", *overlays], settings | overrides, quiet, verbose)
    written = sorted(path for path in folder.iterdir() if path != listed)
    if kind_of(bundle) == "segmentation":
        config = home / PLAN if overlays else bundle / "configs" / "inference.json"
        names = read_plan(config)["label_names"]  # JSON is YAML
        found = {i: folder / f"{stem}_seg.nii.gz" for i, stem in zip(images, stems, strict=True)}
        write_predictions(folder / PAGE, found, names)
        written.append(folder / PAGE)
    if not quiet:
        print(f"\nwrote {len(written)} files to {folder}; look at {written[-1]}")
    return written


def evaluate(
    model: str, data: str, labels: str | None = None, out: str | None = None,
    quiet: bool = False, verbose: bool = False, **overrides: Any,
) -> Path:  # fmt: skip
    """Score a trained network on labelled volumes, with a page of figures.

    With a split.json in ``data`` the cases of its list "test"; else the cases that the training
    kept for validation if ``data`` is what it was trained on; else all.

    Args:
        model: folder of a training, or of a published bundle.
        data: as for ``plan``.
        labels: as for ``plan``.
        out: folder to write; default: evaluation-<name of data> in ``model``.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.
        overrides: keys of the bundle.

    Returns:
        ``out``: metrics.json (a pre-training: retrieval.json) and report.html are in it.

    Raises:
        ValueError: there are no labels, or ``out`` holds an evaluation.
    """
    home, bundle, overlays = _trained(model)
    dataset = read_dataset(data, labels)
    if kind_of(bundle) != "pretraining":
        dataset = dataset._replace(items=dataset.labelled())
    if not dataset.items:
        raise ValueError(f"data must have labels, got none in {data}; name them with --labels")
    folder = Path(out) if out else home / f"evaluation-{_name(data)}"
    if (folder / DATALIST).exists():
        raise ValueError(f"out must be a new folder, got {folder}; name another with --out")
    keys = ["patient", "label"] if dataset.labelled() else ["patient"]
    write_items(dataset, folder / DATALIST, keys)
    settings = _source(dataset, folder) | {"bundle_root": str(home), "output_dir": str(folder)}
    trained_on = _images_of(home / DATALIST)
    if not dataset.split and not trained_on & {str(item["image"]) for item in dataset.items}:
        settings["val_fraction"] = 0
    launch(bundle, ["train.json", *overlays, "evaluate.json"], settings | overrides, quiet, verbose)
    if not quiet:
        print(f"\nwrote {', '.join(sorted(p.name for p in folder.iterdir()))} to {folder}")
        if trained_on and "val_fraction" not in settings and not dataset.split:
            print("these are cases of the training: validation cases if it kept any, else all")
    return folder


def _close(folder: Path, *following: str) -> None:
    """Print where the results of a training are, and the next commands."""
    print(f"\n{folder}: models/model.pt is the network, eval/history.jsonl has a line an epoch")
    for command in following:
        print(f"next: {PROGRAM} {command}")


def _name(data: str) -> str:
    """Name of a dataset's folder or list."""
    return Path(data).resolve().name.partition(".")[0] or "data"


def _word(text: str) -> str:
    return shlex.quote(text)


def _absolute(path: Path) -> str:
    return str(path.absolute())


def write_items(dataset: Dataset, path: Path, keys: Sequence[str]) -> None:
    """Write a dataset as a list for ``--datalist``, with these fields of each item."""
    items = [{key: item[key] for key in ("image", "modality", *keys)} for item in dataset.items]
    text = json.dumps(items, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))


def _images_of(path: Path) -> set[str]:
    """Images of a list that ``write_items`` wrote; none if there is no such list."""
    return (
        {row["image"] for row in json.loads(path.read_text("utf-8"))} if path.is_file() else set()
    )


def _source(dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Overrides that name the data."""
    settings = {"dataset_dir": str(dataset.root), "datalist": str(folder / DATALIST)}
    return settings | ({"split": str(dataset.split)} if dataset.split else {})


def _write_plan(
    dataset: Dataset, path: Path, data: str, base: str | None, quiet: bool
) -> dict[str, Any]:
    """Make, print and write a plan."""
    kept = None
    if base:
        home = Path(base)
        kept = read_plan(home / PLAN if home.is_dir() else home)
        if home.is_dir():  # the network's settings; classes are those of this dataset
            kept = {key: value for key, value in kept.items() if key not in TASK}
    made = make_plan(dataset, kept, str(base))
    title = f"Plan for {data}. Edit it; then: {PROGRAM} finetune {data} --plan FILE"
    write_plan(made, path, title)
    if not quiet:
        print(f"{shown(made)}\n\nwrote {path}: edit it, or give keys like --steps 2000")
    return made.settings


def _prepare(
    folder: Path,
    dataset: Dataset,
    data: str,
    base: str | None,
    quiet: bool,
    keys: Sequence[str],
) -> dict[str, Any]:
    """Write list and plan of a training, unless they are there; overrides that name them."""
    listed = _images_of(folder / DATALIST)
    images = {str(item["image"]) for item in dataset.items}
    if listed and listed != images:
        raise ValueError(
            f"out must be new or a training on the same images, got {folder} with "
            f"{len(listed ^ images)} others; name another with --out"
        )
    if (folder / PLAN).is_file():
        if base and read_plan(folder / PLAN) != read_plan(base) and Path(base).is_file():
            raise ValueError(
                f"out must be a training with this plan, got {folder} with another {PLAN}; name "
                "another with --out"
            )
        if not quiet:
            print(f"goes on with {folder / PLAN}")
    else:
        if not quiet:
            print(
                f"plan as in {base}:" if base else f"no plan is given, so one is made for {data}:"
            )
        _write_plan(dataset, folder / PLAN, data, base, quiet)
    write_items(dataset, folder / DATALIST, keys)
    return {"bundle_root": str(folder), **_source(dataset, folder)}


def _weights(pretrained: str) -> tuple[Path, Path]:
    """Weights file and folder of a pre-training."""
    path = Path(pretrained)
    weights = path / "models" / "model.pt" if path.is_dir() else path
    if not weights.is_file():
        raise ValueError(
            f"pretrained must be a folder of a training or a weights file, got {path}; run "
            f"{PROGRAM} pretrain first"
        )
    return weights, path if path.is_dir() else weights.absolute().parents[1]


def _trained(model: str) -> tuple[Path, Path, list[str]]:
    """Folder of a trained network, its bundle, and overlays of the configs."""
    home = Path(model)
    if home.is_file():
        home = home.absolute().parents[1]
    if not (home / "models" / "model.pt").is_file():
        near = [str(path.parents[1]) for path in OUT.glob("*/*/models/model.pt")]
        hint = advice(model, near, f"train one with {PROGRAM} finetune")
        raise ValueError(f"model must be a folder with models/model.pt, got {model}; {hint}")
    if (home / "configs" / "inference.json").is_file():
        return home, home, []
    if not (home / PLAN).is_file():
        raise ValueError(
            f"model must hold {PLAN}, got {home} without one; run the bundle's inference.json with "
            "the overlays of its training"
        )
    if (home / "models" / "student.pt").is_file():
        name = "pretrain"
    else:
        name = "cls-finetune" if "class_names" in read_plan(home / PLAN) else "seg-finetune"
    return home, bundles_dir() / name, [_absolute(home / PLAN)]


def _images(path: Path) -> Sequence[dict[str, Any]]:
    """Items of a file or folder."""
    if path.is_file() and path.name.endswith((".nii", ".nii.gz")):
        return [{"image": str(path.absolute())}]
    if not path.exists():
        raise ValueError(f"files must exist, got {path}; correct the path")
    return read_dataset(path).items
