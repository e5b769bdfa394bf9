"""Segmentation loss on hard and soft labels alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 0.995  # of a soft label's probabilities, so that it is told from a hard one


class SoftDiceCELoss(nn.Module):
    """Cross-entropy and Dice against class probabilities, weighted by their confidence.

    A voxel weighs (p - 1/2) * 2, at least 0, with p its most probable class: 1 for a label that a
    person drew, 0 where the source of soft labels cannot decide or says nothing (all zero).

    Args:
        soft_weight: factor on volumes without a certain voxel: those of soft labels, which end at
            ``MOST``.
    """

    def __init__(self, soft_weight: float = 1.0) -> None:
        super().__init__()
        if soft_weight < 0:
            raise ValueError(f"soft_weight must be >= 0, got {soft_weight}; 0 ignores soft labels")
        self.soft_weight = soft_weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            input: (b, classes, x, y, z) logits.
            target: (b, classes, x, y, z) probabilities.
        """
        if input.shape != target.shape:
            raise ValueError(
                f"target must have the shape of the logits {tuple(input.shape)}, got "
                f"{tuple(target.shape)}; load labels by SoftLabeld"
            )
        logits, goal = input.float(), target.float()
        weight = (2 * goal.amax(1, keepdim=True) - 1).clamp(min=0)
        entropy = -(goal * logits.log_softmax(1)).sum(1, keepdim=True)
        p = logits.softmax(1)
        found = []
        soft = goal.flatten(1).amax(1) <= MOST + 1e-3
        for rows, factor in ((~soft, 1.0), (soft, self.soft_weight)):
            if rows.any() and factor:
                w = weight[rows]
                ce = (entropy[rows] * w).mean()
                both = (p[rows] * goal[rows] * w).sum((0, 2, 3, 4))
                each = ((p[rows] + goal[rows]) * w).sum((0, 2, 3, 4))
                dice = (1 - (2 * both + 1e-5) / (each + 1e-5)).mean()
                found.append(factor * rows.float().mean() * (ce + dice))
        return torch.stack(found).sum() if found else input.sum() * 0
