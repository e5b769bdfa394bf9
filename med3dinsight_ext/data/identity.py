"""Signs in a volume that may identify a patient: burnt-in text and a face."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STROKES = 12  # edges in each direction that text in a corner has at least
HEAD_MM = ((110.0, 210.0), (130.0, 270.0))  # width and depth of a head's axial slice
HEAD_HEIGHT = 150.0  # mm; a brain without its skull is lower


def text_strokes(volume: np.ndarray) -> int:
    """Edges of what may be text: bright marks in a corner, equal in all slices of a plane.

    Args:
        volume: (x, y, z) in [0, 1].

    Returns:
        The largest count over the planes and corners, of edges along the direction with fewer: a
        line, a frame and a border have edges in one direction only.
    """
    most = 0
    for axis, size in enumerate(volume.shape):
        if size < 4:
            continue
        index = np.linspace(0, size - 1, min(size, 9)).round().astype(int)
        stack: np.ndarray = volume.take(index, axis)
        low, high = stack.min(axis), stack.max(axis)
        marks = (low > 0.6) & (high - low < 1e-3)
        h, w = (max(1, n // 4) for n in marks.shape)
        for rows in (slice(0, h), slice(-h, None)):
            for columns in (slice(0, w), slice(-w, None)):
                corner = marks[rows, columns].astype(np.int8)
                edges = [int(np.abs(np.diff(corner, axis=k)).sum()) for k in (0, 1)]
                most = max(most, min(edges))
    return most


def head_height(body: np.ndarray, spacing: Sequence[float]) -> float:
    """Height in mm of the part of a volume that is shaped like a head with a face.

    That are axial slices as wide and deep as a head, with air in front, left and right, whose front
    is no smooth curve, as a nose, lips and a chin stand out of it.

    Args:
        body: (x, y, z) bool in RAS, True where there is no air.
        spacing: voxel size along x, y, z in mm.

    Returns:
        0 if the front is smooth or the part lower than ``HEAD_HEIGHT``.
    """
    across, along = (np.asarray(body.any(axis)) for axis in (1, 0))  # (x, z), (y, z)
    fits = np.ones(body.shape[2], bool)
    for mask, mm, (low, high), borders in (
        (across, spacing[0], HEAD_MM[0], (0, -1)),
        (along, spacing[1], HEAD_MM[1], (-1,)),
    ):
        first, last = mask.argmax(0), len(mask) - mask[::-1].argmax(0)
        fits &= (low <= (last - first) * mm) & ((last - first) * mm <= high) & mask.any(0)
        for border in borders:
            fits &= ~mask[border]
    z = np.flatnonzero(fits)
    height = len(z) * spacing[2]
    if height < HEAD_HEIGHT:
        return 0.0
    front = (along.shape[0] - along[::-1].argmax(0))[z] * spacing[1]
    smooth = np.polynomial.Polynomial.fit(z, front, 2)(z)
    return float(height) if (front - smooth).max() > 8 else 0.0
