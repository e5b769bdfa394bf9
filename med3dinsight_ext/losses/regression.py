"""Regression to the part of an embedding that plane and depth do not determine."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs


def regression_loss(student: Tensor, residual: Tensor) -> Tensor:
    """Mean squared error to standardised residuals: the unexplained share of their variance.

    Args:
        student: (n, d) estimates, n >= 2.
        residual: (n, d), from `Residual`.

    Raises:
        ValueError: as `check_pairs`.

    Examples:
        >>> residual = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> regression_loss(torch.zeros(2, 2), residual), regression_loss(residual, residual)
        (tensor(1.), tensor(0.))
    """
    check_pairs(student, residual)
    return F.mse_loss(student, residual)


class Residual(nn.Module):
    """Embeddings minus the mean at their plane and depth, each dimension divided by its deviation.

    Embeddings of similar slices have nearly one direction, and plane and depth determine most of
    the rest. Means and deviations are running ones, over all embeddings seen in training mode.

    Args:
        length: d of the embeddings.
        bins: parts of the extent, each with its own mean.
    """

    total: Tensor
    count: Tensor
    square: Tensor

    def __init__(self, length: int, bins: int = 8) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("total", torch.zeros(3 * bins, length))
        self.register_buffer("count", torch.zeros(3 * bins))
        self.register_buffer("square", torch.zeros(length))

    def forward(self, teacher: Tensor, plane: Tensor, position: Tensor) -> Tensor:
        """Residuals (n, d); in training mode the statistics are updated first.

        Args:
            teacher: (n, d) embeddings.
            plane: (n,) long: 0 sagittal, 1 coronal, 2 axial.
            position: (n,) fraction of the extent, in [0, 1].
        """
        cell = plane * self.bins + (position * self.bins).long().clamp(max=self.bins - 1)
        if self.training:
            self.total.index_add_(0, cell, teacher)
            self.count.index_add_(0, cell, torch.ones_like(position))
        rest = teacher - self.total[cell] / self.count[cell].clamp(min=1)[:, None]
        if self.training:
            self.square += rest.square().sum(0)
        return rest / (self.square / self.count.sum().clamp(min=1)).sqrt().clamp(min=1e-6)
