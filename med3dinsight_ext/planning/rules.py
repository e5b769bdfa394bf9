"""Rules for spacing, patch and network, after nnU-Net (Isensee et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ANISOTROPIC = 3.0  # a coarse axis has so many times the spacing, and so many times fewer voxels
COVER = 0.25  # share of the median volume that a patch shows at least
SHORTEST = 8  # voxels of a patch along an axis
COARSEST = 4  # voxels of the deepest features along an axis that was halved


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> list[float]:
    """Median spacing; on a coarse axis the 10th percentile; isotropic up to a factor of two.

    Axes of less than twice the finest spacing are resampled to it: the networks here halve the grid
    in their first layer, so that what is kept of it decides the detail.

    Args:
        spacings: (n, 3) mm.
        shapes: (n, 3) voxels.

    Examples:
        >>> target_spacing(np.array([[1, 1, 2], [1, 1, 4], [1, 1, 6.0]]), np.array([[90, 90, 15]]))
        [1.0, 1.0, 2.4]
        >>> target_spacing(np.array([[3.9, 3.9, 2.5]]), np.array([[100, 60, 80]]))
        [2.5, 2.5, 2.5]
    """
    spacing, shape = np.median(spacings, 0), np.median(shapes, 0)
    worst = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != worst]
    coarse = spacing[worst] > ANISOTROPIC * spacing[others].max()
    if coarse and shape[worst] * ANISOTROPIC < shape[others].min():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), spacing[others].max())
    spacing = np.where(spacing < 2 * spacing.min(), spacing.min(), spacing)
    return [_short(mm) for mm in spacing]


def fitting_patch(
    shape: Sequence[float], spacing: Sequence[float], voxels: int, levels: int
) -> tuple[list[int], list[list[int]]]:
    """Patch with the proportions of a volume, and the strides of a network's levels.

    Args:
        shape: voxels of the median volume.
        spacing: mm of these voxels; an axis is halved only while its spacing is less than twice
            the finest.
        voxels: that a patch has at most.
        levels: halvings of the network.

    Examples:
        >>> fitting_patch((35, 51, 36), (1, 1, 1), 330_000, 3)
        ([40, 56, 40], [[2, 2, 2], [2, 2, 2], [2, 2, 2]])
        >>> fitting_patch((256, 256, 20), (0.6, 0.6, 4.0), 250_000, 3)
        ([112, 112, 20], [[2, 2, 1], [2, 2, 1], [2, 2, 2]])
    """
    size = np.array(shape, float)
    for _ in range(200):  # shorten the longest axes first, as a volume's short ones are all seen
        if size.prod() <= voxels:
            break
        longest = size >= size.max() - 1e-9
        size[longest] *= 0.97
    mm, strides = np.array(spacing, float), []
    factor: np.ndarray = np.ones(3, int)
    for _ in range(levels):
        halved = (mm < 2 * mm.min() + 1e-6) & (size / (2 * factor) >= COARSEST)
        step = np.where(halved, 2, 1)
        mm, factor = mm * step, factor * step
        strides.append([int(n) for n in step])
    whole = np.prod(shape) <= voxels
    cells = np.ceil(size / factor) if whole else np.maximum(np.round(size / factor), 1)
    return [int(max(n, SHORTEST)) for n in cells * factor], strides


def covering_spacing(
    shape: Sequence[float], spacing: Sequence[float], voxels: int, cover: float = COVER
) -> list[float]:
    """Spacing at which a patch shows a share of the volume; the finest axes are made coarser first.

    Args:
        shape: voxels of the median volume at ``spacing``.
        spacing: mm.
        voxels: of a patch.
        cover: share of the volume.
    """
    mm, size = np.array(spacing, float), np.array(shape, float)
    while voxels < cover * size.prod():
        finer = mm < 2 * mm.min()
        size, mm = np.where(finer, size / 1.03, size), np.where(finer, mm * 1.03, mm)
    return [_short(x) for x in mm]


def _short(mm: float) -> float:
    """Hundredths of a millimetre, or three digits of less: micro-CT has spacings of 0.004 mm."""
    return round(float(mm), 2) if mm >= 0.1 else float(f"{mm:.3g}")


def unet(
    filters: int, levels: int, strides: list[list[int]], norm: str = "INSTANCE"
) -> dict[str, Any]:
    """Config of a residual U-Net whose width doubles at each level, up to 320."""
    widths = [min(filters * 2**i, 320) for i in range(levels + 1)]
    return {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@out_channels",
        "channels": widths,
        "strides": strides,
        "num_res_units": 2,
        "norm": norm,
    }


def steps_for(voxels: int, budget: float, least: int, most: int) -> int:
    """Training steps of a number of voxels each that see ``budget`` voxels together."""
    return int(min(max(math.ceil(budget / voxels / 50) * 50, least), most))
