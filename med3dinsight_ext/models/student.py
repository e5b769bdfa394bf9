"""Any 3D network as a student: PSAT reads its deepest features, its output reconstructs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from med3dinsight_ext.models.features import extract_features, find_features, first_output
from med3dinsight_ext.models.psat import PSAT


class StudentOutput(NamedTuple):
    """Output of a student.

    Attributes:
        tokens: one (b, s, d) tensor for each target space, not normalised.
        reconstruction: (b, 1, x, y, z); None in eval mode, or where the network's output is no
            volume.
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
        (b, 1, x, y, z) bool, True where hidden.
    """
    b, _, *size = volume.shape
    grid = [-(-n // block) for n in size]
    score = torch.rand(b, math.prod(grid), device=volume.device)
    hidden = score.argsort(1).argsort(1) < max(1, round(ratio * score.shape[1]))
    mask = hidden.view(b, 1, *grid)
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(block, axis).narrow(axis, 0, size[axis - 2])
    return mask


def hide(volume: Tensor, ratio: float, block: int) -> tuple[Tensor, Tensor | None]:
    """The volume with zeros in ``block_mask``, and that mask; None for ``ratio`` 0."""
    if not ratio:
        return volume, None
    mask = block_mask(volume, ratio, block)
    return volume.masked_fill(mask, 0), mask


class Student(nn.Module):
    """A 3D network, a PSAT on its deepest features, and one linear head for each target space.

    ``network`` stays as it is, so that its state dict is that of the same ``backbone`` in
    fine-tuning. It runs once a volume for any number of slices; in eval mode only up to its
    features.

    Args:
        network: any module that maps (b, 1, x, y, z) to something.
        psat: called with ``in_channels=`` the channels of the features, returns the PSAT.
        embedding_dims: name and length of each target space, {"image": d, "text": d} or
            {"joint": d}.
        patch_size: (x, y, z) of the input that the features are looked up with, in voxels.
        feature_layer: "auto" for the deepest features, or a module path in ``network``.
        mask_ratio: share of input blocks that are hidden in training, in [0, 1).
        mask_block: side of a hidden block, in voxels.

    Raises:
        ValueError: ``mask_ratio`` is out of range, or as `find_features`.

    Examples:
        >>> network = nn.Sequential(nn.Conv3d(1, 8, 4, stride=4), nn.ConvTranspose3d(8, 1, 4, 4))
        >>> student = Student(network, PSAT, {"image": 16}, patch_size=(16, 16, 8))
        >>> plane, position = torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]])
        >>> output = student(torch.zeros(1, 1, 16, 16, 8), plane, position)
        >>> output.tokens["image"].shape, output.reconstruction.shape
        (torch.Size([1, 2, 16]), torch.Size([1, 1, 16, 16, 8]))
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
        return extract_features(self.network, self.features, volume, stop=not self.training)

    def forward(self, volume: Tensor, plane: Tensor, position: Tensor) -> StudentOutput:
        """Tokens of the given slices; in training a reconstruction, if the output is a volume.

        Args:
            volume: (b, 1, x, y, z), intensities about [0, 1].
            plane: (b, s) long, 0 sagittal, 1 coronal, 2 axial.
            position: (b, s) fraction of the extent, in [0, 1].
        """
        shown, mask = hide(volume, self.mask_ratio * self.training, self.mask_block)
        features, output = self.encode(shown)
        token = self.psat(features, plane, position)
        tokens = {name: head(token) for name, head in self.heads.items()}
        output = first_output(output)
        whole = isinstance(output, Tensor) and output.shape == volume.shape
        return StudentOutput(tokens, output if whole else None, mask)
