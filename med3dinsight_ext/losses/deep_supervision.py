"""Deep supervision for the output formats of MONAI's networks."""

from __future__ import annotations

from collections.abc import Sequence

from monai.losses import DeepSupervisionLoss
from torch import Tensor


class DeepSupervision(DeepSupervisionLoss):
    """MONAI's `DeepSupervisionLoss`, which also takes the stacked output of DynUNet.

    A tensor (b, c, x, y, z) is one level, a list or tuple of them several, and so is a stack
    (b, levels, c, x, y, z).

    Examples:
        >>> import torch
        >>> loss = DeepSupervision(torch.nn.MSELoss())
        >>> loss(torch.ones(1, 2, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))  # 1 + 1/2
        tensor(1.5000)
    """

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Weighted sum of the loss over the levels; weights 1, 1/2, 1/4, … unless set."""
        if isinstance(input, Tensor) and input.ndim == target.ndim + 1:
            input = input.unbind(1)
        return super().forward(input, target)
