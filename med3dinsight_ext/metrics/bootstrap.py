"""Bootstrap percentile intervals (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**22  # resampled items held at once


class Interval(NamedTuple):
    """A mean and its bootstrap interval; ``low`` and ``high`` are NaN if there is one cluster."""

    mean: float
    low: float
    high: float


def resamples(n: int, draws: int, seed: int = 0) -> Iterator[Tensor]:
    """Indices in [0, n) drawn with replacement: (draws, n), yielded in chunks of rows.

    Args:
        n: items, each row draws as many.
        draws: resamplings.
        seed: of a generator of its own; the global random state stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.arange(draws).split(max(1, CHUNK // n)):
        yield torch.randint(n, (len(rows), n), generator=generator)


def percentiles(values: Tensor, low: float = 0.025, high: float = 0.975) -> tuple[float, float]:
    """Two quantiles of resampled statistics (draws,), without those that are NaN."""
    ends = values.nanquantile(torch.tensor([low, high], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def bootstrap(
    values: Tensor, cluster: Tensor, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``values`` and its percentile interval when whole clusters are resampled.

    Args:
        values: (n,) one a query, or one a volume.
        cluster: (n,) long, the independent unit: the volume, or the patient with several volumes.
        draws: resamplings.
        level: coverage of the interval, in (0, 1).
        seed: of `resamples`.

    Examples:
        >>> volume = torch.arange(40) // 4  # four slices each
        >>> found = bootstrap((volume % 2).float(), volume)
        >>> found.mean, round(found.low, 1), round(found.high, 1)
        (0.5, 0.2, 0.8)
    """
    values, cluster = values.double().cpu(), cluster.cpu()
    _, index, count = cluster.unique(return_inverse=True, return_counts=True)
    if len(count) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    total = torch.zeros(len(count), dtype=torch.float64).index_add(0, index, values)
    means = [total[i].sum(1) / count[i].sum(1) for i in resamples(len(count), draws, seed)]
    ends = percentiles(torch.cat(means), (1 - level) / 2, (1 + level) / 2)
    return Interval(float(values.mean()), *ends)
