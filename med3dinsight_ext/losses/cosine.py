"""Cosine distance of pairs, without negatives."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity, in [0, 2]; each pair on its own.

    Args:
        student: (n, d) with n >= 2, of any length.
        teacher: (n, d), of any length.

    Raises:
        ValueError: as `check_pairs`.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> cosine_loss(student, torch.tensor([[1.0, 0.0], [0.0, -3.0]])).item()
        1.0
    """
    check_pairs(student, teacher)
    return (1 - F.cosine_similarity(student, teacher)).mean()
