"""Cohort: a small record of every volume of a dataset, for the laws that its data must obey."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F

from med3dinsight_ext.data.datalists import datalist, subset_names
from med3dinsight_ext.data.identity import head_height, text_strokes
from med3dinsight_ext.data.labels import check_label
from med3dinsight_ext.data.layouts import decathlon_names, read_dataset
from med3dinsight_ext.data.slicing import window
from med3dinsight_ext.data.splits import item_ids, split_lists
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.images import open_volume, ras_array
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS

GRID = 24  # cells of a fingerprint along each axis
HU_BINS = np.arange(-3072, 4097, 32)  # edges
LARGEST = 4095  # label value; more are no classes


class Labels(NamedTuple):
    """What is kept of a label map.

    voxels: of each class number but 0 that it holds.
    offsets: of these classes, as ``laterality.offsets``: -0.5 far left to 0.5 far right.
    odd: values that are no class number.
    """

    voxels: dict[int, int]
    offsets: dict[int, float]
    odd: list[float]


class Record(NamedTuple):
    """What is kept of an image.

    name: path below the dataset's folder.
    item: from ``datalist``.
    lists: of the split, or sections of the source, that hold it.
    guess: modality by its intensities.
    spacing: along x, y, z in mm.
    digest: of the voxels in RAS.
    low, high: smallest and largest intensity.
    histogram: share of the voxels in each of ``HU_BINS``.
    grid: (24, 24, 24) float16 mean intensities in RAS, from the 0.5th to the 99.5th percentile.
    strokes: from ``text_strokes``.
    head: from ``head_height``.
    labels: of its label map, None without one.
    """

    name: str
    item: dict[str, Any]
    lists: tuple[str, ...]
    guess: str
    spacing: tuple[float, ...]
    digest: str
    low: float
    high: float
    histogram: np.ndarray
    grid: np.ndarray
    strokes: int
    head: float
    labels: Labels | None


class Cohort(NamedTuple):
    """Records of a dataset.

    faults: name to what is wrong with an image or label that cannot be used.
    names: of the classes by number, None where they are not known.
    lost: ids of the split that match no image.
    """

    records: list[Record]
    faults: dict[str, str] = {}
    names: Sequence[str] | None = None
    lost: Sequence[str] = ()

    def groups(self) -> dict[str, list[Record]]:
        """Records by modality; those without one count as what most of them look like."""
        guesses = Counter(r.guess for r in self.records if r.item["modality"] == "auto")
        usual = guesses.most_common(1)[0][0] if guesses else ""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            given = record.item["modality"]
            found.setdefault(usual if given == "auto" else given, []).append(record)
        return found


def read_cohort(
    source: str | Path, split: str | Path | None = None, names: Sequence[str] | None = None
) -> Cohort:
    """Read every volume and label of a dataset, one at a time.

    Args:
        source: as for ``datalist``; in a folder labels are found as by ``read_dataset``.
        split: as for ``datalist``, by default split.json in the folder of the data; without it the
            sections of the source are the lists.
        names: of the classes; by default those of a Decathlon ``dataset.json``.
    """
    source = Path(source)
    root = source if source.is_dir() else source.parent
    records, faults, seen = [], {}, set[str]()
    labelled: dict[str, dict[str, Any]] = {}
    split = split or next(root.glob("split.json"), None)
    if source.is_dir():
        try:
            dataset = read_dataset(source)
        except ValueError as error:
            faults["labels"] = str(error)
        else:
            labelled = {item["image"]: item for item in dataset.items}
            names = names or dataset.names
    items = [(labelled.get(i["image"], i), lists) for i, lists in _listed(source, root, split)]
    names = names or decathlon_names(source, [])[0]
    for item, lists in Bar(items, "Reading volumes", unit="volume"):
        name = os.path.relpath(item["image"], root)
        seen |= item_ids(item, root)
        try:
            records.append(read_record(name, item, lists))
        except ValueError as error:
            faults[name] = str(error)
    ids = sum(split_lists(split).values(), []) if split else []
    return Cohort(records, faults, names, sorted(set(ids) - seen))


def _listed(
    source: Path, root: Path, split: str | Path | None
) -> Iterator[tuple[dict, tuple[str, ...]]]:
    """Each item with the lists that it is in."""
    if split:
        lists = split_lists(split)
        for item in datalist(source):
            ids = item_ids(item, root)
            yield item, tuple(name for name, members in lists.items() if ids & set(members))
        return
    for name in subset_names(source) or [""]:
        for item in datalist(source, subset=name or None):
            yield item, (name,) if name else ()


def read_record(name: str, item: dict[str, Any], lists: Sequence[str] = ()) -> Record:
    """Read one image and its label map.

    Raises:
        ValueError: the image is bad, or the label is unreadable or not on its grid.
    """
    volume = read_volume(item["image"])
    array = np.ascontiguousarray(volume[0].numpy())
    scaled = window(volume, "MR")
    guess = guess_modality(volume)
    body = array > -300 if guess == "CT" else scaled[0].numpy() > 0.1
    spacing = tuple(float(mm) for mm in volume.pixdim)
    grid = F.adaptive_avg_pool3d(scaled, GRID)[0].numpy()
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.data)
    path = str(item.get("label"))
    return Record(
        name,
        item,
        tuple(lists),
        guess,
        spacing,
        digest.hexdigest(),
        float(array.min()),
        float(array.max()),
        np.histogram(array, HU_BINS)[0] / array.size,
        grid.astype(np.float16),
        text_strokes(scaled[0].numpy()),
        head_height(body, spacing),
        read_labels(path, item["image"]) if path.endswith(VOLUME_ENDINGS) else None,
    )


def read_labels(path: str, image: str) -> Labels:
    """Count the voxels of each class of a label map and find where they lie.

    Raises:
        ValueError: it is unreadable, or not on the grid of its image.
    """
    own: Any = open_volume(image)
    with readable("label", path):
        label: Any = open_volume(path)
        array = ras_array(label)
    voxel = float(min(own.header.get_zooms()[:3]))
    grids = [(x.shape[:3], x.affine) for x in (own, label)]
    check_label(grids[0], grids[1], voxel, (), (), f"{path} of {image}")
    whole = np.nan_to_num(np.rint(array)).clip(0, LARGEST).astype(np.int32)
    odd = np.unique(array[array != whole])
    size = int(whole.max()) + 1
    profile = np.stack([np.bincount(slab.ravel(), minlength=size) for slab in whole])  # (x, class)
    total = profile.sum(0)
    centre = (np.arange(len(profile)) + 0.5) @ profile / total.clip(1) / len(profile) - 0.5
    there = [n for n in range(1, size) if total[n]]
    return Labels(
        {n: int(total[n]) for n in there}, {n: float(centre[n]) for n in there}, odd[:5].tolist()
    )
