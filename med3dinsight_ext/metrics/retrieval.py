"""How well tokens find their slice among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.handlers import from_engine
from torch import Tensor
from torch.nn import functional as F

SPACES = ("image", "text")
IDENTICAL = 1e-5  # two targets whose cosine is this close to 1 are one, e.g. the same caption
TIE = 1e-6  # float32 noise of a cosine
CHUNK = 2**22  # similarities held at once


class Hits(NamedTuple):
    """What each query found: recall and its chance level, (n, k) in [0, 1]; candidates (n,)."""

    recall: Tensor
    chance: Tensor
    candidates: Tensor


class Slices(NamedTuple):
    """n slices: tokens (n, d), targets (n, d); plane, position, modality, volume (n,), numbered."""

    tokens: Tensor
    targets: Tensor
    plane: Tensor
    position: Tensor
    modality: Tensor
    volume: Tensor


class Interval(NamedTuple):
    """A mean and its bootstrap interval; ``low`` and ``high`` are NaN if there is one cluster."""

    mean: float
    low: float
    high: float


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


def depth_group(plane: Tensor, position: Tensor, bins: int) -> Tensor:
    """One number for each plane and depth bin, so that equal numbers may be compared.

    Args:
        plane: (n,) long: 0 sagittal, 1 coronal, 2 axial.
        position: (n,) fraction of the extent, in [0, 1].
        bins: equal parts of the extent.
    """
    return plane * bins + (position * bins).long().clamp(0, bins - 1)


def hits(tokens: Tensor, targets: Tensor, group: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Hits:
    """Rank the targets of a query's own group by cosine similarity to its token.

    A query's own target and those identical to it are right, all others wrong. Ties count at
    their expected rank, so a student that says nothing is at chance, not first by sort order.
    Chance is the expected recall of a random order; where captions repeat, always answering with
    the commonest one can exceed it, which only a control (volume set to zero) shows.

    Args:
        tokens: (n, d) queries, any length.
        targets: (n, d) candidates, row i belongs to query i.
        group: (n,) long; only candidates with the query's number take part.
        ks: places that count.
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
    return Hits(recall, chance, candidates)


def bootstrap(
    values: Tensor, cluster: Tensor, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``values`` and its percentile interval when whole clusters are drawn again.

    Args:
        values: (n,) one a query, or one a volume.
        cluster: (n,) long, what is independent: the volume, or the patient if one has several.
        draws: resamplings.
        level: share of them inside the interval, in (0, 1).
        seed: of the resampling, which leaves the global random state alone.
    """
    values, cluster = values.double().cpu(), cluster.cpu()
    _, index, count = cluster.unique(return_inverse=True, return_counts=True)
    if len(count) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    total = torch.zeros(len(count), dtype=torch.float64).index_add(0, index, values)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(count), (draws, len(count)), generator=generator)
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = means.quantile(torch.tensor([1 - level, 1 + level], dtype=torch.float64) / 2)
    return Interval(float(values.mean()), float(low), float(high))


def retrieval(
    tokens: Tensor,
    targets: Tensor,
    plane: Tensor,
    position: Tensor,
    modality: Tensor,
    volume: Tensor,
    within: bool = True,
    ks: Sequence[int] = (1, 5, 10),
    depth_bins: int = 4,
) -> dict[str, float]:
    """Recall at each k, with its interval over volumes and its chance level.

    Queries with fewer than two candidates are left out.

    Args:
        tokens: (n, d) student tokens.
        targets: (n, d) teacher embeddings of the same slices.
        plane: (n,) long: 0 sagittal, 1 coronal, 2 axial.
        position: (n,) fraction of the extent, in [0, 1].
        modality: (n,) long.
        volume: (n,) long, the clusters of ``bootstrap``.
        within: only candidates of the same modality, plane and depth bin, so that knowing these
            does not help; else all.
        ks: places that count.
        depth_bins: equal parts of the extent.

    Returns:
        ``r1``, ``r1_low``, ``r1_high``, ``r1_chance``, the same for every k, ``queries`` and
        ``candidates`` (median of a query). Names that TensorBoard and MLflow accept.

    Raises:
        NotComputableError: if no query has two candidates.
    """
    group = torch.zeros_like(plane)
    if within:
        group = depth_group(plane, position, depth_bins) + 3 * depth_bins * modality
    found = hits(tokens, targets, group, ks)
    asked = found.candidates >= 2
    if not asked.any():
        raise NotComputableError(
            f"retrieval must have a slice with two candidates, got {len(tokens)} slices of "
            f"{len(volume.unique())} volumes; evaluate more volumes or slices, or set "
            f"depth_bins below {depth_bins}"
        )
    result: dict[str, float] = {}
    for column, k in enumerate(ks):
        mean, low, high = bootstrap(found.recall[asked, column], volume[asked])
        chance = float(found.chance[asked, column].mean())
        result |= {f"r{k}": mean, f"r{k}_low": low, f"r{k}_high": high, f"r{k}_chance": chance}
    median = float(found.candidates[asked].double().median())
    return result | {"queries": float(asked.sum()), "candidates": median}


class SliceMetric(Metric):
    """Keeps token, target, plane, position and volume of every valid slice, and joins the ranks.

    Args:
        spaces: target spaces to keep, of ``SPACES``.
        output_transform: engine output to (StudentOutput, SliceTargets).
    """

    def __init__(self, spaces: Sequence[str], output_transform: Callable) -> None:
        for space in spaces:
            if space not in SPACES:
                raise ValueError(f"target must be one of {SPACES}, got {space!r}; choose one")
        self.spaces = spaces
        super().__init__(output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self.kept: dict[str, list[Slices]] = {space: [] for space in self.spaces}
        self.volumes = 0

    def update(self, output: tuple[Any, Any]) -> None:
        pred, target = output
        if isinstance(pred, list):
            raise TypeError(
                f"the engine's output must be one batch, got a list of {len(pred)}; "
                "set decollate: false in the evaluator"
            )
        b, s = target.valid.shape
        volume = self.volumes + torch.arange(b, device=target.valid.device)
        volume = (volume * idist.get_world_size() + idist.get_rank())[:, None].expand(b, s)
        self.volumes += b
        for space in self.spaces:
            token = pred.tokens.get(space, pred.tokens.get("joint"))
            if token is None:
                continue
            mask = target.valid & target.has_text if space == "text" else target.valid
            mask = mask.as_subclass(Tensor)  # MetaTensor indexing is slow
            about = (target.plane, target.position, target.modality, volume)
            rows = (token, getattr(target, space), *about)
            kept = (row.detach().as_subclass(Tensor)[mask].cpu() for row in rows)
            self.kept[space].append(Slices(*kept))

    def gather(self, space: str) -> Slices | None:
        """The slices of all ranks in one target space; None if there is none."""
        # As objects: ranks may hold any number of slices, even no batch at all.
        parts = [part for rank in idist.all_gather(self.kept[space]) for part in rank]
        if not any(len(part.tokens) for part in parts):
            return None
        return Slices(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Retrieval(SliceMetric):
    """R@k of slice → image or slice → text for the first of ``ks``, as one number to select by.

    Args:
        target: "image" or "text".
        within: only candidates of the same modality, plane and depth bin; else all.
        ks: places that count; ``compute`` returns the first, ``latest`` holds all.
        depth_bins: equal parts of the extent.
        output_transform: engine output to (StudentOutput, SliceTargets).
    """

    def __init__(
        self,
        target: str = "image",
        within: bool = True,
        ks: Sequence[int] = (1, 5, 10),
        depth_bins: int = 4,
        output_transform: Callable = from_engine(["pred", "label"]),  # noqa: B008
    ) -> None:
        self.target, self.within, self.ks, self.depth_bins = target, within, ks, depth_bins
        self.latest: dict[str, float] = {}
        super().__init__((target,), output_transform)

    def compute(self) -> float:
        slices = self.gather(self.target)
        if slices is None:
            raise NotComputableError(
                f"slices with a {self.target} token and target must be at least two, got none; "
                "give the data captions or the student this head, or choose another target"
            )
        self.latest = retrieval(*slices, within=self.within, ks=self.ks, depth_bins=self.depth_bins)
        return self.latest[f"r{self.ks[0]}"]


class RetrievalTable(SliceMetric):
    """All of ``retrieval``, for every target and scope in which some slice has two candidates.

    ``compute`` returns a flat dict, for instance ``image_within_r1_chance`` or ``text_all_r5``.

    Args:
        ks: places that count.
        depth_bins: equal parts of the extent.
        output_transform: engine output to (StudentOutput, SliceTargets).
    """

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10),
        depth_bins: int = 4,
        output_transform: Callable = from_engine(["pred", "label"]),  # noqa: B008
    ) -> None:
        self.ks, self.depth_bins = ks, depth_bins
        super().__init__(SPACES, output_transform)

    def compute(self) -> dict[str, float]:
        table: dict[str, float] = {}
        for space in self.spaces:
            slices = self.gather(space)
            if slices is None:
                continue
            for scope, within in (("all", False), ("within", True)):
                try:
                    row = retrieval(*slices, within=within, ks=self.ks, depth_bins=self.depth_bins)
                except NotComputableError:
                    continue  # for instance a single caption
                table |= {f"{space}_{scope}_{key}": value for key, value in row.items()}
        if not table:
            raise NotComputableError(
                "slices that may be compared must be at least two, got none; "
                "evaluate more volumes or slices"
            )
        return table
