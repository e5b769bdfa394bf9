"""Partial optimal transport between the slices and the embeddings of a batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs, cosine_matrix, excluded
from med3dinsight_ext.losses.transport import solve

DELTA = 1e-4  # keeps the Mahalanobis matrix positive definite


def mahalanobis(student: Tensor, teacher: Tensor, root: Tensor, delta: float = DELTA) -> Tensor:
    """Distances (n, m) under M = AᵀA + δI, by matrix products alone.

    Args:
        student: (n, d).
        teacher: (m, d).
        root: (d, d) A.
        delta: δ > 0; also keeps the square root's gradient finite at distance zero.
    """

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.mT

    total = squared(student @ root.mT, teacher @ root.mT) + delta * squared(student, teacher)
    return (total.clamp(min=0) + 1e-8).sqrt()


def partial_transport_loss(
    student: Tensor,
    teacher: Tensor,
    mass: float = 0.95,
    epsilon: float = 0.1,
    root: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Negative log of the transport plan's diagonal, -Σᵢ log(πᵢᵢ) / n (arXiv:2509.09064).

    The target is the whole identity, so leaving a pair out (mass < 1) is punished, not allowed:
    docs/method.md. What tolerates wrong pairs is a large ``epsilon``.

    Args:
        student: (n, d) with n >= 2, of any length.
        teacher: (n, d), of any length.
        mass: share of the mass to move, in (0, 1].
        epsilon: strength of the entropy, > 0, in units of the largest cost.
        root: (d, d) for the Mahalanobis cost; None for the cosine cost.
        allowed: (n, n) bool, the pairs that may be matched; others get the largest cost.

    Raises:
        ValueError: as `check_pairs`, or ``mass`` or ``epsilon`` is out of range.

    Examples:
        >>> import torch
        >>> loss = partial_transport_loss(torch.eye(4), torch.eye(4), mass=1, epsilon=0.01)
        >>> round(loss.exp().item(), 3)  # the plan is the identity / 4
        4.0
    """
    check_pairs(student, teacher)
    if root is None:
        cost = (1 - cosine_matrix(student, teacher)) / 2  # in [0, 1]
    else:
        cost = mahalanobis(F.normalize(student, dim=1), F.normalize(teacher, dim=1), root)
        cost = cost / cost.amax()  # above 0
    if allowed is not None:
        cost = cost.masked_fill(excluded(allowed), 1.0)
    return -solve(cost[None], mass, epsilon).log_plan[0].diagonal().mean()
