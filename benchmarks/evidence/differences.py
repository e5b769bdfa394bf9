"""Differences between arms, paired by case and by seed: intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from evidence.results import Record

DRAWS = 2000  # of the bootstrap
FLIPS = 10_000  # of the permutation test
FINE = ("task", "backbone", "variant", "score")  # fields that runs of a table share, beside labels
Interval = tuple[float, float]


class Outcome(NamedTuple):
    """Score of a run.

    Attributes:
        stream: seed of the bootstrap; one a task, so that tasks are drawn independently.
        names: of its n cases.
        value: mean Dice, or AUROC.
        drawn: (DRAWS,) bootstrap values of ``value``.
        second: mean NSD, or balanced accuracy.
        parts: (n,) Dice of each case, or its placement value (DeLong et al., 1988): the share of
            cases of the other class that are ranked correctly against it.
        positive: (n,) bool, of a classifier.
    """

    seed: int
    stream: int
    names: list[str]
    value: float
    drawn: Tensor
    second: float
    parts: Tensor
    positive: Tensor | None


class Cell(NamedTuple):
    """Runs that may be compared: they differ in arm and seed alone. labels: None is all."""

    budget: str
    task: str
    backbone: str
    variant: str
    score: str
    labels: int | None
    arms: dict[str, list[Outcome]]

    @property
    def table(self) -> tuple[str, ...]:
        """Fields that cells with other numbers of labels share."""
        return self.budget, self.task, self.backbone, self.variant, self.score


class Difference(NamedTuple):
    """Mean difference between two arms over the seeds that both have.

    Attributes:
        above: the mean.
        cases: 95 % interval over cases.
        both: 95 % interval over cases and seeds, drawn independently; NaN for one seed.
        p: of no difference over cases, for these trainings.
        seeds: difference of each seed.
        drawn: (DRAWS,) bootstrap values that ``both`` is the interval of.
    """

    above: float
    cases: Interval
    both: Interval
    p: float
    seeds: list[float]
    drawn: Tensor


@lru_cache(maxsize=64)
def counts(size: int, stream: int) -> Tensor:
    """(size, DRAWS) counts of bootstrap draws."""
    generator = torch.Generator().manual_seed(stream)
    drawn = torch.randint(size, (size, DRAWS), generator=generator)
    zeros = torch.zeros(size, DRAWS, dtype=torch.float64)
    return zeros.scatter_add(0, drawn, torch.ones(size, DRAWS, dtype=torch.float64))


@lru_cache(maxsize=64)
def signs(size: int) -> Tensor:
    """(FLIPS, size) random signs."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (FLIPS, size), generator=generator).double() * 2 - 1


def outcome(record: Record) -> Outcome:
    """Score of a run with its bootstrap values."""
    stream = crc32(record["task"].encode())
    rows = sorted(record["cases"], key=lambda row: row["case"])
    if "dice" in rows[0]:
        groups = {name: list(g) for name, g in groupby(rows, key=lambda row: row["case"])}
        nan = float("nan")
        dice = [[nan if r["dice"] is None else r["dice"] for r in g] for g in groups.values()]
        parts = torch.tensor(dice, dtype=torch.float64).nanmean(1)
        there = ~parts.isnan()  # a case without any class does not count

        def mean(weight: Tensor) -> Tensor:
            return (parts[there] @ weight[there]) / weight[there].sum(0)

        values = mean(torch.ones(len(parts), 1).double()), mean(counts(len(parts), stream))
        second = _metric(record, "mean", "nsd", "mean")
        return Outcome(
            record["seed"], stream, list(groups), float(values[0]), values[1], second, parts, None
        )
    names = record["settings"]["class_names"]
    positive = torch.tensor([row["label"] == names[-1] for row in rows])
    score = torch.tensor([row[f"p_{names[-1]}"] for row in rows], dtype=torch.float64)
    right = (
        (score[positive, None] - score[~positive]).sign() + 1
    ) / 2  # of each pair; a tie is a half
    parts = torch.empty_like(score)
    parts[positive], parts[~positive] = right.mean(1), right.mean(0)
    weight = counts(len(rows), stream)
    ours, others = weight[positive], weight[~positive]
    drawn = (ours * (right @ others)).sum(0) / (ours.sum(0) * others.sum(0))
    return Outcome(
        record["seed"],
        stream,
        [row["case"] for row in rows],
        float(right.mean()),
        drawn,
        _metric(record, "balanced_accuracy"),
        parts,
        positive,
    )


def _metric(record: Record, *keys: str) -> float:
    found: Any = record.get("metrics")
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return float("nan") if found is None else float(found)


def interval(values: Tensor) -> Interval:
    """The middle 95 % of values (b,)."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values.nanquantile(ends).tolist()
    return low, high


def level(outcomes: Sequence[Outcome]) -> tuple[float, Interval]:
    """Mean over seeds, and its interval over cases."""
    drawn = torch.stack([found.drawn for found in outcomes]).mean(0)
    return sum(found.value for found in outcomes) / len(outcomes), interval(drawn)


def difference(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Difference | None:
    """Paired by case and by seed; None where no seed has both.

    Raises:
        ValueError: they were evaluated on different cases.
    """
    one, two = ({found.seed: found for found in part} for part in (ours, theirs))
    seeds = sorted(one.keys() & two.keys())
    if not seeds:
        return None
    names = one[seeds[0]].names
    if any(part[s].names != names for part in (one, two) for s in seeds):
        raise ValueError("runs of a table must have scored the same cases; move odd ones away")
    apart = [one[s].value - two[s].value for s in seeds]
    drawn = torch.stack([one[s].drawn - two[s].drawn for s in seeds])
    parts = torch.stack([one[s].parts - two[s].parts for s in seeds]).mean(0)
    both = (drawn * counts(len(seeds), one[seeds[0]].stream + 1)).sum(0) / len(seeds)
    if len(seeds) == 1:
        both = torch.full_like(both, torch.nan)
    return Difference(
        sum(apart) / len(apart),
        interval(drawn.mean(0)),
        interval(both),
        p_value(parts, one[seeds[0]].positive),
        apart,
        both,
    )


def p_value(parts: Tensor, positive: Tensor | None) -> float:
    """Two-sided test over cases, after the mean over seeds.

    For Dice the signs of the cases' differences are flipped at random; for AUROC it is DeLong's.

    Args:
        parts: (n,) difference of each case.
        positive: (n,) bool, of a classifier.
    """
    if positive is not None:
        groups = parts[positive], parts[~positive]
        variance = sum(float(g.var() / len(g)) for g in groups)
        above = abs(float(groups[0].mean()))
        if variance > 0:
            return math.erfc(above / math.sqrt(2 * variance))
        return 0.0 if variance == 0 and above > 0 else 1.0
    known = parts[~parts.isnan()]
    flipped = (signs(len(known)) @ known).abs() >= known.sum().abs() * (1 - 1e-9)
    return (1 + int(flipped.sum())) / (1 + FLIPS)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm, 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        found[i] = largest
    return found


def cells(budget: str, records: Sequence[Record], arms: Sequence[str] = ()) -> list[Cell]:
    """Cells of a budget's fine-tuning runs; few labels first, arms in the order of ``arms``."""
    found: dict[Any, Cell] = {}
    fine = [r for r in records if "error" not in r and r["bundle"] != "pretrain"]
    rank = {arm: i for i, arm in enumerate(arms)}
    for record in sorted(fine, key=lambda r: (rank.get(r["arm"], len(rank)), r["seed"])):
        key = (*(record[name] for name in FINE), record["labels"])
        fields = {name: record[name] for name in FINE}
        cell = found.setdefault(key, Cell(budget, **fields, labels=record["labels"], arms={}))
        cell.arms.setdefault(record["arm"], []).append(outcome(record))
    return sorted(found.values(), key=lambda cell: (*cell.table, cell.labels or 10**9))
