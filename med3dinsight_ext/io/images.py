"""Volumes of every supported format as nibabel images, their voxels not read yet."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from med3dinsight_ext.io.claims import DEFLATE, check_claim, check_extensions
from med3dinsight_ext.io.dicom import open_series
from med3dinsight_ext.io.metaimage import open_metaimage
from med3dinsight_ext.io.nrrd_files import open_nrrd
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.remote import fetched, is_remote

UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's codes of other units than mm
OTHER = {".nrrd": open_nrrd, ".mha": open_metaimage, ".mhd": open_metaimage}


def open_volume(path: str | Path) -> Any:
    """Nibabel's image of a volume, its voxels not read yet.

    Args:
        path: NIfTI or another file that nibabel reads; .nrrd, .mha or .mhd; the folder of a DICOM
            series; the address of a file (``io.remote``). All have an affine in RAS, as NIfTI has.

    Raises:
        ClaimError: as ``check_claim`` and ``check_extensions``.
        ValueError: another format than nibabel's is broken or not supported, or the unit of a
            NIfTI is not mm.
    """
    if is_remote(path):
        with readable("volume", str(path)):
            return open_volume(fetched(str(path)))
    name = str(path)
    opener = open_series if os.path.isdir(name) else OTHER.get(os.path.splitext(name)[1])
    if opener is None:
        return _open_nifti(name)
    with readable("volume", name):
        shape, dtype, affine, read = opener(name)
        if dtype.kind in "iu" and dtype.itemsize == 8:  # which NIfTI and torch rarely have
            dtype = np.dtype(np.float64)
        voxels: Any = _Voxels(name, shape, dtype, read)
        return nib.Nifti1Image(voxels, affine, dtype=dtype)


def ras_array(image: Any) -> np.ndarray:
    """(x, y, z) voxels in RAS of an image from ``open_volume``."""
    turned = nib.as_closest_canonical(image)
    return np.asanyarray(turned.dataobj).reshape(turned.shape[:3])


class _Voxels:
    """Nibabel's protocol of arrays that are read when they are needed."""

    is_proxy = True

    def __init__(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]
    ) -> None:
        self.path, self.shape, self.ndim = path, shape, len(shape)
        self.dtype, self._read = dtype, read

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with readable("volume", self.path):
            return self._read().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.__array__()[index]


def _open_nifti(path: str) -> Any:
    check_extensions(path)
    image: Any = nib.load(path)
    if isinstance(image, nib.Nifti1Pair):
        unit = UNITS.get(int(image.header["xyzt_units"]) & 7)
        if unit:
            raise ValueError(
                f"volume must be in mm, got {unit} as the unit of space in {path}; scale its "
                "affine to mm, or correct the header's xyzt_units"
            )
    file = image.file_map["image"].filename or path
    name, size = str(file).lower(), os.path.getsize(file)
    room: float = size - getattr(image.dataobj, "offset", 0)
    if name.endswith((".gz", ".mgz")):
        room = size * DEFLATE
    elif name.endswith((".bz2", ".zst")):  # which have no such bound
        room = math.inf
    check_claim(path, image.shape, image.get_data_dtype().itemsize, room)
    return image
