"""Likeness of fingerprints: near-duplicates, and volumes that are mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

ALIKE = 0.85  # correlation of the details of near-duplicates
ASYMMETRY = 0.4  # median likeness of a cohort that is asymmetric enough to tell
AGREE = 0.9  # share of such a cohort with a likeness above 0
FEWEST = 8  # volumes to compare one with
BLOCK = 128  # volumes that are compared with all at once


class Pair(NamedTuple):
    """Two near-duplicates by their index, and whether one of them is mirrored left–right."""

    first: int
    second: int
    correlation: float
    mirrored: bool


def near_pairs(grids: Sequence[np.ndarray]) -> Iterator[Pair]:
    """Pairs of fingerprints (x, y, z) whose details correlate by more than ``ALIKE``.

    Details are without the coarse parts and, in a cohort of ``FEWEST``, without the cohort's mean:
    both are alike in many patients.
    """
    if not len(grids):
        return
    details: np.ndarray = np.stack([_fine(grid.astype(np.float32)) for grid in grids])
    mean = details.mean(0) * (len(grids) >= FEWEST)
    flat = _unit(details - mean)
    for start in range(0, len(grids), BLOCK):
        block = details[start : start + BLOCK]
        plain, mirrored = (_unit(x - mean) @ flat.T for x in (block, block[:, ::-1]))
        for row, second in np.argwhere(np.maximum(plain, mirrored) > ALIKE):
            if (first := start + int(row)) < second:
                values = float(plain[row, second]), float(mirrored[row, second])
                yield Pair(first, int(second), max(values), values[1] > values[0])


def _fine(grid: np.ndarray) -> np.ndarray:
    return grid - gaussian_filter(grid, 1)


def _unit(details: np.ndarray) -> np.ndarray:
    """Details (n, x, y, z) as rows of mean 0 and length 1."""
    rows = details.reshape(len(details), -1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)


def asymmetry(grids: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Likeness of each volume's asymmetry along an axis to that of the others.

    It is the cosine of the antisymmetric part of a fingerprint and the mean of the others'; that of
    a mirrored volume has the opposite sign.

    Args:
        grids: n fingerprints (x, y, z) of even shape; half of their resolution is compared.
        axis: 0 to 2.

    Returns:
        (n,) in [-1, 1].
    """
    x, y, z = (n // 2 for n in grids[0].shape)
    values = np.stack([g.astype(np.float32).reshape(x, 2, y, 2, z, 2) for g in grids])
    values = values.mean((2, 4, 6))
    parts = (values - np.flip(values, axis + 1)).reshape(len(grids), -1)
    parts /= np.linalg.norm(parts, axis=1, keepdims=True).clip(1e-9)
    others = parts.sum(0) - parts
    return (parts * others).sum(1) / np.linalg.norm(others, axis=1).clip(1e-9)


def tells(likeness: np.ndarray) -> bool:
    """Whether a cohort is asymmetric enough to find one that is mirrored."""
    enough = len(likeness) >= FEWEST and np.median(likeness) >= ASYMMETRY
    return bool(enough and (likeness > 0).mean() >= AGREE)
