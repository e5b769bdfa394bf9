"""Checks and cosines of pairs: row i of the student belongs to row i of the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 4096**2  # entries of a matrix of pairs that are in memory at a time: 64 MB in float32


def check_pairs(student: Tensor, teacher: Tensor) -> None:
    """Check that there are n >= 2 pairs of vectors of one length.

    Raises:
        ValueError: the shapes differ or are not (n, d), or n is below two: one pair has no
            negatives, so its loss is constant.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"student and teacher must share one shape (n, d), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; build the student with the store's embedding_dims"
        )
    if len(student) < 2:
        raise ValueError(
            f"pairs must be at least two, got {len(student)}; raise slices or batch_size"
        )


def cosine_matrix(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine similarities (n, n) of every row of ``student`` with every row of ``teacher``."""
    return F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).mT


def excluded(allowed: Tensor) -> Tensor:
    """Pairs (n, n) that a loss leaves out: those not ``allowed``, but never the diagonal."""
    return ~(allowed | torch.eye(len(allowed), dtype=torch.bool, device=allowed.device))


def sum_of_rows(part: Callable[[slice], Tensor], n: int) -> Tensor:
    """The sum () of ``part`` over blocks of the rows of an (n, n) matrix.

    Above 4096 pairs the gradient computes each block again, so that one block is in memory at a
    time.

    Args:
        part: sum () of what some rows add to a loss.
        n: pairs.
    """
    rows = max(1, BLOCK // n)
    if rows >= n:
        return part(slice(0, n))
    parts = [
        checkpoint(part, slice(i, i + rows), use_reentrant=False, preserve_rng_state=False)
        for i in range(0, n, rows)
    ]
    return torch.stack(parts).sum()
