"""Loss of volume-level teaching."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VolumeParts(NamedTuple):
    """What the history records."""

    total: Tensor


class VolumeLoss(nn.Module):
    """Smooth L1 distance between predicted and standardised features of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = VolumeParts(torch.zeros(()))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean over volumes and features, in float32; ``latest`` keeps it.

        Args:
            pred: (b, d).
            target: (b, d), of mean 0 and variance 1 over all volumes of the list.
        """
        loss = F.smooth_l1_loss(pred.float(), target.float())
        self.latest = VolumeParts(loss.detach())
        return loss
