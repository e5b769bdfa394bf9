"""SigLIP's sigmoid loss over the pairs of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.losses.pairs import check_pairs, cosine_matrix, excluded, sum_of_rows


def prior_bias(allowed: Tensor) -> Tensor:
    """The bias () that balances pairs and negatives while all cosines are near zero.

    Then a slice's own pair pulls the bias up by 1 - σ(β), and its k negatives pull it down by
    k σ(β). They are equal at σ(β) = 1 / (k + 1), the share of pairs, so at β = -log k. The paper's
    -10 is that of its batches, log 32767 = 10.4.

    Args:
        allowed: (n, n) bool, as in ``siglip_loss``; k is the mean over slices, at least 1.

    Example:
        >>> prior_bias(torch.ones(101, 101).bool())  # 100 negatives a slice
        tensor(-4.6052)
    """
    negatives = len(allowed) ** 2 - excluded(allowed).sum() - len(allowed)
    return -(negatives / len(allowed)).clamp(min=1).log()


def siglip_loss(
    student: Tensor, teacher: Tensor, log_scale: Tensor, bias: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of every pair, summed over a slice's pairs (arXiv:2303.15343).

    Args:
        student: (n, d) with n >= 2, of any length.
        teacher: (n, d), of any length.
        log_scale: () logarithm of the factor on the cosine.
        bias: () added to the logit.
        allowed: (n, n) bool, the pairs that count as negatives; the diagonal always counts.

    Raises:
        ValueError: as `check_pairs`.

    Examples:
        >>> zero = torch.zeros(())
        >>> loss = siglip_loss(torch.eye(3), torch.zeros(3, 3), zero, zero)
        >>> torch.allclose(loss, 3 * torch.tensor(2.0).log())  # three undecided pairs a slice
        True
    """
    check_pairs(student, teacher)
    number = torch.arange(len(student), device=student.device)
    left_out = None if allowed is None else excluded(allowed)

    def part(rows: slice) -> Tensor:
        logits = cosine_matrix(student[rows], teacher) * log_scale.exp() + bias
        own = number[rows, None] == number
        loss = -F.logsigmoid(torch.where(own, logits, -logits))
        if left_out is not None:
            loss = loss.masked_fill(left_out[rows], 0)
        return loss.sum()

    return sum_of_rows(part, len(student)) / len(student)
