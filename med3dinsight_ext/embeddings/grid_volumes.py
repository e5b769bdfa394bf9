"""Stored feature grids as a volume of codes on any voxel grid, without a 3D network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from med3dinsight_ext.embeddings.entry import REMADE
from med3dinsight_ext.embeddings.whitening import decode
from med3dinsight_ext.io.reading import readable


def codes_on_grid(path: str | Path, affine: Tensor, shape: Sequence[int]) -> Tensor:
    """Codes of all planes and teacher layers at each voxel, linear between cells and slices.

    Args:
        path: a file of ``GridStore``.
        affine: (4, 4) voxel-to-world of the wanted grid; any orientation.
        shape: (x, y, z) of the wanted grid.

    Returns:
        (planes * layers * codes, x, y, z) float16; planes in order, of each its layers.
    """
    with readable("grids", path, REMADE):
        stored = load_file(path)
    layers = sorted(key for key in stored if key.startswith("codes."))
    size, spacing = stored["size"].tolist(), stored["spacing"].tolist()
    picture = int(stored["picture"])
    steps = [torch.arange(n, dtype=torch.float64) for n in shape]
    voxels = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
    move = torch.linalg.solve(stored["affine"], torch.as_tensor(affine).double())
    voxels = voxels @ move[:3, :3].mT + move[:3, 3]  # in the stored volume
    found = []
    for plane in stored["plane"].unique().long().tolist():
        rows = (stored["plane"] == plane).nonzero().flatten()
        index = (stored["position"][rows].double() * size[plane] - 0.5).round()
        order = index.argsort()
        across, up = (axis for axis in range(3) if axis != plane)
        where = [
            _picture_share(voxels[..., axis], axis, (across, up), size, spacing, picture)
            for axis in (across, up)
        ]
        depth = _between(voxels[..., plane].clamp(0, size[plane] - 1), index[order])
        depth = (2 * depth + 1) / len(rows) - 1
        points = torch.stack((2 * where[0] - 1, 2 * where[1] - 1, depth), -1).float()[None]
        for layer in layers:
            codes = decode(stored[layer][rows[order]])  # (s, cells, k)
            side = round(codes.shape[1] ** 0.5)
            stack = codes.unflatten(1, (side, side)).permute(3, 0, 1, 2)[None]
            value = F.grid_sample(stack, points, padding_mode="border", align_corners=False)
            found.append(value[0].half())
    return torch.cat(found)


def _picture_share(
    voxel: Tensor,
    axis: int,
    shown: Sequence[int],
    size: Sequence[int],
    spacing: Sequence[float],
    picture: int,
) -> Tensor:
    """Where a voxel coordinate lies along the side of a picture, 0 to 1: ``cell_voxels`` back."""
    longer = max(size[a] * spacing[a] for a in shown)
    filled = max(1, round(picture * size[axis] * spacing[axis] / longer))
    before = (picture - filled) // 2
    return (before + filled * (1 - (voxel + 0.5) / size[axis])) / picture


def _between(value: Tensor, known: Tensor) -> Tensor:
    """Fractional index of values among sorted known ones, linear between neighbours."""
    if len(known) == 1:
        return torch.zeros_like(value)
    right = torch.searchsorted(known, value.contiguous()).clamp(1, len(known) - 1)
    low, high = known[right - 1], known[right]
    return (right - 1 + (value - low) / (high - low)).clamp(0, len(known) - 1)
