"""One volume in every format, at one place in the world: oblique axes would hide no flip."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SPACING = (0.8, 1.1, 2.5)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 5)).astype(np.float32)
VOXELS[0, 0, 0] = -1000.0
# x runs to the left, y to posterior: as NIfTI of DICOM is stored.
AFFINE = np.array([[-0.8, 0, 0, 40.0], [0, -1.1, 0, 30.0], [0, 0, 2.5, -70.0], [0, 0, 0, 1]], float)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE


def write_nrrd(path: Path, encoding: str = "raw", space: str = "left-posterior-superior") -> None:
    import nrrd

    signs = {"l": -1, "r": 1}[space[0]], {"p": -1, "a": 1}[space.split("-")[1][0]], 1
    affine = np.diag([*signs, 1]) @ AFFINE
    header = {"space": space, "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(str(path), VOXELS, header | {"encoding": encoding})


def _meta_header(data: str, packed: bool, size: int, order: str) -> bytes:
    rows = (LPS[:3, :3] / SPACING).T.ravel()
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\n"
        f"BinaryDataByteOrderMSB = {order == '>'}\nCompressedData = {packed}\n"
        + (f"CompressedDataSize = {size}\n" if packed else "")
        + f"TransformMatrix = {' '.join(map(str, rows))}\n"
        f"Offset = {' '.join(map(str, LPS[:3, 3]))}\nCenterOfRotation = 0 0 0\n"
        f"ElementSpacing = {' '.join(map(str, SPACING))}\nDimSize = 4 6 5\n"
        f"ElementType = MET_FLOAT\nElementDataFile = {data}\n"
    ).encode()


def write_mha(path: Path, packed: bool = False, order: str = "<") -> None:
    voxels = VOXELS.astype(f"{order}f4").tobytes("F")
    voxels = zlib.compress(voxels) if packed else voxels
    path.write_bytes(_meta_header("LOCAL", packed, len(voxels), order) + voxels)


def write_mhd(path: Path, packed: bool = False) -> None:
    voxels = VOXELS.astype("<f4").tobytes("F")
    voxels = zlib.compress(voxels) if packed else voxels
    data = path.with_suffix(".zraw" if packed else ".raw")
    data.write_bytes(voxels)
    path.write_bytes(_meta_header(data.name, packed, len(voxels), "<"))


def write_dicom(
    folder: Path,
    slope: float | Callable[[int], float] = 1.0,
    intercept: float = 0.0,
    names: str = "{0:04d}.dcm",
    uid: str = "1.2.3.4",
    number: Callable[[int], int] = lambda k: k + 1,
    shear: float = 0.0,
    compress: str = "",
) -> None:
    """A CT series of axial slices, whose rows run to the left and columns to posterior."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(exist_ok=True)
    for k in range(VOXELS.shape[2]):
        image: Any = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = CTImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = f"{uid}.{k + 1}"
        image.SeriesInstanceUID, image.Modality, image.InstanceNumber = uid, "CT", number(k)
        image.ImagePositionPatient = (LPS @ (0, 0, k, 1))[:3].tolist()
        image.ImagePositionPatient[1] += shear * k
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing = [1.1, 0.8]  # between rows, between columns
        image.Rows, image.Columns = 6, 4
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 1
        own = slope(k) if callable(slope) else slope
        image.RescaleSlope, image.RescaleIntercept = own, intercept
        stored = ((VOXELS[:, :, k].T - intercept) / own).round().astype("<i2")
        image.PixelData = stored.tobytes()
        if compress:
            image.compress(compress)
        image.save_as(folder / names.format(k), enforce_file_format=True)
