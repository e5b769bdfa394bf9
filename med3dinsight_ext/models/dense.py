"""Any 3D network as a dense student: its levels predict the teacher's codes at points."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from med3dinsight_ext.models.features import first_output, pyramid_of
from med3dinsight_ext.models.pyramid import find_pyramid, sample_points
from med3dinsight_ext.models.student import hide

logger = logging.getLogger(__name__)


class DenseOutput(NamedTuple):
    """Predictions of a dense student.

    codes: for each level of the network and in it for each teacher layer (b, p, k).
    hidden: (b, layers, p) bool, True where the input was hidden at the point; None if none was.
    reconstruction: (b, 1, x, y, z); None in eval mode or where the output is no volume.
    mask: (b, 1, x, y, z) bool, True where the input was hidden; None if none was.
    """

    codes: list[list[Tensor]]
    hidden: Tensor | None
    reconstruction: Tensor | None
    mask: Tensor | None


class DenseStudent(nn.Module):
    """A 3D network with a linear head for each of its levels and each teacher layer.

    Masked feature modelling as in MaskFeat (Wei et al., 2022, arXiv:2112.09133) and EVA (Fang et
    al., 2022, arXiv:2211.07636), with the features of a 2D teacher. A head is a 1x1x1 convolution
    that is evaluated at the points alone. ``network`` is left as it is, so that its state dict is
    that of the same ``backbone`` in fine-tuning.

    Args:
        network: any module that maps (b, 1, x, y, z) to something.
        dims: codes of each teacher layer.
        patch_size: (x, y, z) of the input that the levels are looked up with, in voxels.
        feature_layers: "auto" (``find_pyramid``), or module paths in ``network``.
        levels: levels that "auto" takes at most, from the finest.
        mask_ratio: share of input blocks that are hidden in training, in [0, 1).
        mask_block: side of a hidden block, in voxels.
    """

    def __init__(
        self,
        network: nn.Module,
        dims: Sequence[int],
        patch_size: Sequence[int],
        feature_layers: str | Sequence[str] = "auto",
        levels: int = 3,
        mask_ratio: float = 0.3,
        mask_block: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}; 0 hides nothing")
        self.levels = find_pyramid(network, patch_size, feature_layers, levels)
        levels_found = ", ".join(f"{level.layer} {level.grid}" for level in self.levels)
        logger.info(f"dense levels of the backbone: {levels_found}")
        self.network = network
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(level.channels, length) for length in dims)
            for level in self.levels
        )
        self.mask_ratio, self.mask_block = mask_ratio, mask_block

    def forward(self, volume: Tensor, points: Tensor) -> DenseOutput:
        """Codes at the points; in training also a reconstruction, if the output is a volume.

        Args:
            volume: (b, 1, x, y, z), intensities about [0, 1].
            points: (b, layers, p, 3) voxel coordinates.
        """
        shown, mask = hide(volume, self.mask_ratio * self.training, self.mask_block)
        hidden = None if mask is None else hidden_at(mask, points)
        features, output = pyramid_of(self.network, self.levels, shown)
        flat = points.flatten(1, 2)
        codes = []
        for value, heads in zip(features, self.heads, strict=True):
            there = sample_points(value, flat, volume.shape[2:]).unflatten(1, points.shape[1:3])
            codes.append([head(there[:, n]) for n, head in enumerate(heads)])
        output = first_output(output)
        whole = self.training and isinstance(output, Tensor) and output.shape == volume.shape
        return DenseOutput(codes, hidden, output if whole else None, mask)


def hidden_at(mask: Tensor, points: Tensor) -> Tensor:
    """Whether the voxel at each point is hidden: (b, layers, p) bool.

    Args:
        mask: (b, 1, x, y, z) bool.
        points: (b, layers, p, 3) voxel coordinates inside the volume.
    """
    last = torch.tensor(mask.shape[2:], device=points.device) - 1
    x, y, z = points.round().long().clamp(min=0).minimum(last).unbind(-1)
    batch = torch.arange(len(mask), device=points.device)[:, None, None]
    return mask[batch, 0, x, y, z]
