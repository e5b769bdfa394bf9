"""Segmentation labels that fit their images: all checked before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from med3dinsight_ext.data.volumes import read_volume

log = logging.getLogger(__name__)
TOLERANCE = 0.5  # voxels that a corner of the label may lie beside the image's


def read_label(item: dict[str, Any], names: Sequence[str]) -> set[int]:
    """Label values of one item, once its image and label are known to be sound.

    Args:
        item: ``image`` and ``label``, NIfTI files.
        names: of the classes; the label value is the index.

    Raises:
        ValueError: the image is bad, or the label is missing, unreadable, of another shape or
            place, or holds a value without a name.
    """
    path = item.get("label")

    def fault(rule: str, value: object, advice: str) -> ValueError:
        place = f"{path} of {item['image']}" if path else item["image"]
        return ValueError(f"label must {rule}, got {value} in {place}; {advice}")

    image: Any = nib.load(item["image"]) if Path(item["image"]).is_file() else None
    read_volume(item["image"])
    if not isinstance(path, str) or not Path(path).is_file():
        raise fault("be a file", repr(path), "add it, or leave this image out")
    try:
        label: Any = nib.load(path)
        values = np.unique(np.asanyarray(label.dataobj))
    except Exception as error:  # nibabel, gzip, zlib and numpy each have their own
        raise fault("be readable", f"{type(error).__name__}: {error}", "repair it") from error
    shape = label.shape[:3] if label.shape[3:] == (1,) else label.shape
    if shape != image.shape[:3]:
        raise fault(
            f"have its image's shape {image.shape[:3]}", shape, "draw it on this image's grid"
        )
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    ours, theirs = (nib.affines.apply_affine(x.affine, corners) for x in (image, label))
    beside = np.linalg.norm(ours - theirs, axis=1).max() / min(image.header.get_zooms()[:3])
    if not beside <= TOLERANCE:
        raise fault(
            "lie where its image lies",
            f"an affine that puts it up to {beside:.1f} voxels beside it",
            "resample it, or copy the image's affine if only the header is wrong",
        )
    known = range(len(names))
    if unknown := [float(value) for value in values if value not in known]:
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        raise fault(
            f"hold 0 to {len(names) - 1} ({', '.join(names)})",
            f"the value {shown}" + (" …" if len(unknown) > 5 else ""),
            "name every value in label_names, or map the file's values",
        )
    return {int(value) for value in values}


def check_parts(
    parts: Sequence[list[dict]],
    names: Sequence[str],
    skip_bad: bool = False,
    workers: int = 4,
) -> list[list[dict]]:
    """Read every image and label once, before a long job stumbles over one.

    Args:
        parts: items for training (may be none) and for validation.
        names: of the classes; the label value is the index, 0 the background.
        skip_bad: leave bad cases out and log them, instead of raising.
        workers: threads that read.

    Returns:
        The same parts with the good items.

    Raises:
        ValueError: with every bad case and what is wrong with it, or if a class has no voxel in
            training.
    """
    if len(names) < 2:
        raise ValueError(f"label_names must name the background and a class, got {list(names)}")
    items = [item for part in parts for item in part]

    def look(item: dict) -> set[int] | str:
        try:
            return read_label(item, names)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        found = list(tqdm(pool.map(look, items), "Checking labels", len(items), disable=None))
    bad = [text for text in found if isinstance(text, str)]
    if bad and (not skip_bad or len(bad) == len(items)):
        listing = "\n  ".join(bad)
        raise ValueError(
            f"images and labels must be sound, got {len(bad)} bad of {len(items)} "
            f"(skip_bad leaves them out):\n  {listing}"
        )
    for text in bad:
        log.warning("left out: %s", text)
    values = {id(item): value for item, value in zip(items, found, strict=True)}
    kept = [[item for item in part if isinstance(values[id(item)], set)] for part in parts]
    if kept[0]:
        seen = set().union(*(values[id(item)] for item in kept[0]))
        if missing := [name for i, name in enumerate(names) if i and i not in seen]:
            what = "only background" if seen == {0} else f"none for {', '.join(missing)}"
            raise ValueError(
                f"labels must show each class of label_names in training, got {what} in "
                f"{len(kept[0])} cases; correct label_names or raise max_cases"
            )
    return kept
