"""Recall at k of a ranking by cosine similarity, with ties at their expected rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IDENTICAL = 1e-5  # two targets whose cosine is this close to 1 are one, e.g. the same caption
TIE = 1e-6  # float32 noise of a cosine
CHUNK = 2**22  # similarities held at once


class Recall(NamedTuple):
    """Recall of each query and its chance level, (n, k) in [0, 1]; number of candidates (n,)."""

    recall: Tensor
    chance: Tensor
    candidates: Tensor


def recall_at_k(
    tokens: Tensor, targets: Tensor, group: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Rank the targets of a query's own group by cosine similarity to its token.

    A query's own target and those identical to it are right, all others wrong. Ties count at
    their expected rank, so constant tokens are at chance, not first by sort order. Chance is the
    expected recall of a random order; where captions repeat, always returning the commonest one
    can exceed it, which only a control (volume set to zero) shows.

    Args:
        tokens: (n, d) queries, any length.
        targets: (n, d) candidates, row i belongs to query i.
        group: (n,) long; only candidates with the query's number take part.
        ks: numbers of places that count.

    Raises:
        ValueError: the shapes differ, or a row is not finite.
    """
    if tokens.shape != targets.shape:
        raise ValueError(
            f"tokens and targets must share one shape (n, d), got {tuple(tokens.shape)} and "
            f"{tuple(targets.shape)}; build the student for this teacher's width"
        )
    for name, value in (("tokens", tokens), ("targets", targets)):
        bad = int((~value.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f"{name} must be finite, got NaN or Inf in {bad} of {len(value)} rows; "
                "look for the step where the loss diverged"
            )
    tokens, targets = F.normalize(tokens.float(), dim=1), F.normalize(targets.float(), dim=1)
    recall = torch.zeros(len(tokens), len(ks), dtype=torch.float64, device=tokens.device)
    chance, candidates = torch.zeros_like(recall), torch.zeros_like(group)
    for number in group.unique():
        members = (group == number).nonzero()[:, 0]
        pool = targets[members]
        for rows in members.split(max(1, CHUNK // len(members))):
            score = tokens[rows] @ pool.mT
            right = (targets[rows] @ pool.mT > 1 - IDENTICAL) | (rows[:, None] == members)
            best = score.masked_fill(~right, -2).amax(1, keepdim=True)
            above = (score > best + TIE).sum(1)
            level = (score - best).abs() <= TIE
            tied, first = (level & ~right).sum(1), (level & right).sum(1)
            same = right.sum(1)
            for column, k in enumerate(ks):
                recall[rows, column] = expected_recall(above, tied, first, k)
                chance[rows, column] = expected_recall(0 * same, len(members) - same, same, k)
            candidates[rows] = len(members)
    return Recall(recall, chance, candidates)


def expected_recall(above: Tensor, tied: Tensor, right: Tensor, k: int) -> Tensor:
    """Probability that a right candidate is among the first ``k`` when ties are broken at random.

    Args:
        above: (n,) wrong candidates that score higher than the best right one.
        tied: (n,) wrong candidates that score the same.
        right: (n,) right candidates with that score, >= 1.
        k: places.

    Returns:
        (n,) float64: 1 - C(tied, k - above) / C(tied + right, k - above).
    """
    above, tied, right = above.double(), tied.double(), right.double()
    miss = torch.ones_like(above)
    for place in range(k):
        wrong = ((tied - place) / (tied + right - place)).clamp(min=0)
        miss = torch.where(place < k - above, miss * wrong, miss)
    return 1 - miss
