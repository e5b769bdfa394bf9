"""Checks of segmentation labels: grid and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation

from med3dinsight_ext.data.volumes import check_each, load_volume, read_volume
from med3dinsight_ext.io.images import open_volume
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.remote import is_remote

TOLERANCE = 0.5  # voxels between the same corner of image and label
Grid = tuple[tuple[int, ...], np.ndarray]  # shape and affine


def check_names(names: Sequence[str]) -> None:
    """Raise an error if class names differ in capitals alone: clicks and segments do not tell them.

    Args:
        names: of the classes.
    """
    plain = [name.strip().lower() for name in names]
    if twice := [name for name in names if plain.count(name.strip().lower()) > 1]:
        raise ValueError(
            f"class names must differ in more than capitals, got {', '.join(map(repr, twice[:4]))};"
            " rename them"
        )


def check_order(names: Sequence[str], told: Sequence[str], source: str | Path) -> None:
    """Raise an error if a class of a network has another number in the data.

    Args:
        names: of the network's classes by number.
        told: names that the data give their label values, by value.
        source: of the data, for the message.
    """
    ours, theirs = ([name.strip().lower() for name in part] for part in (names, told))
    moved = [name for n, name in enumerate(ours) if name in theirs and theirs.index(name) != n]
    if moved:
        raise ValueError(
            f"label values must mean the classes of the training, {list(names)}, got "
            f"{list(told)} in {source}; renumber its labels, or correct its dataset.json"
        )


def check_label(
    image: Grid,
    label: Grid,
    voxel: float,
    values: Iterable[float],
    names: Sequence[str],
    place: str,
) -> None:
    """Raise an error if a label is not on its image's grid or holds a value without a name.

    Args:
        image: grid of the image.
        label: grid of the label.
        voxel: smallest spacing of the image in mm.
        values: that the label holds, each once.
        names: of the classes; the label value is the index.
        place: files, for the message.
    """
    (size, affine), (shape, own) = image, label
    if shape != size:
        raise _fault(f"have its image's shape {size}", shape, place, "draw it on this image's grid")
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(size) - 1)
    apart = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(own, corners)
    beside = np.linalg.norm(apart, axis=1).max() / voxel
    if not beside <= TOLERANCE:
        raise _fault(
            "lie where its image lies",
            f"an affine that puts it up to {beside:.1f} voxels beside it",
            place,
            "resample it, or copy the image's affine if only the header is wrong",
        )
    if unknown := [float(value) for value in values if value not in range(len(names))]:
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        raise _fault(
            f"hold 0 to {len(names) - 1} ({', '.join(names)})",
            f"the value {shown}" + (" …" if len(unknown) > 5 else ""),
            place,
            "name every value in label_names, or map the file's values",
        )


def _fault(rule: str, value: object, place: str, advice: str) -> ValueError:
    return ValueError(f"label must {rule}, got {value} in {place}; {advice}")


def label_values(label: Any) -> list[float]:
    """Values in a label array, each once: those that differ from the voxel before."""
    flat = np.asarray(label).ravel()
    return np.unique(np.append(flat[1:][flat[1:] != flat[:-1]], flat[:1])).tolist()


def read_case(item: dict[str, Any], names: Sequence[str]) -> tuple[MetaTensor, MetaTensor]:
    """Read and check the image and label of one item.

    Args:
        item: ``image`` and ``label``; the label is a file.
        names: of the classes; the label value is the index.

    Returns:
        Image and label, (1, x, y, z) float32 in RAS, as ``read_volume``.

    Raises:
        ValueError: the image is bad, or the label is missing, unreadable, of another shape or
            place, or holds a value without a name.
    """
    path = item.get("label")
    place = f"{path} of {item['image']}" if path else item["image"]
    volume = read_volume(item["image"])
    if not isinstance(path, str) or not (is_remote(path) or Path(path).is_file()):
        raise _fault("be a file", repr(path), place, "add it, or leave this image out")
    image = open_volume(item["image"])
    with readable("label", path):
        stored = open_volume(path)
        own = stored.affine.copy()  # MONAI replaces a broken one in place
        label = load_volume(path, stored)
        values = label_values(label)
    shape = stored.shape[:3] if stored.shape[3:] == (1,) else stored.shape
    grid, voxel = (image.shape[:3], image.affine), min(image.header.get_zooms()[:3])
    check_label(grid, (shape, own), voxel, values, names, place)
    return volume, Orientation("RAS", labels=None)(label)


def read_label(item: dict[str, Any], names: Sequence[str]) -> set[int]:
    """Label values of one item, after the checks of ``read_case``."""
    return {int(value) for value in label_values(read_case(item, names)[1])}


class ReadCased(MapTransform):
    """``read_case`` as a transform of the paths at ``keys``, the image's and the label's.

    Args:
        keys: image and label.
        names: of the classes; the label value is the index.
    """

    def __init__(self, keys: Sequence[str], names: Sequence[str]) -> None:
        super().__init__(keys)
        self.names = list(names)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, **dict(zip(self.keys, read_case(data, self.names), strict=True))}


def check_labels(
    parts: Sequence[list[dict]], names: Sequence[str], skip_bad: bool = False, copy: Any = None
) -> list[list[dict]]:
    """Read every image and label once, before a long job starts.

    Args:
        parts: items for training (may be none) and for validation.
        names: of the classes; the label value is the index, 0 the background.
        skip_bad: leave bad cases out and log them, instead of raising.
        copy: a ``PreparedCopy``, which reads only the cases that it does not hold.

    Returns:
        The same parts with the good items.

    Raises:
        ValueError: with every bad case and what is wrong with it, or if a class has no voxel in
            training, or none has one in validation.
    """
    if len(names) < 2:
        raise ValueError(f"label_names must name the background and a class, got {list(names)}")
    check_names(names)
    items = [item for part in parts for item in part]
    values: dict[int, Any]
    if copy is None:
        what = "images and labels"
        values = check_each(lambda item: read_label(item, names), items, what, skip_bad)
    else:
        values = {key: found["values"] for key, found in copy.check(items, skip_bad).items()}
    kept = [[item for item in part if id(item) in values] for part in parts]
    if kept[0]:
        seen, held = (
            set[int]().union(*(values[id(item)] for part in some for item in part))
            for some in (kept[:1], kept[1:])
        )
        if missing := [name for i, name in enumerate(names) if i and i not in seen]:
            what = "only background" if seen == {0} else f"none for {', '.join(missing)}"
            raise ValueError(
                f"labels must show each class of label_names in training, got {what} in "
                f"{len(kept[0])} cases; correct label_names, raise max_cases, or give another seed "
                "or val_fraction 0 where they are held out"
            )
        if held == {0}:  # Dice is then undefined or 0, and no epoch is the best
            raise ValueError(
                "labels must show a class of label_names in validation, got only background in "
                f"{sum(map(len, kept[1:]))} cases; give another seed, a larger val_fraction, or "
                "val_fraction 0"
            )
    return kept
