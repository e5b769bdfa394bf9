"""InfoNCE over the pairs of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs, cosine_matrix, excluded, sum_of_rows


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
    left_out = None if allowed is None else excluded(allowed)
    there = _retrieval(student, teacher, temperature, left_out)
    back = _retrieval(teacher, student, temperature, None if left_out is None else left_out.mT)
    return (there + back) / 2


def _retrieval(
    queries: Tensor, keys: Tensor, temperature: float, left_out: Tensor | None
) -> Tensor:
    """Mean cross-entropy () of each query's own key among all that are not left out (n, n)."""
    label = torch.arange(len(queries), device=queries.device)

    def part(rows: slice) -> Tensor:
        logits = cosine_matrix(queries[rows], keys) / temperature
        if left_out is not None:
            logits = logits.masked_fill(left_out[rows], -math.inf)
        return F.cross_entropy(logits, label[rows], reduction="sum")

    return sum_of_rows(part, len(queries)) / len(queries)
