"""Checks of segmentation labels: grid and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import MapTransform

from med3dinsight_ext.data.volumes import check_each, read_volume
from med3dinsight_ext.io.claims import ClaimError, open_volume

TOLERANCE = 0.5  # voxels between the same corner of image and label
Grid = tuple[tuple[int, ...], np.ndarray]  # shape and affine


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


def read_label(item: dict[str, Any], names: Sequence[str]) -> set[int]:
    """Read the label values of one item and check its image and label.

    Args:
        item: ``image`` and ``label``, NIfTI files.
        names: of the classes; the label value is the index.

    Raises:
        ValueError: the image is bad, or the label is missing, unreadable, of another shape or
            place, or holds a value without a name.
    """
    path = item.get("label")
    place = f"{path} of {item['image']}" if path else item["image"]
    image: Any = nib.load(item["image"]) if Path(item["image"]).is_file() else None
    read_volume(item["image"])
    if not isinstance(path, str) or not Path(path).is_file():
        raise _fault("be a file", repr(path), place, "add it, or leave this image out")
    try:
        label = open_volume(path)
        values = np.unique(np.asanyarray(label.dataobj))
    except ClaimError:
        raise
    except Exception as error:  # nibabel, gzip, zlib and numpy each have their own
        cause = f"{type(error).__name__}: {error}"
        raise _fault("be readable", cause, place, "repair it") from error
    shape = label.shape[:3] if label.shape[3:] == (1,) else label.shape
    grid, voxel = (image.shape[:3], image.affine), min(image.header.get_zooms()[:3])
    check_label(grid, (shape, label.affine), voxel, values, names, place)
    return {int(value) for value in values}


class CheckLabeld(MapTransform):
    """``check_label`` as a transform, for labels that ``check_labels`` has not read.

    MONAI Label replaces the datasets' items by its own.

    Args:
        keys: labels (1, x, y, z), as loaded.
        image: key of the image (1, x, y, z), as loaded.
        names: of the classes; the label value is the index.
    """

    def __init__(self, keys: str | list[str], image: str, names: Sequence[str]) -> None:
        super().__init__(keys)
        self.image = image
        self.names = list(names)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = data[self.image]
        for label in (data[key] for key in self.keys):
            place = f"{label.meta['filename_or_obj']} of {image.meta['filename_or_obj']}"
            ours, theirs = ((tuple(x.shape[1:]), x.affine.numpy()) for x in (image, label))
            values = torch.unique(label.as_tensor()).tolist()
            check_label(ours, theirs, float(image.pixdim.min()), values, self.names, place)
        return data


def check_labels(
    parts: Sequence[list[dict]], names: Sequence[str], skip_bad: bool = False
) -> list[list[dict]]:
    """Read every image and label once, before a long job starts.

    Args:
        parts: items for training (may be none) and for validation.
        names: of the classes; the label value is the index, 0 the background.
        skip_bad: leave bad cases out and log them, instead of raising.

    Returns:
        The same parts with the good items.

    Raises:
        ValueError: with every bad case and what is wrong with it, or if a class has no voxel in
            training.
    """
    if len(names) < 2:
        raise ValueError(f"label_names must name the background and a class, got {list(names)}")
    items = [item for part in parts for item in part]
    values = check_each(lambda item: read_label(item, names), items, "images and labels", skip_bad)
    kept = [[item for item in part if id(item) in values] for part in parts]
    if kept[0]:
        seen = set[int]().union(*(values[id(item)] for item in kept[0]))
        if missing := [name for i, name in enumerate(names) if i and i not in seen]:
            what = "only background" if seen == {0} else f"none for {', '.join(missing)}"
            raise ValueError(
                f"labels must show each class of label_names in training, got {what} in "
                f"{len(kept[0])} cases; correct label_names or raise max_cases"
            )
    return kept
