"""Sizes that headers claim, compared with their files before memory is allocated for them."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener

MAX_VOXELS = 2**30  # 4 GiB as float32; the environment variable MED3D_MAX_VOXELS replaces it
MAX_EXTENSIONS = 2**24  # bytes of a NIfTI header's extensions, which nibabel keeps in memory
DEFLATE = 1032  # bytes that one byte of gzip or zip can become, at most
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ClaimError(ValueError):
    """A header claims more than its file can hold, or than is allowed."""


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


def check_extensions(path: str) -> None:
    """Check the sizes that the extensions of a NIfTI header claim.

    Raises:
        ClaimError: they are no sizes, or more than ``MAX_EXTENSIONS``.
    """
    single = not path.lower().removesuffix(".gz").endswith((".hdr", ".img"))
    kind, part = (nib.Nifti1Image, "image") if single else (nib.Nifti1Pair, "header")
    try:
        name = str(kind.filespec_to_file_map(path)[part].filename)
    except ImageFileError:  # another format
        return
    if not os.path.isfile(name):  # a pipe would never end
        return
    with ImageOpener(name) as file:
        block = file.read(540)
        found = [k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.may_contain_header(block)]
        if not found:
            return
        header = found[0](block[: found[0].template_dtype.itemsize], check=False)
        start = header.template_dtype.itemsize + 4
        end = int(header["vox_offset"]) if single else None
        file.seek(start - 4)
        extended = file.read(4)[:1] not in (b"", b"\0")
        while extended and (end is None or end - start >= 16):
            file.seek(start)
            if len(size := file.read(4)) < 4:
                return
            step = int(np.frombuffer(size, np.dtype("i4").newbyteorder(header.endianness))[0])
            start += step
            if step < 16 or start > MAX_EXTENSIONS:
                raise ClaimError(
                    f"header extensions must have 16 to {MAX_EXTENSIONS:,} bytes, got {step:,} in "
                    f"{path}; save the volume without them"
                )


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
