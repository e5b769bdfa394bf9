"""NRRD volumes, read by pynrrd."""

from __future__ import annotations

import bz2
import math
import os
import zlib
from typing import Any

import numpy as np

from med3dinsight_ext.io.claims import DEFLATE, check_claim
from med3dinsight_ext.io.packages import package

SPACES = {  # to RAS
    "left-posterior-superior": (-1.0, -1.0, 1.0), "lps": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0), "las": (-1.0, 1.0, 1.0),
    "right-anterior-superior": (1.0, 1.0, 1.0), "ras": (1.0, 1.0, 1.0),
}  # fmt: skip
GZIP, BZIP = ("gzip", "gz"), ("bzip2", "bz2")
DETACHED = ("data file", "datafile")


def open_nrrd(path: str) -> tuple[tuple[int, ...], np.dtype, np.ndarray, Any]:
    """Shape, type, affine in RAS and reader of a NRRD file.

    Raises:
        ValueError: it has no place in space, is not 3D, or its voxels are in another file.
        ClaimError: as ``check_claim``.
    """
    nrrd = package("nrrd", path)
    header = nrrd.read_header(path)
    shape = tuple(int(n) for n in header["sizes"])
    space = str(header.get("space", "none")).lower()
    encoding = str(header["encoding"]).lower()
    skips = encoding != "raw" and any(header.get(f"{kind} skip") for kind in ("line", "byte"))
    units = {str(unit).strip().lower() for unit in header.get("space units", ())}
    directions = np.asarray(header.get("space directions", np.nan), float)
    for ok, rule, value in (
        (not header.keys() & set(DETACHED), "hold its voxels itself", "another data file"),
        (not skips, "have packed voxels right after the header", "others to skip"),
        (len(shape) == 3, "be 3D", f"shape {shape}"),
        (space in SPACES, "have a space (left-posterior-superior, …)", space),
        (directions.shape == (3, 3), "have three space directions", directions.tolist()),
        ("space origin" in header, "have a space origin", "none"),
        (units <= {"", "mm", "millimeter", "millimeters"}, "be in mm", sorted(units)),
    ):
        if not ok:
            fix = "write it again with Slicer or ITK"
            raise ValueError(f"volume must {rule}, got {value} in {path}; {fix}")
    dtype = np.dtype(nrrd.reader._determine_datatype(header))
    room = float(os.path.getsize(path))
    if encoding in GZIP:
        room *= DEFLATE
    elif encoding in BZIP:  # which has no such bound
        room = math.inf
    check_claim(path, shape, dtype.itemsize if encoding in (*GZIP, *BZIP, "raw") else 1, room)
    affine = np.eye(4)
    affine[:3, :3] = directions.T
    affine[:3, 3] = header["space origin"]

    def read() -> np.ndarray:
        if encoding not in (*GZIP, *BZIP):
            return np.asarray(nrrd.read(path)[0])
        with open(path, "rb") as file:  # pynrrd would unpack all that follows the voxels too
            nrrd.read_header(file)
            packed = file.read()
        unpack: Any = bz2.BZ2Decompressor() if encoding in BZIP else zlib.decompressobj(31)
        voxels = unpack.decompress(packed, math.prod(shape) * dtype.itemsize)
        return np.frombuffer(voxels, dtype).reshape(shape, order="F")

    return shape, dtype, np.diag([*SPACES[space], 1.0]) @ affine, read
