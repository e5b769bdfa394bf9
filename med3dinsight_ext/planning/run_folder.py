"""Folder of a run: its plan, the list of its images, and the network that it trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from med3dinsight_ext.data.labels import check_order
from med3dinsight_ext.data.layouts import Dataset
from med3dinsight_ext.data.splits import item_ids, split_lists
from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.io.configs import check_plain, with_shared
from med3dinsight_ext.io.errors import advice
from med3dinsight_ext.io.files import sha256, write_atomic
from med3dinsight_ext.io.hub import hub_id, local_folder
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.io.volume_files import real_path
from med3dinsight_ext.planning.nnunet import AXES, read_nnunet
from med3dinsight_ext.planning.plan import (
    TASK,
    check_settings,
    make_plan,
    read_plan,
    shown,
    write_plan,
)
from med3dinsight_ext.training.record import FILE, config_trained_with

PROGRAM = "python -m med3dinsight_ext"
PLAN, DATALIST, WEIGHTS = "plan.yaml", "datalist.json", "models/model.pt"
PUBLISHED = "configs/inference.json"  # of a published bundle
NETWORK = ("spacing", "patch_size", "ct_range", "backbone", AXES)  # that weights depend on
AS_TRAINED = (
    *NETWORK, "deep_supervision", "mode", "head", "feature_layer", "label_names", "class_names",
    "modality", "mirror_axes", "mirror_pairs", "teacher", "captions", "captioner", "per_plane",
    "planes", "seed", "val_fraction", "max_cases", "amp", "amp_dtype",
)  # fmt: skip
OUT = Path("runs")


def settle(
    dataset: Dataset, path: Path, base: str | None, quiet: bool, nnunet: str | None = None
) -> dict[str, Any]:
    """Make, print and write a plan; returns its settings.

    Args:
        dataset: from ``read_dataset``.
        path: file to write.
        base: plan to take settings from, or the folder of a run, whose classes do not count.
        quiet: print nothing.
        nnunet: plan of nnU-Net to take network, spacing and patch from; not with ``base``.
    """
    kept = None
    if nnunet:
        kept = read_nnunet(nnunet, [str(item["image"]) for item in dataset.items])
    if base:
        kept = _kept(Path(base))
        check_settings(kept, base)
        check_order(kept.get("label_names", ()), dataset.names or (), dataset.root)
    made = make_plan(dataset, kept, str(base or nnunet and Path(nnunet).name))
    write_plan(made, path, f"Plan for {dataset.root}. Edit it, and pass it on with --plan {path}")
    if not quiet:
        print(f"{shown(made)}\n\nwrote {path}: edit it, or give keys like --steps 2000")
    return made.settings


def _kept(base: Path) -> dict[str, Any]:
    """Settings of a plan, or those of a trained network that its weights depend on."""
    if not base.is_dir():
        return read_plan(base)
    if (base / PLAN).is_file():
        return {k: v for k, v in read_plan(base / PLAN).items() if k not in TASK}
    config = config_trained_with(base) or read_json(base / PUBLISHED, "config")
    return {key: config[key] for key in NETWORK if key in config}


def prepare(
    folder: Path, dataset: Dataset, base: str | None, keys: Sequence[str], quiet: bool
) -> dict[str, Any]:
    """Write plan and list of a training, unless they are there; returns overrides that name them.

    Raises:
        ValueError: the folder is that of a training on other images, or with another plan.
    """
    listed, images = images_of(folder), {str(item["image"]) for item in dataset.items}
    if listed and listed != images:
        raise ValueError(
            f"out must be new or a training on the same images, got {folder} with "
            f"{len(listed ^ images)} others; name another with --out"
        )
    path = folder / PLAN
    if not path.is_file():
        if not quiet:
            print(f"plan as in {base}:" if base else "no plan is given, so one is made:")
        settle(dataset, path, base, quiet)
    elif base and Path(base).is_file() and not read_plan(base).items() <= read_plan(path).items():
        raise ValueError(
            f"out must be a training with this plan, got {folder} with another {PLAN}; name "
            "another with --out"
        )
    elif not quiet:
        print(f"goes on with {path}")
    return {"bundle_root": str(folder), **write_items(dataset, folder, keys, folder)}


def write_items(dataset: Dataset, folder: Path, keys: Sequence[str], run: Path) -> dict[str, Any]:
    """Write the list of a dataset; returns overrides that name list, folder and split.

    Args:
        dataset: to list.
        folder: gets datalist.json.
        keys: fields of an item besides image, modality and patient.
        run: folder of a training, whose list says the patients of the images that it had: what is
            held out hangs on them.
    """
    check_plain("data", [str(dataset.root)], "give its absolute path, without #")
    fields = ("image", "modality", "patient", *keys)
    items = [{key: item[key] for key in fields} for item in dataset.items]
    known = {real_path(row["image"]): row.get("patient") for row in _listed(run)}
    for item in items if known else ():
        item["patient"] = known.get(real_path(item["image"])) or item["patient"]
    text = json.dumps(items, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / DATALIST, lambda draft: draft.write_text(text, "utf-8"))
    settings = {"dataset_dir": str(dataset.root), "datalist": str(folder / DATALIST)}
    return settings | ({"split": str(_own_split(dataset, folder))} if dataset.split else {})


def _own_split(dataset: Dataset, folder: Path) -> Path:
    """The dataset's split file, or a copy in ``folder`` with the ids of its items alone."""
    assert dataset.split is not None
    ids = set[str]().union(*(item_ids(item, dataset.root) for item in dataset.items))
    lists = split_lists(dataset.split)
    kept = {name: [id_ for id_ in members if id_ in ids] for name, members in lists.items()}
    if kept == lists:
        return dataset.split
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / "split.json", lambda draft: draft.write_text(text, "utf-8"))
    return folder / "split.json"


def images_of(folder: Path) -> set[str]:
    """Images in the list of a folder; none if there is no list."""
    return {str(row["image"]) for row in _listed(folder)}


def _listed(folder: Path) -> list[dict[str, Any]]:
    path = folder / DATALIST
    return read_json(path, "datalist", "name another folder") if path.is_file() else []


def weights_of(pretrained: str) -> tuple[Path, str | None]:
    """Weights file of a pre-training, and its folder if that has a plan.

    Args:
        pretrained: folder of a run or of a published bundle, repository, or weights file.
    """
    path = local_folder(pretrained)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise ValueError(
            f"pretrained must be a folder of a training or a weights file, got {path}; run "
            f"{PROGRAM} pretrain first"
        )
    home = path if path.is_dir() else weights.absolute().parents[1]
    planned = (home / PLAN).is_file() or (home / PUBLISHED).is_file()
    return weights, str(home) if planned else None


def check_keys(overrides: Mapping[str, Any]) -> None:
    """Stop if data or a split is given as a key, which plan and ``evaluate`` would not follow.

    Raises:
        ValueError: ``datalist``, ``dataset_dir``, ``split`` or ``subset`` is among the overrides
            of a training.
    """
    for key in overrides.keys() & {"datalist", "dataset_dir"}:
        raise ValueError(
            f"{key} must be the first argument, got {key} {overrides[key]}; name the list or "
            "folder in its place"
        )
    for key in overrides.keys() & {"split", "subset"}:
        raise ValueError(
            f"{key} must be that of split.json in the folder of the data, got {overrides[key]}; "
            "put the split there as split.json, with lists development and test, so that plan and "
            "evaluate follow it too"
        )


def check_start(folder: Path, weights: str | Path | None) -> None:
    """Stop if the training in a folder did not start from these weights.

    Args:
        folder: of a training; it may be new.
        weights: file that it should start from; None: from scratch.
    """
    record = folder / "models" / FILE
    if not record.is_file():
        return
    began = read_json(record, "record").get("pretrained") or {}
    if began.get("sha256") != (sha256(Path(weights)) if weights else None):
        origin = began.get("file") or "scratch"
        raise ValueError(
            f"out must be new or a training from {weights or 'scratch'}, got {folder}, which began "
            f"from {origin}; name another with --out"
        )


def trained(model: str) -> tuple[Path, Path, list[str]]:
    """Folder of a trained network, its bundle, and overlays of the configs.

    Args:
        model: folder of a run or of a published bundle, its models/model.pt, or a repository.
    """
    home = local_folder(model)
    if home.is_file():
        home = home.absolute().parents[1]
    if not (home / WEIGHTS).is_file():
        near = [str(path.parents[1]) for path in OUT.glob(f"*/*/{WEIGHTS}")]
        hint = advice(model, near, f"train one with {PROGRAM} finetune")
        raise ValueError(f"model must be a folder with {WEIGHTS}, got {model}; {hint}")
    if (home / PUBLISHED).is_file():
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
    return home, bundles_dir() / name, [overlay(home)]


def as_trained(home: Path, bundle: Path, overlays: list[str], config: str) -> dict[str, Any]:
    """Settings of ``AS_TRAINED`` that a training was given beside its plan, as overrides.

    Args:
        home: folder of the network; with ``bundle`` and ``overlays`` from ``trained``.
        bundle: its bundle.
        overlays: of the config.
        config: file in the bundle's configs/, whose keys may be set.
    """
    used = config_trained_with(home)
    if used is None:
        return {}
    planned, known = (
        ConfigParser.load_config_files([*with_shared(bundle / "configs" / name), *overlays])
        for name in ("train.json", config)
    )
    keys = [key for key in AS_TRAINED if key in used and key in known]
    found = {key: used[key] for key in keys if used[key] != planned.get(key)}
    if "teacher" in found and "_disabled_" in known["teacher"]:  # as long as nothing asks for it
        found["teacher"] = {**found["teacher"], "_disabled_": known["teacher"]["_disabled_"]}
    return found


def results(model: str, home: Path, name: str) -> Path:
    """Folder for what a network gives: in its own, or in runs/ if that is a downloaded one."""
    repository = hub_id(model)
    return OUT / repository[0].split("/")[1] / name if repository else home / name


def overlay(folder: Path) -> str:
    """A run's plan, as a config file that lies outside of the bundle."""
    return str((folder / PLAN).absolute())
