"""Sizes that headers claim, compared with their files before memory is allocated for them."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

MAX_VOXELS = 2**30  # 4 GiB as float32; the environment variable MED3D_MAX_VOXELS replaces it
DEFLATE = 1032  # bytes that one byte of gzip or zip can become, at most
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ClaimError(ValueError):
    """A header claims more voxels than its file can hold, or than are allowed."""


def check_claim(path: str, shape: Sequence[int], itemsize: int, room: float) -> None:
    """Check the size that a header claims.

    Args:
        path: of the file, for the message.
        shape: claimed voxels along each axis.
        itemsize: claimed bytes a voxel.
        room: bytes of voxels that the file can hold.

    Raises:
        ClaimError: the file cannot hold so many voxels, or they are more than ``MAX_VOXELS``.
    """
    voxels = math.prod(int(n) for n in shape)
    claim = f"{' x '.join(map(str, shape))} voxels of {itemsize} bytes"
    if voxels * itemsize > room:
        raise ClaimError(
            f"header must claim what its file can hold, got {claim} and room for {int(room):,} "
            f"bytes in {path}; copy it again, or repair the file"
        )
    limit = int(os.environ.get("MED3D_MAX_VOXELS", MAX_VOXELS))
    if voxels > limit:
        raise ClaimError(
            f"volume must have at most {limit:,} voxels, got {claim} in {path}; crop or resample "
            "it, or set the environment variable MED3D_MAX_VOXELS"
        )


def open_volume(path: str | Path) -> Any:
    """Nibabel's image of a file, its voxels not read yet.

    Raises:
        ClaimError: as ``check_claim``.
    """
    image: Any = nib.load(path)
    file = image.file_map["image"].filename or str(path)
    name, size = str(file).lower(), os.path.getsize(file)
    room: float = size - getattr(image.dataobj, "offset", 0)
    if name.endswith((".gz", ".mgz")):
        room = size * DEFLATE
    elif name.endswith((".bz2", ".zst")):  # which have no such bound
        room = math.inf
    check_claim(str(path), image.shape, image.get_data_dtype().itemsize, room)
    return image


def npz_array(path: str | Path, name: str) -> np.ndarray:
    """One array of an .npz archive.

    Raises:
        ClaimError: as ``check_claim``.
        KeyError: the archive has no such array.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
    packed = min(member.compress_size, os.path.getsize(path))
    check_claim(f"{path}::{name}", shape, dtype.itemsize, min(member.file_size, packed * DEFLATE))
    with np.load(path) as arrays:
        return arrays[name]
