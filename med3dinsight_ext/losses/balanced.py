"""Cross-entropy with a weight for each class, in batches of any size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class WeightedCrossEntropy(nn.Module):
    """The mean over the cases of their weighted cross-entropy.

    torch's divides by the weights that happen to be in the batch: with one case they cancel, and
    with few a rare class has less than its share.

    Args:
        weight: (classes,), with a mean over all cases of 1; None weighs them alike.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch: scores (b, classes) and classes (b,)."""
        return F.cross_entropy(input, target, self.weight, reduction="none").mean()
