"""InfoNCE over the pairs of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs, cosine_matrix, excluded


def info_nce_loss(
    student: Tensor, teacher: Tensor, temperature: float = 0.07, allowed: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy over the cosine matrix (Oord et al., 2018, arXiv:1807.03748).

    Args:
        student: (n, d) with n >= 2, of any length.
        teacher: (n, d), of any length.
        temperature: divides the cosines, > 0.
        allowed: (n, n) bool, the pairs that count as negatives; the diagonal always counts.

    Raises:
        ValueError: as `check_pairs`.

    Examples:
        >>> student, teacher = torch.eye(4), torch.zeros(4, 4)
        >>> info_nce_loss(student, teacher) == torch.tensor(4.0).log()  # chance
        tensor(True)
    """
    check_pairs(student, teacher)
    logits = cosine_matrix(student, teacher) / temperature
    if allowed is not None:
        logits = logits.masked_fill(excluded(allowed), -math.inf)
    label = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.mT, label)) / 2
