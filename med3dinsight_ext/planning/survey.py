"""Survey of a dataset: grids of all volumes, intensities of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from med3dinsight_ext.data.volumes import check_each, guess_modality, read_volume
from med3dinsight_ext.io.images import open_volume, ras_array
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS

SAMPLE = 20  # volumes whose voxels are read
LABEL_LIKE = 32  # different values; more are an image's
VOXELS = 100_000  # of a volume's foreground that are kept


class Survey(NamedTuple):
    """What was measured.

    spacings: (n, 3) mm along x, y, z in RAS.
    shapes: (n, 3) voxels.
    modality: of all items; "auto" if they differ, or some are neither told nor read.
    kinds: the modalities that were told or seen.
    ct_range: HU range of the labelled voxels (0.5th to 99.5th percentile, to the outer 50); None
        without CT or labelled voxels in the sample.
    sampled: volumes whose voxels were read.
    """

    spacings: np.ndarray
    shapes: np.ndarray
    modality: str
    kinds: tuple[str, ...]
    ct_range: tuple[float, float] | None
    sampled: int


def survey(items: Sequence[dict[str, Any]]) -> Survey:
    """Read the headers of all images and the voxels of a sample.

    Args:
        items: from ``datalist``, with label maps or without.

    Raises:
        ValueError: a volume is bad, or looks like a label map.
    """
    grids = check_each(lambda item: _grid(str(item["image"])), list(items), "headers", None)
    found = np.array([grids[id(item)] for item in items])
    labelled = [item for item in items if str(item.get("label")).endswith(VOLUME_ENDINGS)]
    pool = labelled or list(items)
    chosen = np.linspace(0, len(pool) - 1, min(SAMPLE, len(pool))).round().astype(int)
    sample = [pool[i] for i in chosen]
    voxels = check_each(_voxels, sample, "a sample of the voxels", None)
    seen = [voxels[id(item)] for item in sample]
    untold = [item for item in items if item["modality"] == "auto"]
    kinds = {str(item["modality"]) for item in items} - {"auto"}
    kinds |= {voxels[id(item)][0] for item in untold if id(item) in voxels}
    known = len(kinds) == 1 and all(id(item) in voxels for item in untold)
    modality = next(iter(kinds)) if known else "auto"
    inside = [values for guess, values in seen if values is not None and guess == "CT"]
    ct_range = None
    if kinds == {"CT"} and any(len(values) for values in inside):
        low, high = np.percentile(np.concatenate(inside), [0.5, 99.5])
        low, high = np.floor(low / 50) * 50, np.ceil(high / 50) * 50
        ct_range = (float(low), float(high)) if low < high else None  # labels of one value
    shown = tuple(sorted(kinds))
    return Survey(found[:, 0], found[:, 1], modality, shown, ct_range, len(sample))


def _grid(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Spacing in mm and shape in voxels, along x, y, z in RAS."""
    if "::" in path:
        volume = read_volume(path)
        return np.asarray(volume.pixdim), np.array(volume.shape[1:])
    with readable("volume", path):
        image = open_volume(path)
    shape = image.shape[:3]
    if len(shape) < 3 or min(shape) < 2 or image.shape[3:] not in ((), (1,)):
        raise ValueError(
            f"volume must be 3D, got shape {image.shape} in {path}; leave 2D and 4D images out"
        )
    axes = np.argsort(nib.io_orientation(image.affine)[:, 0])
    return np.array(image.header.get_zooms()[:3])[axes], np.array(shape)[axes]


def _voxels(item: dict[str, Any]) -> tuple[str, np.ndarray | None]:
    """Modality by the intensities, and a volume's values inside of its label map."""
    volume = read_volume(item["image"])
    array = volume[0].numpy()
    kinds = np.unique(array[::2, ::2, ::2])
    drawn = str(item.get("label")).endswith(VOLUME_ENDINGS)
    classified = item.get("label") not in (None, "") and not drawn
    told = "::" in item["image"] or classified  # shapes may be told apart, as those of glands
    if not told and len(kinds) <= LABEL_LIKE and kinds[0] == 0 and (kinds == kinds.round()).all():
        raise ValueError(
            f"images must not be label maps, got only {len(kinds)} values in {item['image']}; name "
            "labels like NAME_seg.nii.gz, or put them into a folder labelsTr"
        )
    guess = guess_modality(volume)
    if not drawn:
        return guess, None
    with readable("label", item["label"]):
        mask = ras_array(open_volume(item["label"])) > 0
    if mask.shape != array.shape:
        raise ValueError(
            f"label must have its image's shape {array.shape}, got {mask.shape} in "
            f"{item['label']}; draw it on this image's grid"
        )
    values = array[mask]
    return guess, values[:: len(values) // VOXELS + 1]
