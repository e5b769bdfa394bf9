"""DICOM series: a folder of single-frame images of one series, read by pydicom."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from med3dinsight_ext.io.claims import check_claim
from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.io.packages import NotHere, package
from med3dinsight_ext.io.volume_files import iterate_series, series_files

UNEVEN = 0.1  # of the median distance between slices, by which one may differ
SAME = {  # fields that all images of a series share, and the tolerance of numbers
    "Rows": 0, "Columns": 0, "PixelSpacing": 1e-3, "ImageOrientationPatient": 1e-3,
}  # fmt: skip


def open_series(folder: str) -> tuple[tuple[int, ...], np.dtype, np.ndarray, Any]:
    """Shape (columns, rows, slices), type, affine in RAS and reader of a DICOM series.

    Slices are sorted by their position along the normal of the images, not by their numbers. Each
    has its own rescale slope and intercept: CT is in HU.

    Raises:
        ValueError: the folder is no series, or has more than one; slices are missing, repeated,
            uneven or beside each other (gantry tilt); images have several frames, colours, other
            sizes or orientations, or a compression that no installed decoder reads.
        ClaimError: as ``check_claim``.
    """
    pydicom = package("pydicom", folder)
    files = series_files(folder)
    if not files:
        raise _fault(folder, "hold a DICOM series", "no DICOM file", "name a volume or a series")
    headers = []
    for file in files:
        try:
            headers.append(pydicom.dcmread(file, stop_before_pixels=True))
        except Exception as error:  # pydicom has its own for each field
            cause = f"{type(error).__name__} in {os.path.basename(file)}"
            raise _fault(folder, "hold readable DICOM files", cause, "copy it again") from error
    _check_series(folder, files, headers)
    order, affine = _stack(folder, files, headers)
    for uid in {header.file_meta.TransferSyntaxUID for header in headers}:
        _check_decoder(folder, pydicom, uid)
    first = headers[0]
    shape = (int(first.Columns), int(first.Rows), len(files))
    plain = all(not h.file_meta.TransferSyntaxUID.is_compressed for h in headers)
    room = sum(map(os.path.getsize, files)) if plain else math.inf
    check_claim(folder, shape, int(first.BitsAllocated) // 8, room)

    def read() -> np.ndarray:
        voxels: np.ndarray = np.empty(shape, np.float32)
        for k, index in enumerate(order):
            image = pydicom.dcmread(files[index])
            try:
                pixels = pydicom.pixels.apply_modality_lut(image.pixel_array, image)
            except Exception as error:  # each decoder has its own
                name = os.path.basename(files[index])
                cause = f"{type(error).__name__}: {first_line(error)} in {name}"
                raise _fault(folder, "hold readable images", cause, "copy it again") from error
            voxels[:, :, k] = pixels.T
        return voxels

    return shape, np.dtype(np.float32), affine, read


def series_header(folder: str) -> tuple[str | None, str | None]:
    """PatientID, and CT, MR or PET, of a series' first file; None for what it does not say."""
    if not os.path.isdir(folder):
        return None, None
    try:
        file = next(iterate_series(folder), None)
        pydicom = package("pydicom", folder)
        tags = ["PatientID", "Modality"]
        header = pydicom.dcmread(file, specific_tags=tags, stop_before_pixels=True)
        patient, kind = (str(header.get(tag) or "").strip() for tag in tags)
    except Exception:  # pydicom has its own for each field; whoever reads the volume names them
        return None, None
    return patient or None, {"CT": "CT", "MR": "MR", "PT": "PET"}.get(kind)


def _check_series(folder: str, files: Sequence[str], headers: Sequence[Any]) -> None:
    """Stop at what is no series of single images on one grid."""
    count = Counter(str(header.get("SeriesInstanceUID", "none")) for header in headers)
    if len(count) > 1:
        listed = ", ".join(f"{uid} ({n} files)" for uid, n in count.most_common(3))
        fix = "put each series into a folder of its own"
        raise _fault(folder, "hold one DICOM series", f"{len(count)}: {listed}", fix)
    for file, header in zip(files, headers, strict=True):
        name = os.path.basename(file)
        if (frames := int(header.get("NumberOfFrames") or 1)) > 1:
            fix = "convert it with dcm2niix"
            raise _fault(folder, "hold one image a file", f"{frames} frames in {name}", fix)
        if int(header.get("SamplesPerPixel", 1)) != 1:
            raise _fault(folder, "be grey", f"colours in {name}", "leave it out")
        for field in (*SAME, "ImagePositionPatient", "BitsAllocated"):
            if header.get(field) in (None, ""):
                fix = "leave out what is no slice of a volume"
                raise _fault(folder, f"have {field} in every file", f"none in {name}", fix)
        for field, tolerance in SAME.items():
            first, own = (np.array(h[field].value, float) for h in (headers[0], header))
            if not np.allclose(first, own, rtol=0, atol=tolerance):
                shown = f"{first.tolist()} and, in {name}, {own.tolist()}"
                fix = "move localizers and other images away"
                raise _fault(folder, f"have one {field}", shown, fix)


def _stack(
    folder: str, files: Sequence[str], headers: Sequence[Any]
) -> tuple[list[int], np.ndarray]:
    """Order of the slices, from low to high along their normal, and the affine in RAS."""
    first = headers[0]
    across, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(across, down)
    positions = np.array([header.ImagePositionPatient for header in headers], float)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    steps = np.diff(positions @ normal)
    down_mm, across_mm = map(float, first.PixelSpacing)
    mm = float(np.median(steps)) if len(steps) else 1.0
    for k, step in enumerate(steps):
        pair = " and ".join(os.path.basename(files[i]) for i in order[k : k + 2])
        if step < 1e-3:
            fix = "keep one time point or echo in the folder"
            raise _fault(folder, "have one image at a place", f"{pair} at one place", fix)
        if abs(step - mm) > UNEVEN * mm:
            shown = f"{step:g} mm between {pair}, {mm:g} mm elsewhere"
            raise _fault(folder, "have all its slices", shown, "add those that are missing")
    if len(steps):
        normal = (positions[-1] - positions[0]) / len(steps)
        beside = np.linalg.norm(np.cross(normal, np.cross(across, down))) * len(steps)
        if beside > min(down_mm, across_mm):
            fix = "convert it with dcm2niix"
            shown = f"slices up to {beside:.1f} mm beside each other (gantry tilt)"
            raise _fault(folder, "have slices above each other", shown, fix)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = across * across_mm, down * down_mm, normal
    affine[:3, 3] = positions[0]
    return order.tolist(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM is LPS


def _check_decoder(folder: str, pydicom: Any, uid: Any) -> None:
    """Stop if no installed package decodes a transfer syntax."""
    try:
        found = not uid.is_compressed or pydicom.pixels.get_decoder(uid).is_available
    except NotImplementedError:
        found = False
    if not found:
        fix = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or decompress it"
        rule = "have a compression that is decoded here"
        raise NotHere(str(_fault(folder, rule, uid.name, fix)))


def _fault(folder: str, rule: str, value: object, fix: str) -> ValueError:
    return ValueError(f"DICOM series must {rule}, got {value} in {folder}; {fix}")
