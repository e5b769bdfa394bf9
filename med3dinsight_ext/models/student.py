"""Any 3D network as a student: its deepest features feed PSAT, its output reconstructs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from med3dinsight_ext.models.features import features_of, find_features
from med3dinsight_ext.models.psat import PSAT


class StudentOutput(NamedTuple):
    """What a student says of a volume.

    tokens: one (b, s, d) tensor for each target space, not normalised.
    reconstruction: (b, 1, x, y, z); None in eval mode, or where the network's output is no volume.
    mask: (b, 1, x, y, z) bool, True where the input was hidden; None if nothing was.
    """

    tokens: dict[str, Tensor]
    reconstruction: Tensor | None
    mask: Tensor | None


def block_mask(volume: Tensor, ratio: float, block: int) -> Tensor:
    """Random blocks of voxels, the same number in each volume.

    Args:
        volume: (b, 1, x, y, z).
        ratio: share of the blocks, in [0, 1).
        block: side of a block in voxels; blocks at the far border may be smaller.

    Returns:
        (b, 1, x, y, z) bool, True = hidden.
    """
    b, _, *size = volume.shape
    grid = [-(-n // block) for n in size]
    score = torch.rand(b, math.prod(grid), device=volume.device)
    hidden = score.argsort(1).argsort(1) < round(ratio * score.shape[1])
    mask = hidden.view(b, 1, *grid)
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(block, axis).narrow(axis, 0, size[axis - 2])
    return mask


class Student(nn.Module):
    """A 3D network, the PSAT that asks it about slices, and one head for each target space.

    ``network`` is left as it is, so that its state dict is that of the same ``backbone`` in
    fine-tuning. It is called once a volume, however many slices are asked for; in eval mode only as
    far as its features.

    Args:
        network: any module that maps (b, 1, x, y, z) to something.
        psat: called with ``in_channels=`` the channels of the features, gives the PSAT.
        embedding_dims: name and length of each target space, {"image": d, "text": d} or
            {"joint": d}.
        patch_size: (x, y, z) of the input that the features are looked up with, in voxels.
        feature_layer: "auto" for the deepest features, or a module path in ``network``.
        mask_ratio: share of input blocks that are hidden in training, in [0, 1).
        mask_block: side of a hidden block, in voxels.
    """

    def __init__(
        self,
        network: nn.Module,
        psat: Callable[..., PSAT],
        embedding_dims: Mapping[str, int],
        patch_size: Sequence[int],
        feature_layer: str = "auto",
        mask_ratio: float = 0.3,
        mask_block: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}; 0 hides nothing")
        self.features = find_features(network, patch_size, feature_layer)
        self.network = network
        self.psat = psat(in_channels=self.features.channels)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(self.psat.out_channels, length)
                for name, length in embedding_dims.items()
            }
        )
        self.mask_ratio = mask_ratio
        self.mask_block = mask_block

    def encode(self, volume: Tensor) -> tuple[Tensor, Any]:
        """Features (b, c, x', y', z') of volumes (b, 1, x, y, z); in training the output, too."""
        return features_of(self.network, self.features, volume, stop=not self.training)

    def forward(self, volume: Tensor, plane: Tensor, position: Tensor) -> StudentOutput:
        """Tokens of the asked slices; in training a reconstruction, if the output is a volume.

        Args:
            volume: (b, 1, x, y, z), intensities about [0, 1].
            plane: (b, s) long, 0 sagittal, 1 coronal, 2 axial.
            position: (b, s) fraction of the extent, in [0, 1].
        """
        mask = None
        shown = volume
        if self.training and self.mask_ratio > 0:
            mask = block_mask(volume, self.mask_ratio, self.mask_block)
            shown = volume.masked_fill(mask, 0)
        features, output = self.encode(shown)
        token = self.psat(features, plane, position)
        tokens = {name: head(token) for name, head in self.heads.items()}
        if isinstance(output, (tuple, list)):
            output = output[0]
        whole = isinstance(output, Tensor) and output.shape == volume.shape
        return StudentOutput(tokens, output if whole else None, mask)
