"""Whitened PCA of feature maps, less what the position in the volume explains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 4.0  # codes are clipped to this many standard deviations
STEP = 127 / LIMIT  # of the int8 that is stored


def position_terms(fraction: Tensor) -> Tensor:
    """Quadratic polynomial of positions: (n, 3) fractions of the extent to (n, 10)."""
    x, y, z = (2 * fraction - 1).unbind(1)
    return torch.stack((torch.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z), 1)


class Whitening(NamedTuple):
    """From c features of one teacher layer to k codes of unit variance.

    mean: (3, 10, c), coefficients of ``position_terms`` for each plane. scale: (c,), standard
    deviation of the rest. basis: (c, k). explained: (2,), share of the features' variance that the
    position explains, and share of the rest that the codes hold.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    explained: Tensor

    def encode(self, features: Tensor, plane: Tensor, fraction: Tensor) -> Tensor:
        """Codes (n, k) int8, in steps of 1 / ``STEP`` standard deviations.

        Args:
            features: (n, c).
            plane: (n,) long.
            fraction: (n, 3) positions as fractions of the volume's extent.
        """
        rest = features.float()
        terms = position_terms(fraction.float())
        for p in plane.unique().tolist():
            rows = plane == p
            rest[rows] = rest[rows] - terms[rows] @ self.mean[p]
        codes = rest / self.scale @ self.basis
        return (codes * STEP).round().clamp(-127, 127).to(torch.int8)


def decode(codes: Tensor) -> Tensor:
    """Stored int8 codes as float32 of about unit variance."""
    return codes.float() / STEP


def fit_whitening(features: Tensor, plane: Tensor, fraction: Tensor, codes: int) -> Whitening:
    """Fit on a sample of cells.

    Args:
        features: (n, c).
        plane: (n,) long.
        fraction: (n, 3) positions as fractions of the volume's extent.
        codes: numbers a cell; fewer where the layer has fewer channels.

    Raises:
        ValueError: there are fewer cells than channels.
    """
    n, c = features.shape
    if n <= c:
        raise ValueError(f"cells must be more than {c} channels, got {n}; raise per_plane")
    terms, rest = position_terms(fraction.double()), features.double().clone()
    mean = torch.zeros(3, terms.shape[1], c, dtype=torch.double)
    for p in plane.unique().tolist():
        rows = plane == p
        gram = terms[rows].mT @ terms[rows]
        gram.diagonal().add_(1e-6 * rows.sum())
        mean[p] = torch.linalg.solve(gram, terms[rows].mT @ rest[rows])
        rest[rows] -= terms[rows] @ mean[p]
    total = (features.double() - features.double().mean(0)).square().sum()
    explained = 1 - rest.square().sum() / total.clamp(min=1e-12)
    scale = rest.square().mean(0).sqrt()
    scale = scale.clamp(min=float(scale.max()) * 1e-3 + 1e-12)
    value, vector = torch.linalg.eigh((rest / scale).mT @ (rest / scale) / n)
    value, vector = value.flip(0).clamp(min=0), vector.flip(1)
    k = min(codes, int((value > 1e-6 * value[0]).sum()))
    held = value[:k].sum() / value.sum().clamp(min=1e-12)
    basis = vector[:, :k] / value[:k].sqrt()
    return Whitening(
        mean.float(), scale.float(), basis.float(), torch.stack((explained, held)).float()
    )
