"""Reading and checking of volumes, and intensity scaling by modality."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader
from monai.data.utils import correct_nifti_header_if_necessary
from monai.transforms import LoadImage, MapTransform, Orientation, ScaleIntensityRange
from monai.utils import convert_to_dst_type, ensure_tuple
from nibabel.openers import Opener
from torch import Tensor

from med3dinsight_ext.data.modalities import modality_name
from med3dinsight_ext.data.slicing import window
from med3dinsight_ext.io.claims import npz_array
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.images import OTHER, open_volume
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.remote import fetched
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS

log = logging.getLogger(__name__)
# MONAI sets up a reader for CUDA, which is not used here, wherever pydicom is installed.
warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
T = TypeVar("T")
FIX = "repair the file or leave it out"
STRAIGHT = math.degrees(1e-3)  # a larger shear is none of rounding
UNSHEAR = "resample it to a grid of right angles (monai.transforms.Spacing; dcm2niix for DICOM)"


def guess_modality(volume: Tensor) -> str:
    """CT if a voxel is below -150 (air in HU), else MR; PET is not distinguished from MR."""
    return "CT" if volume.min() < -150 else "MR"


def modality_of(item: Mapping[str, Any], volume: Tensor, default: str = "auto") -> str:
    """An item's modality; ``default`` where it is "auto" or not given; guessed if both are."""
    given = item.get("modality", "auto")
    given = default if given == "auto" else given
    return guess_modality(volume) if given == "auto" else given


def shear(affine: Tensor) -> float:
    """Largest deviation of a volume's axes from right angles, in degrees.

    Args:
        affine: (4, 4), voxels to mm.
    """
    axes = torch.as_tensor(affine).as_subclass(Tensor)[:3, :3].double()
    axes = axes / axes.norm(dim=0)
    cosine = (axes.mT @ axes - torch.eye(3).to(axes)).abs().max().item()
    return math.degrees(math.asin(min(cosine, 1.0)))


def check_straight(volume: MetaTensor, path: str) -> None:
    """Stop if a volume is sheared: its slices would tilt on any other grid."""
    if (angle := shear(volume.affine)) > STRAIGHT:
        raise ValueError(
            f"volume must have axes at right angles, got {angle:.2g} degrees of shear (gantry "
            f"tilt) in {path}; {UNSHEAR}"
        )


class ScaleByModalityd(MapTransform):
    """Scales intensities to [0, 1] by the item's ``modality``: a HU range for CT, else percentiles.

    Args:
        keys: images, (1, x, y, z).
        ct_range: HU that become 0 and 1.
        modality: of items without their own; "auto": guessed for each volume.
    """

    modality = "auto"

    def __init__(
        self,
        keys: str | list[str],
        ct_range: Sequence[float] = (-200.0, 300.0),
        modality: str = "auto",
    ) -> None:
        super().__init__(keys)
        if (name := modality_name(modality)) != "auto":  # prepared copies go by what is set
            self.modality = name
        self.ct = ScaleIntensityRange(ct_range[0], ct_range[1], 0.0, 1.0, clip=True)

    def __call__(self, data: dict) -> dict:
        data = dict(data)
        for key in self.keys:
            image = data[key]
            modality = modality_of(data, image, self.modality)
            if modality == "CT":
                data[key] = self.ct(image)
            else:
                data[key] = convert_to_dst_type(window(image, modality), image)[0]
        return data


def read_volume(path: str) -> MetaTensor:
    """Read a volume and check it.

    Args:
        path: NIfTI, .nrrd, .mha or .mhd file, the folder of a DICOM series, the address of a file
            (s3://…), or ``file.npz::array::index`` (1 mm, taken to be in RAS).

    Returns:
        (1, x, y, z) float32 in RAS, with affine and ``filename_or_obj`` in its meta.

    Raises:
        ValueError: it is unreadable, not 3D, one voxel thick, without a valid spacing or affine,
            not finite, or the same value everywhere.
    """
    if "::" in path:
        with readable("volume", path, "write it as file.npz::array::index"):
            file, name, index = path.split("::")
            file = fetched(file)
            array = _npz_array(file, name)[int(index)]
        _require(array.ndim == 3, path, "be 3D", array.shape)
        volume = MetaTensor(array[None].astype(np.float32), meta={"filename_or_obj": path})
    else:
        image = _checked_header(path)
        with readable("volume", path, FIX):
            volume = Orientation("RAS", labels=None)(load_volume(path, image))
    _check_voxels(volume, path)
    return volume


class VolumeReader(NibabelReader):
    """MONAI's reader for all formats of ``open_volume``.

    Args:
        image: from ``open_volume``, if it is open already.
    """

    def __init__(self, image: Any = None) -> None:
        super().__init__()
        self.image = image

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Nibabel images of paths; one for one path."""
        self.filenames = ensure_tuple(data)
        found = [self.image or open_volume(name) for name in self.filenames]
        found = [correct_nifti_header_if_necessary(image) for image in found]
        return found if len(found) > 1 else found[0]


def load_volume(path: str | Path, image: Any = None) -> MetaTensor:
    """(1, x, y, z) as stored, by ``VolumeReader`` alone; its errors are not hidden.

    Args:
        path: of a volume.
        image: from ``open_volume``, if it is open already.
    """
    reader = VolumeReader(image)
    # A reader given at the call has no fallback that would accept a broken file.
    load = LoadImage(reader, image_only=True, ensure_channel_first=True, expanduser=False)
    return load(str(path), reader)


class CheckClaimd(MapTransform):
    """Checks what headers claim before ``LoadImaged`` allocates it; see ``open_volume``.

    Args:
        keys: paths; what has no name of a volume, and is no folder, is left to the reader.
    """

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            if str(data[key]).endswith(VOLUME_ENDINGS) or os.path.isdir(data[key]):
                open_volume(data[key])
        return data


class CheckVoxelsd(MapTransform):
    """Checks what ``LoadImaged`` read, as ``read_volume`` does.

    Args:
        keys: images, (1, x, y, z).
    """

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            path = str(image.meta.get("filename_or_obj", key))
            shape = tuple(image.shape)
            _require(len(shape) == 4 and shape[0] == 1, path, "be 3D", f"(c, x, y, z) {shape}")
            _check_voxels(image, path)
        return data


class ReadVolumed(MapTransform):
    """``read_volume`` as a transform of the paths at ``keys``: files, series and .npz, in RAS."""

    def __call__(self, data: dict) -> dict:
        return {**data, **{key: read_volume(data[key]) for key in self.keys}}


def _fault(path: str, rule: str, value: object) -> ValueError:
    return ValueError(f"volume must {rule}, got {value} in {path}; {FIX}")


def _require(ok: object, path: str, rule: str, value: object) -> None:
    if not ok:
        raise _fault(path, rule, value)


@lru_cache(maxsize=1)  # an archive is unpacked as a whole, so once for all its volumes
def _npz_array(file: str, name: str) -> np.ndarray:
    with readable("volume", file):
        return npz_array(file, name)


def _check_voxels(volume: MetaTensor, path: str) -> None:
    """The part of ``read_volume``'s rules that needs voxels (1, x, y, z)."""
    shape = tuple(volume.shape[1:])
    _require(min(shape) > 1, path, "be thicker than one voxel", shape)
    finite = volume.isfinite().all()
    _require(finite, path, "be finite", f"{int((~volume.isfinite()).sum())} NaN or infinite voxels")
    _require(volume.min() < volume.max(), path, "vary", f"{volume.min().item():g} everywhere")


def _checked_header(path: str) -> Any:
    """The image, after a check of shape, spacing and affine: nibabel repairs some silently."""
    with readable("volume", path, FIX):
        image = open_volume(path)
        if path.endswith(tuple(OTHER)) or os.path.isdir(path):
            spacing = np.array(image.header.get_zooms()[:3])
        else:
            with Opener(fetched(path)) as file:
                raw = type(image.header).from_fileobj(file, check=False)
            spacing = np.array(raw["pixdim"][1:4])
    shape = image.shape
    _require(len(shape) == 3 or shape[3:] == (1,), path, "be 3D", f"shape {shape}")
    kind = np.dtype(image.get_data_dtype()).kind
    _require(kind in "iufb", path, "have one real value a voxel", image.get_data_dtype())
    ok = np.isfinite(spacing).all() and (spacing > 0).all()
    _require(ok, path, "have a spacing above 0 mm", spacing.tolist())
    affine = image.affine[:3, :3]
    ok = np.isfinite(image.affine).all() and abs(np.linalg.det(affine)) > 1e-6 * spacing.prod()
    _require(ok, path, "have an invertible affine", image.affine.tolist())
    return image


def check_each(
    check: Callable[[dict], T], items: list[dict], what: str, skip_bad: bool | None
) -> dict[int, T]:
    """Check every item, in four threads, before a long job starts.

    Args:
        check: returns what it read of an item, or raises a ValueError.
        items: from ``datalist``.
        what: is checked, for the progress bar and the message.
        skip_bad: log the bad items, instead of raising; None: there is no such choice.

    Returns:
        For the ``id`` of each good item, what ``check`` returned.

    Raises:
        ValueError: with every bad item and what is wrong with it, or if none is good.
    """

    def attempt(item: dict) -> T | ValueError:
        try:
            return check(item)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        found = list(Bar(pool.map(attempt, items), f"Checking {what}", len(items)))
    return good_ones(items, found, what, skip_bad)


def good_ones(
    items: Sequence[dict], found: Sequence[T | ValueError], what: str, skip_bad: bool | None
) -> dict[int, T]:
    """What ``check_each`` returns and raises, from the result or fault of each item."""
    bad = [str(result) for result in found if isinstance(result, ValueError)]
    if bad and (not skip_bad or len(bad) == len(items)):
        listing = "\n  ".join(bad)
        remedy = "move them away" if skip_bad is None else "skip_bad leaves them out"
        raise ValueError(
            f"{what} must be sound, got {len(bad)} bad of {len(items)} ({remedy}):\n  {listing}"
        )
    for text in bad:
        log.warning("left out: %s", text)
    results = zip(items, found, strict=True)
    return {id(item): got for item, got in results if not isinstance(got, ValueError)}


def check_parts(
    parts: Sequence[list[dict]], skip_bad: bool = False, copy: Any = None
) -> list[list[dict]]:
    """Read every volume once; the good items of each part. See ``check_each``.

    A ``PreparedCopy`` as ``copy`` reads only the volumes that it does not hold.
    """
    items = [item for part in parts for item in part]
    if copy is not None:
        good = copy.check(items, skip_bad)
    else:
        good = check_each(lambda item: read_volume(item["image"]).shape, items, "volumes", skip_bad)
    return [[item for item in part if id(item) in good] for part in parts]
