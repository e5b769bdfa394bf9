"""Datalists: files and folders of images as lists of items, split by patient."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dinsight_ext.data.modalities import modality_name
from med3dinsight_ext.data.patients import name_series, patients_of
from med3dinsight_ext.io.claims import npz_array
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.reading import parse_json, read_rows, readable
from med3dinsight_ext.io.remote import check_servers, is_remote, local_path
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS, find_volumes, real_path

logger = logging.getLogger(__name__)
LABEL_ENDINGS = ("_gtv", "_seg", "_label", "_labels", "_mask")
VAL_FRACTION, FEW = 0.2, 10  # held out by default, of at least so many cases


def datalist(
    source: str | Path,
    root: str | Path | None = None,
    split: str | Path | None = None,
    subset: str | None = None,
    modality: str = "auto",
) -> list[dict]:
    """List the images of a dataset with modality, label and other fields.

    Args:
        source: a Decathlon ``dataset.json``; a JSON list, JSONL, CSV or Parquet of items with
            ``image``; a folder, searched for NIfTI, .nrrd, .mha and .mhd files and folders of a
            DICOM series that are not labels (in a folder ``labels*``, or named ``*_gtv``,
            ``*_seg``, ``*_label`` or ``*_mask``); a MedMNIST-style .npz.
        root: folder of relative paths; by default the source's folder.
        split: JSON file ``{"development": [ids], "test": [ids]}``. An id is an item's ``patient``,
            its file name without extension, or a folder on its path below ``root``; it becomes the
            ``patient`` of an item that has none.
        subset: a list of ``split``; without a split, a section of a Decathlon file ("training" by
            default) or of an .npz ("train", "val" or "test"; all three by default).
        modality: "CT", "MR" or "PET" for all. With "auto" an item's own field counts, and "auto"
            stays where it has none: see ``volumes.guess_modality``.

    Returns:
        Items with an absolute ``image`` (an address such as s3://… stays as it is), a ``modality``,
        and other fields as given. An image in an .npz is named ``file.npz::train_images::12``. A
        DICOM series without a ``patient`` has its PatientID.
    """
    source = local_path(source, "source", "name a local list of its volumes' addresses")
    root = Path(root or (source if source.is_dir() else source.parent))
    sections = _sections(source)
    section = next(iter(sections)) if split or not subset else subset
    if section not in sections:
        raise ValueError(
            f"subset must be one of {list(sections)} in {source}, got {subset!r}; "
            "correct it, or give the split file that defines it"
        )
    given = modality_name(modality)
    with readable("items", source, "correct the list"):
        items = [_item(row, source, root, given) for row in sections[section]]
        paths = [str(item["image"]) for item in items]
        remote = [path for path in paths if is_remote(path)]
        count = Counter(path if is_remote(path) else real_path(path) for path in paths)
    check_servers(remote)
    gone = [path for path in count if not (is_remote(path) or _is_there(path.split("::")[0]))]
    for rule, bad in (
        ("exist", gone),
        ("be listed once", [path for path, times in count.items() if times > 1]),
    ):
        if bad:
            raise ValueError(
                f"images must {rule}, got {len(bad)} of {len(count)} that do not in {source}: "
                f"{', '.join(bad[:3])}; correct the list or root={str(root)!r}"
            )
    if not items:
        raise ValueError(f"source must list images, got none in {source}; name another source")
    name_series(items)
    if not split:
        return items
    with readable("split", split, "correct it"):
        return split_items(items, root, Path(split), subset)


def subset_names(source: str | Path) -> list[str]:
    """Names that ``subset`` may have without a split file: the sections of a source.

    Empty for a source without sections: a folder, a JSON list, a JSONL or CSV file.
    """
    return [name for name in _sections(Path(source)) if name != "all"]


def split_lists(split: str | Path) -> dict[str, list[str]]:
    """The lists of ids of a split file by their names."""
    return {name: x for name, x in dict(_read_json(Path(split))).items() if isinstance(x, list)}


def item_ids(item: dict, root: Path) -> set[str]:
    """What a split file may call an item: its patient, file name or a folder on its path."""
    path = Path(os.path.relpath(item["image"], os.path.abspath(root)))
    return {str(item.get("patient")), volume_stem(path), *path.parts[:-1]}


def _sections(source: Path) -> dict[str, list]:
    """Rows of a source as written, in named sections; the first one is the default."""
    if source.is_dir():
        paths = [path.relative_to(source) for path in find_volumes(source)]
        return {"all": [str(path) for path in paths if _is_image(path)]}
    if not source.is_file():
        raise ValueError(f"source must exist, got {source}; name a folder or a file")
    if source.suffix in (".jsonl", ".csv", ".parquet"):
        return {"all": [row for _, row in read_rows(source)]}
    if source.suffix == ".json":
        content = _read_json(source)
        if isinstance(content, list):
            return {"all": content}
        if "training" not in content:
            raise ValueError(f"source must have a list 'training', got {list(content)} in {source}")
        with readable("source", source, "write it like a Decathlon dataset.json"):
            names = [name for name in ("training", "validation", "test") if name in content]
            kinds = list(dict(content.get("modality") or {}).values())  # one name a channel
            known = {"modality": kinds[0]} if kinds else {}
            return {name: [known | _as_dict(row) for row in content[name]] for name in names}
    if source.suffix == ".npz":
        with readable("source", source):
            with np.load(source) as arrays:
                names = [name for name in arrays.files if name.endswith("_labels")]
            labels = {name[:-7]: npz_array(source, name) for name in names}
        file = source.resolve()
        rows = {
            name: [
                {"image": f"{file}::{name}_images::{i}", "label": np.squeeze(row).tolist()}
                for i, row in enumerate(np.atleast_1d(array))
            ]
            for name, array in labels.items()
        }
        return {"all": sum(rows.values(), [])} | rows
    raise ValueError(
        f"source must be a folder, .json, .jsonl, .csv, .parquet or .npz, got {source}"
    )


def _read_json(path: Path) -> dict | list:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        cause = error or type(error).__name__
        raise ValueError(f"{path} must be JSON, got {cause}; correct it") from error


def _is_image(path: Path) -> bool:
    folders, stem = path.parts[:-1], volume_stem(path)
    is_label = stem.endswith(LABEL_ENDINGS) or any(f.startswith("labels") for f in folders)
    return not is_label


def _is_there(path: str) -> bool:
    """Whether it is a file, or a folder of a series; no pipe or device."""
    return os.path.isfile(path) or os.path.isdir(path)


def _as_dict(row: dict | str) -> dict:
    return {"image": row} if isinstance(row, str) else row


def _item(row: dict | str, source: Path, root: Path, modality: str) -> dict:
    """One row with absolute paths and a modality."""
    item = dict(_as_dict(row))
    if not isinstance(item.get("image"), str) or not item["image"]:
        raise ValueError(
            f"image must be a path in every item of {source}, got {told(item.get('image'))} beside "
            f"{', '.join(map(told, list(item)[:5]))}; name it in a field or column 'image'"
        )
    for key in item.keys() & {"image", "label"}:
        if is_remote(item[key]):
            continue
        if key == "image" or str(item[key]).endswith(VOLUME_ENDINGS):
            item[key] = os.path.abspath(os.path.join(root, item[key]))
    item["modality"] = modality_name(item.get("modality")) if modality == "auto" else modality
    return item


def split_items(
    items: list[dict], root: Path, split: Path, subset: str | None, whole: bool = True
) -> list[dict]:
    """The items of one list of a split file.

    Args:
        items: to choose from.
        root: folder of relative paths.
        split: file.
        subset: name of the list.
        whole: whether an id without an item is an error.
    """
    lists = split_lists(split)
    if subset not in lists:
        raise ValueError(f"subset must be one of {list(lists)} in {split}, got {subset!r}")
    count = Counter(id_ for ids in lists.values() for id_ in ids)
    if twice := [id_ for id_, times in count.items() if times > 1]:
        raise ValueError(f"split must name each id once, got {twice} again in {split}")
    chosen, found = [], set()
    for item in items:
        ids = count.keys() & item_ids(item, root)
        found |= ids
        if len(homes := {name for name, members in lists.items() if ids & set(members)}) > 1:
            path = os.path.relpath(item["image"], os.path.abspath(root))
            raise ValueError(f"split must keep an image in one list, got {path} in {sorted(homes)}")
        if subset in homes:
            chosen.append({"patient": min(ids), **item})
    if whole and (lost := sorted(count.keys() - found)):
        raise ValueError(
            f"split must name ids of the source, got {lost} of {split} that match no patient, "
            "file name or folder; correct the split"
        )
    return chosen


def class_items(items: list[dict], class_names: Sequence[str]) -> list[dict]:
    """The items with ``label`` as the index of their class.

    Args:
        items: from ``datalist``. A label may be a name, an index, an index as text, or a list of
            one of these; a text that is both is the name, and where all names are numbers, a number
            is the name. Without a label, the one class that a folder above the image is named
            after.
        class_names: in the order of the network's outputs.

    Examples:
        >>> class_items([{"image": "a.nii", "label": "tumor"}], ["healthy", "tumor"])
        [{'image': 'a.nii', 'label': 1}]
    """
    names, found, bad = list(class_names), [], []
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"class_names must be two or more different ones, got {names}; rename")
    numbers: dict[int | str, int] = {name: i for i, name in enumerate(names)}
    if all(str(name).isdecimal() for name in names):
        numbers |= {int(name): i for i, name in enumerate(names)}
    else:
        numbers = {key: i for i in range(len(names)) for key in (i, str(i))} | numbers
    for item in items:
        label = item.get("label")
        if label is None or label == "":
            label = sorted(set(names) & set(Path(item["image"]).parts[:-1])) or "no label"
        one = label[0] if isinstance(label, list) and len(label) == 1 else label
        number = numbers.get(one) if isinstance(one, (int, str)) else None
        found.append(item | {"label": number})
        bad += [] if number is not None else [f"{told(label)} of {item['image']}"]
    if bad:
        raise ValueError(
            f"label must be one of class_names {names} or its index, got {len(bad)} of "
            f"{len(items)} that are not: {', '.join(bad[:3])}; correct these labels or "
            "class_names, or put each image into a folder named after its class"
        )
    return found


def with_all_classes(items: list[dict], class_names: Sequence[str]) -> list[dict]:
    """The items, once each class has one of them: what a training needs.

    Args:
        items: from ``class_items``.
        class_names: in the order of the network's outputs.
    """
    seen = {item["label"] for item in items}
    if lost := [name for i, name in enumerate(class_names) if i not in seen]:
        raise ValueError(
            f"class_names must each have a case in training, got none for {lost}; "
            "add cases or leave these classes out"
        )
    return items


def hold_out(items: list[dict], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split items into training and validation; a patient's images stay together.

    Args:
        items: those with the same ``patient``, or the same content where it is known, are one
            patient's; without it each is its own. See ``patients_of``.
        share: of the patients to hold out, in [0, 1); rounded, at least one unless it is 0.
        seed: the same seed gives the same parts.

    Examples:
        >>> train, val = hold_out([{"image": f"{i}.nii"} for i in range(5)], share=0.2)
        >>> len(train), len(val)
        (4, 1)

    Where labels are numbers, each class keeps its share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {share}; 0 holds nothing out")
    patients = patients_of(items)
    names = sorted(set(patients))
    if len(names) < 2 and len(items) > 1 and share:
        logger.warning(
            f"nothing is held out: all {len(items)} items are of one patient, {names[0]}; write "
            "the patient of each into a list"
        )
    if len(names) < 2 or share == 0:
        return list(items), []
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held = _drawn(dict(zip(patients, items, strict=True)), names, count, seed)
    train = [item for item, name in zip(items, patients, strict=True) if name not in held]
    return train, [item for item, name in zip(items, patients, strict=True) if name in held]


def _drawn(patients: dict[str, dict], names: list[str], count: int, seed: int) -> set[str]:
    """Patients to hold out; classes keep their shares, and one with a single patient stays."""
    rows = [{"patient": name, "label": patients[name].get("label")} for name in names]
    classes = Counter[Any](row["label"] for row in rows if isinstance(row["label"], int))
    rows = [row for row in rows if classes.get(row["label"]) != 1]
    count = min(count, len(rows) - 1)
    if count < 1:
        logger.warning("nothing is held out: each class has one patient")
        return set()
    return {row["patient"] for row in take(rows, count, seed)}


def take(items: list[dict], count: int | None, seed: int = 0) -> list[dict]:
    """The first items in a seeded order: a smaller ``count`` gives a subset of a larger one.

    Classes keep their shares, and each has one item before any has two.

    Args:
        items: to choose from; kept in their order. Labels that are numbers are classes.
        count: how many, at least 1; None for all.
        seed: of the order.
    """
    if count is None or count >= len(items):
        return items
    if count < 1:
        raise ValueError(f"max_cases must be at least 1, got {count}; null takes all")
    random = [int(i) for i in np.random.RandomState(seed).permutation(len(items))]
    classes: dict[Any, list[int]] = {}
    for i in random:
        label = items[i].get("label")
        classes.setdefault(label if isinstance(label, int) else None, []).append(i)
    turn = {i: n / len(same) for same in classes.values() for n, i in enumerate(same)}
    chosen = sorted(random, key=turn.__getitem__)[:count]
    return [items[i] for i in sorted(chosen)]


def partition(
    items: list[dict], val_fraction: float | None, max_cases: int | None, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """Labelled cases for training and for validation, at most ``max_cases`` in all.

    What is held out of all items is never trained on, whatever ``max_cases`` is.

    Args:
        items: with labels.
        val_fraction: share for validation, in [0, 1). With None it is ``VAL_FRACTION``, or 0 if
            fewer than ``FEW`` cases are used.
        max_cases: cases to use, at least 1; None for all.
        seed: of the draws.

    >>> items = [{"image": f"{i}.nii"} for i in range(40)]
    >>> [[len(part) for part in partition(items, None, n)] for n in (None, 20, 5)]
    [[32, 8], [16, 4], [5, 0]]
    """
    share = VAL_FRACTION if val_fraction is None else val_fraction
    train, val = hold_out(
        items, share if val_fraction is not None or len(items) >= FEW else 0, seed
    )
    if max_cases is None or max_cases >= len(items):
        return train, val
    few = val_fraction is None and max_cases < FEW
    held = 0 if few else min(round(share * max_cases) or 1, max_cases - 1, len(val))
    return take(train, max_cases - held, seed), take(val, held, seed) if held else []


def class_weights(items: list[dict], classes: int) -> Tensor:
    """Weights (classes,) that give classes equal shares in the loss; their mean over cases is 1.

    Args:
        items: with ``label``, a class index.
        classes: number of classes.
    """
    count = np.bincount([item["label"] for item in items], minlength=classes)
    return torch.tensor(len(items) / (classes * count.clip(1)), dtype=torch.float32)
