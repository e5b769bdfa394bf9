"""Reconstruction error of hidden voxels."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mse(reconstruction: Tensor, volume: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the hidden voxels; over all of them without a mask.

    Args:
        reconstruction: (b, 1, x, y, z).
        volume: (b, 1, x, y, z).
        mask: (b, 1, x, y, z) bool, True where the network did not see the volume; where it is
            False everywhere the error is 0.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> volume = torch.zeros(1, 1, 2, 2, 2)
        >>> guess = torch.arange(8.0).view_as(volume)
        >>> masked_mse(guess, volume, mask=guess > 5)  # (6² + 7²) / 2
        tensor(42.5000)
    """
    total, count = squared_error(reconstruction, volume, mask)
    return total / count.clamp(min=1)


def squared_error(
    reconstruction: Tensor, volume: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum of the squared error over the hidden voxels, and their number; as `masked_mse`."""
    if reconstruction.shape != volume.shape:
        raise ValueError(
            f"reconstruction must have the shape of the volume {tuple(volume.shape)}, got "
            f"{tuple(reconstruction.shape)}; the network needs out_channels 1 and the input's size"
        )
    error = (reconstruction - volume).square()
    hidden = torch.ones_like(error) if mask is None else mask.to(error.dtype)
    return (error * hidden).sum(), hidden.sum()
