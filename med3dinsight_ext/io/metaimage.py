"""MetaImage volumes (.mha, .mhd) as ITK writes them.

ITK itself is 170 MB; the format is a few lines of text before the voxels, raw or zlib.
https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

import math
import os
import zlib
from typing import Any

import numpy as np

from med3dinsight_ext.io.claims import DEFLATE, check_claim
from med3dinsight_ext.io.volume_files import MHD_HEADER, files_of

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # to RAS


def open_metaimage(path: str) -> tuple[tuple[int, ...], np.dtype, np.ndarray, Any]:
    """Shape, type, affine in RAS and reader of a MetaImage.

    Raises:
        ValueError: the header lacks a field, or has one that is not supported.
        ClaimError: as ``check_claim``.
    """
    fields, start = _header(path)

    def numbers(*names: str) -> np.ndarray:
        text = next((fields[name] for name in names if name in fields), None)
        if text is None:
            raise _fault(path, f"have {names[0]}", "none")
        return np.array([float(word) for word in text.split()])

    def yes(name: str, default: str = "") -> bool:
        return fields.get(name, default)[:1] in ("t", "T", "1")  # as ITK reads it

    shape = tuple(int(n) for n in numbers("DimSize"))
    if fields.get("NDims") != "3" or len(shape) != 3:
        raise _fault(path, "be 3D", f"{fields.get('NDims')} dimensions of {shape}")
    kind, channels = fields.get("ElementType", ""), fields.get("ElementNumberOfChannels", "1")
    if kind not in TYPES or channels != "1" or not yes("BinaryData", "True"):
        raise _fault(path, "hold one binary number a voxel", f"{channels} of {kind or 'no type'}")
    big = yes("BinaryDataByteOrderMSB") or yes("ElementByteOrderMSB")
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")

    data = fields["ElementDataFile"]
    file = path if data == "LOCAL" else files_of(path)[-1]
    if data != "LOCAL" and os.path.basename(file) != data:
        raise _fault(path, "have its voxels in one file beside it", repr(data[:80]))
    offset = start if data == "LOCAL" else 0
    skipped = int(fields.get("HeaderSize", 0))
    packed = yes("CompressedData")
    size = math.prod(shape) * dtype.itemsize
    if skipped == -1 and not packed:  # voxels are the end of the file
        offset = max(0, os.path.getsize(file) - size)
    else:
        offset += max(0, skipped)
    room = os.path.getsize(file) - offset
    check_claim(path, shape, dtype.itemsize, room * DEFLATE if packed else room)

    def read() -> np.ndarray:
        with open(file, "rb") as stream:
            stream.seek(offset)
            voxels = stream.read() if packed else stream.read(size)
        if packed:
            voxels = zlib.decompressobj().decompress(voxels, size)
        return np.frombuffer(voxels, dtype).reshape(shape, order="F")

    affine = np.eye(4)
    names = ("TransformMatrix", "Rotation", "Orientation")
    if fields.keys() & set(names):
        affine[:3, :3] = numbers(*names).reshape(3, 3).T  # a row of the text is an axis
    affine[:3, :3] *= numbers("ElementSpacing", "ElementSize")
    affine[:3, 3] = numbers("Offset", "Position", "Origin")
    return shape, dtype, LPS @ affine, read


def _header(path: str) -> tuple[dict[str, str], int]:
    """Fields by name, and the byte after them."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(MHD_HEADER)
            name, is_field, value = line.decode("latin-1").partition("=")
            if not is_field or file.tell() > MHD_HEADER:
                raise _fault(path, "have a MetaImage header", repr(line[:40]))
            fields[name.strip()] = value.strip()
        fields["ElementDataFile"] = os.fsdecode(value.strip().encode("latin-1"))
        return fields, file.tell()


def _fault(path: str, rule: str, value: object) -> ValueError:
    return ValueError(f"volume must {rule}, got {value} in {path}; write it again with ITK")
