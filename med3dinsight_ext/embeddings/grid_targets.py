"""Samples the teacher's codes at points of the volume as augmentation left it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.engines.utils import PrepareBatch
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from med3dinsight_ext.embeddings.grids import open_grids, slice_voxels
from med3dinsight_ext.embeddings.whitening import decode

GEOMETRY = ("plane", "position", "affine", "size", "spacing", "picture")


class GridTargets(NamedTuple):
    """The teacher's codes at points of a batch of volumes.

    codes: one (b, p, k) for each teacher layer, of about unit variance.
    valid: one (b, p) bool for each layer, False where a row is padding.
    points: (b, layers, p, 3) voxel coordinates in ``volume``; 0 is the centre of the first voxel.
    volume: (b, 1, x, y, z), what the student gets.
    """

    codes: list[Tensor]
    valid: list[Tensor]
    points: Tensor
    volume: Tensor


class SampleGridsd(MapTransform, Randomizable):
    """Adds the teacher's codes at random points of each volume, placed where the volume is by then.

    Points go through the affines, so flips, crops, resampling, rotations and oblique volumes are
    exact. It belongs behind every spatial transform. Adds ``points`` (layers, p, 3), and for each
    layer n ``codes_n`` (p, k) and ``valid_n`` (p,); an item's ``grids`` names its file.

    Args:
        keys: the image, a MetaTensor (1, x, y, z), intensities about [0, 1].
        layers: teacher layers in the file.
        points: points a volume and layer; fewer in the crop are padded.
        slices: slices that they are drawn from, so that little of the file is read.
        threshold: a point whose voxel is not brighter shows background and is left out.
    """

    def __init__(
        self, keys: str, layers: int, points: int = 1024, slices: int = 16, threshold: float = 0.02
    ) -> None:
        super().__init__(keys)
        if points < 1 or slices < 1:
            raise ValueError(f"points and slices must be at least 1, got {points} and {slices}")
        self.layers, self.points, self.slices = layers, points, slices
        self.threshold = threshold

    def image(self, data: dict[str, Any]) -> MetaTensor:
        """The volume of an item, which must name its grids."""
        image = data[self.keys[0]]
        if not isinstance(image, MetaTensor):
            raise TypeError(
                f"image must be a MetaTensor, got {type(image).__name__}; load it by LoadImaged"
            )
        if "grids" not in data:
            raise ValueError(
                "items must name their feature grids, got none; pass them through GridStore.fill"
            )
        return image

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = self.image(data)
        found = dict(data)
        points = []
        with open_grids(data["grids"]) as file:
            geometry = {key: file.get_tensor(key) for key in GEOMETRY}
            rows = self._slices_inside(geometry, image)
            for n in range(self.layers):
                stored = file.get_slice(f"codes.{n}")
                side = round(stored.get_shape()[1] ** 0.5)
                voxels = self.voxels(geometry, rows, side, image)
                row, cell = self._draw(voxels, image)
                codes = [decode(stored[int(rows[r])])[cell[row == r]] for r in row.unique()]
                pad = self.points - len(row)
                point = torch.cat(
                    [voxels[r, cell[row == r]] for r in row.unique()] or [voxels[:0, 0]]
                )
                value = torch.cat(codes) if codes else torch.zeros(0, stored.get_shape()[2])
                points.append(torch.cat((point.float(), torch.zeros(pad, 3))))
                found[f"codes_{n}"] = torch.cat((value, torch.zeros(pad, value.shape[1])))
                found[f"valid_{n}"] = torch.arange(self.points) < len(row)
        return {**found, "points": torch.stack(points)}

    def voxels(
        self, geometry: dict[str, Tensor], rows: Tensor, side: int, image: MetaTensor
    ) -> Tensor:
        """Voxel coordinates in ``image`` of the cells of the slices ``rows``: (s, cells, 3)."""
        voxels = slice_voxels(
            geometry["plane"].long()[rows],
            geometry["position"][rows],
            geometry["size"].tolist(),
            geometry["spacing"].tolist(),
            side,
            int(geometry["picture"]),
        )
        affine = torch.as_tensor(image.affine).as_subclass(Tensor).double().cpu()
        step = torch.linalg.solve(affine, geometry["affine"])  # stored voxel -> image voxel
        return voxels @ step[:3, :3].mT + step[:3, 3]

    def _slices_inside(self, geometry: dict[str, Tensor], image: MetaTensor) -> Tensor:
        """Rows of at most ``slices`` random slices that cross the image."""
        voxels = self.voxels(geometry, torch.arange(len(geometry["plane"])), 16, image)
        crosses = within(voxels, image.shape[1:]).any(1).nonzero().flatten()
        order = torch.from_numpy(self.R.permutation(len(crosses)))
        return crosses[order[: self.slices]].sort().values

    def _draw(self, voxels: Tensor, image: MetaTensor) -> tuple[Tensor, Tensor]:
        """Row and cell of at most ``points`` cells inside the image that show tissue."""
        inside = within(voxels, image.shape[1:])
        row, cell = inside.nonzero(as_tuple=True)
        x, y, z = voxels[row, cell].round().long().unbind(1)
        bright = image.as_tensor()[0, x, y, z] > self.threshold
        row, cell = row[bright], cell[bright]
        pick = torch.from_numpy(self.R.permutation(len(row))[: self.points])
        return row[pick], cell[pick]


def within(voxels: Tensor, size: Sequence[int]) -> Tensor:
    """Whether voxel coordinates (..., 3) lie in a volume of ``size`` (x, y, z)."""
    limit = torch.tensor(size, dtype=torch.float64) - 0.5
    return ((voxels >= -0.499) & (voxels < limit - 1e-3)).all(-1)


class PrepareGrids(PrepareBatch):
    """Batch from ``SampleGridsd`` to (volume, targets, (points,), {}) on the device."""

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, GridTargets, tuple[Tensor], dict[str, Any]]:
        def get(key: str) -> Tensor:
            value = batchdata[key].as_subclass(Tensor)  # the network needs no metadata
            return value.to(device=device, non_blocking=non_blocking, **kwargs)

        volume, points = get("image"), get("points")
        layers = range(points.shape[1])
        targets = GridTargets(
            [get(f"codes_{n}") for n in layers], [get(f"valid_{n}") for n in layers], points, volume
        )
        return volume, targets, (points,), {}
