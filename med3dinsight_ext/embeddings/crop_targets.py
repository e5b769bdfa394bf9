"""Slice targets of the part of each slice that a crop shows, pooled from the feature grids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from med3dinsight_ext.embeddings.grid_targets import GEOMETRY, SampleGridsd, within
from med3dinsight_ext.embeddings.grids import open_grids, slice_voxels
from med3dinsight_ext.embeddings.targets import map_positions, patient_index
from med3dinsight_ext.embeddings.whitening import decode


class SampleCropsd(SampleGridsd):
    """Adds the targets of some slices of each volume, of what is left of them in a crop.

    The target is the mean of the stored codes over the cells whose centre the crop shows, as the
    tower's embedding is the mean over all cells: the embedding of a whole slice asks a student for
    what it cannot see. Codes have no share that position explains. It belongs behind every spatial
    transform; adds what ``SampleTargetsd`` adds, without texts.

    Args:
        keys: the image, a MetaTensor (1, x, y, z).
        layers: teacher layers in the file; their means stand side by side.
        slices: slices a volume, >= 1, padded if there are fewer or none; None takes all in order,
            and a row of padding where there are none.

    Raises:
        TypeError: the image is no MetaTensor.
        ValueError: the item names no grids.
    """

    def __init__(self, keys: str, layers: int, slices: int | None = 16) -> None:
        super().__init__(keys, layers, slices=1 if slices is None else slices)
        self.count = slices

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        plane, position, means = self.crop_means(data)
        with open_grids(data["grids"]) as file:
            modality = file.get_tensor("modality").long()
        count = max(len(plane), 1) if self.count is None else self.count
        valid = torch.arange(count) < len(plane)
        pad = count - len(plane)
        return {
            **data,
            "plane": F.pad(plane, (0, pad)),
            "position": F.pad(position, (0, pad)),
            "modality_index": modality.expand(count),
            "image_target": F.pad(F.normalize(means, dim=1), (0, 0, 0, pad)),
            "text_target": torch.zeros(count, 0),
            "has_text": torch.zeros(count, dtype=torch.bool),
            "valid": valid,
            "patient_index": patient_index(data, "grids").expand(count),
        }

    def crop_means(self, data: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Plane (s,) and position (s,) in the crop of drawn slices, and their mean codes (s, k)."""
        image = self.image(data)
        with open_grids(data["grids"]) as file:
            geometry = {key: file.get_tensor(key) for key in GEOMETRY}
            stored = [file.get_slice(f"codes.{n}") for n in range(self.layers)]
            every = torch.arange(len(geometry["plane"]))
            shown = [
                self._shown(geometry, every, round(x.get_shape()[1] ** 0.5), image) for x in stored
            ]
            usable = torch.stack([cells.any(1) for cells in shown]).all(0).nonzero().flatten()
            if self.count is not None:
                order = torch.from_numpy(self.R.permutation(len(usable)))
                usable = usable[order[: self.count]].sort().values
            means = [torch.zeros(len(usable), x.get_shape()[2]) for x in stored]
            for mean, x, cells in zip(means, stored, shown, strict=True):
                for n, row in enumerate(usable):
                    mean[n] = decode(x[int(row)])[cells[row]].mean(0)
        plane, position = map_positions(
            geometry["plane"].long()[usable],
            geometry["position"][usable],
            geometry["size"],
            geometry["affine"],
            image.affine,
            image.shape[1:],
        )
        return plane, position.clamp(0, 1), torch.cat(means, 1)

    def _shown(
        self, geometry: dict[str, Tensor], rows: Tensor, side: int, image: MetaTensor
    ) -> Tensor:
        """Whether the crop shows the centres of cells: (s, cells), never those over padding."""
        size = geometry["size"].tolist()
        stored = slice_voxels(
            geometry["plane"].long()[rows],
            geometry["position"][rows],
            size,
            geometry["spacing"].tolist(),
            side,
            int(geometry["picture"]),
        )
        moved = self.voxels(geometry, rows, side, image)
        return within(stored, size) & within(moved, image.shape[1:])
