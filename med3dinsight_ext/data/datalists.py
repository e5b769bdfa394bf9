"""Datalists: files and folders of images as lists of items, and their classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dinsight_ext.data.modalities import modality_name
from med3dinsight_ext.data.patients import MISSING, name_series
from med3dinsight_ext.data.splits import split_items
from med3dinsight_ext.io.claims import npz_array
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.reading import read_json, read_rows, readable
from med3dinsight_ext.io.remote import check_servers, is_remote, local_path
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS, find_volumes, real_path

NUMBER = re.compile(r"-?\d+(\.\d+)?")
LABEL_ENDINGS = ("_gtv", "_seg", "_label", "_labels", "_mask", "-seg", "-label", "-labels", "-mask",
                 ".seg")  # fmt: skip


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
        DICOM series has the patient and the modality of its header where the list says none.
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
        content = read_json(source, "source", "correct it")
        if isinstance(content, list):
            return {"all": content}
        if not isinstance(content, dict) or "training" not in content:
            shown = told(list(content) if isinstance(content, dict) else content)
            raise ValueError(f"source must have a list 'training', got {shown} in {source}")
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
    if isinstance(label := item.get("label"), str):
        item["label"] = "" if (text := label.strip()).lower() in MISSING else text
    elif label != label:  # NaN
        item["label"] = None
    for key in item.keys() & {"image", "label"}:
        if is_remote(item[key]):
            continue
        if key == "image" or str(item[key]).endswith(VOLUME_ENDINGS):
            item[key] = os.path.abspath(os.path.join(root, item[key]))
    item["modality"] = modality_name(item.get("modality")) if modality == "auto" else modality
    return item


def class_items(
    items: list[dict], class_names: Sequence[object], root: str | Path = os.sep
) -> list[dict]:
    """The items with ``label`` as the index of their class.

    Args:
        items: from ``datalist``. A label may be a name, an index, an index as text, or a list of
            one of these; a text that is both is the name, and where all names are numbers, a number
            is the name. Without a label, the one class that a folder above the image is named
            after.
        class_names: in the order of the network's outputs.
        root: of the dataset; folders below it are looked at.

    Examples:
        >>> class_items([{"image": "a.nii", "label": "tumor"}], ["healthy", "tumor"])
        [{'image': 'a.nii', 'label': 1}]
    """
    names, found, bad = list(map(str, class_names)), [], []
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"class_names must be two or more different ones, got {names}; rename")
    numbers: dict[Any, int] = {name: i for i, name in enumerate(names)}
    kinds: tuple[type, ...] = (int, str)
    if all(map(NUMBER.fullmatch, names)):
        kinds = (int, float, str)
        numbers |= {float(name): i for i, name in enumerate(names)}
    else:
        named = {int(name): i for i, name in enumerate(names) if NUMBER.fullmatch(name)}
        indices = {key: i for i in range(len(names)) for key in (i, str(i))}
        numbers = indices | named | numbers
    for item in items:
        label = item.get("label")
        if label is None or label == "":
            image = item["image"]
            folders = Path(image if is_remote(image) else os.path.relpath(image, root)).parts[:-1]
            label = sorted(set(names) & set(folders)) or "no label"
        one: Any = label[0] if isinstance(label, list) and len(label) == 1 else label
        if isinstance(one, bool) and str(one) in names:
            one = str(one)
        number = numbers.get(one) if isinstance(one, kinds) else None
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


def class_weights(items: list[dict], classes: int) -> Tensor:
    """Weights (classes,) that give classes equal shares in the loss; their mean over cases is 1.

    Args:
        items: with ``label``, a class index.
        classes: number of classes.
    """
    count = np.bincount([item["label"] for item in items], minlength=classes)
    return torch.tensor(len(items) / (classes * count.clip(1)), dtype=torch.float32)
