"""Contrastive loss between two views of each picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from med3dinsight_ext.losses.info_nce import info_nce_loss


class ViewLoss(nn.Module):
    """InfoNCE with the two views of a slice as a pair and the other slices as negatives.

    It is SimCLR's loss (Chen et al., 2020, arXiv:2002.05709) without negatives within a view. A
    slice that is in the batch twice is no negative of itself.

    Args:
        temperature: divides the cosines, > 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; 0.1 is the default")
        self.temperature = temperature

    def forward(self, projected: Tensor, slices: Tensor) -> Tensor:
        """Mean over the pairs, in float32.

        Args:
            projected: (n, 2, d), both views of each slice.
            slices: (…, k), n rows in all; equal rows are the same slice.
        """
        rows = slices.flatten(0, -2)
        other = (rows[:, None] != rows[None]).any(2)
        with torch.autocast(projected.device.type, enabled=False):
            one, two = projected.float().unbind(1)
            return info_nce_loss(one, two, self.temperature, other)
