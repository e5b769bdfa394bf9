"""Slice retrieval metrics: recall at k, its chance level and its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.handlers import from_engine
from torch import Tensor

from med3dinsight_ext.metrics.bootstrap import bootstrap
from med3dinsight_ext.metrics.recall import recall_at_k

SPACES = ("image", "text")


class Slices(NamedTuple):
    """n slices: tokens (n, d), targets (n, d); plane, position, modality and patient (n,)."""

    tokens: Tensor
    targets: Tensor
    plane: Tensor
    position: Tensor
    modality: Tensor
    patient: Tensor


def depth_group(plane: Tensor, position: Tensor, bins: int) -> Tensor:
    """Number of each slice's plane and depth bin (n,); slices of one number are compared.

    Args:
        plane: (n,) long: 0 sagittal, 1 coronal, 2 axial.
        position: (n,) fraction of the extent, in [0, 1].
        bins: equal parts of the extent.
    """
    return plane * bins + (position * bins).long().clamp(0, bins - 1)


def retrieval(
    tokens: Tensor,
    targets: Tensor,
    plane: Tensor,
    position: Tensor,
    modality: Tensor,
    patient: Tensor,
    within: bool = True,
    ks: Sequence[int] = (1, 5, 10),
    depth_bins: int = 4,
) -> dict[str, float]:
    """Recall at each k, with its interval over patients and its chance level.

    Queries with fewer than two candidates are left out.

    Args:
        tokens: (n, d) student tokens, of any length.
        targets: (n, d) teacher embeddings of the same slices.
        plane: (n,) long: 0 sagittal, 1 coronal, 2 axial.
        position: (n,) fraction of the extent, in [0, 1].
        modality: (n,) long.
        patient: (n,) long, the clusters of `bootstrap`.
        within: only candidates of the same modality, plane and depth bin, so that these alone
            do not help; else all.
        ks: numbers of places that count.
        depth_bins: equal parts of the extent.

    Returns:
        ``r1``, ``r1_low``, ``r1_high``, ``r1_chance``, the same for every k, ``queries`` and
        ``candidates`` (median of a query). Names that TensorBoard and MLflow accept.

    Raises:
        NotComputableError: no query has two candidates.
        ValueError: as `recall_at_k`.
    """
    group = torch.zeros_like(plane)
    if within:
        group = depth_group(plane, position, depth_bins) + 3 * depth_bins * modality
    found = recall_at_k(tokens, targets, group, ks)
    compared = found.candidates >= 2
    if not compared.any():
        raise NotComputableError(
            f"retrieval must have a slice with two candidates, got {len(tokens)} slices of "
            f"{len(patient.unique())} patients; evaluate more volumes or slices, or set "
            f"depth_bins below {depth_bins}"
        )
    result: dict[str, float] = {}
    for column, k in enumerate(ks):
        mean, low, high = bootstrap(found.recall[compared, column], patient[compared])
        chance = float(found.chance[compared, column].mean())
        result |= {f"r{k}": mean, f"r{k}_low": low, f"r{k}_high": high, f"r{k}_chance": chance}
    median = float(found.candidates[compared].double().median())
    return result | {"queries": float(compared.sum()), "candidates": median}


class SliceMetric(Metric):
    """Base of metrics over all valid slices of all ranks.

    Args:
        spaces: target spaces to collect, of ``SPACES``.
        output_transform: engine output to (StudentOutput, SliceTargets).

    Raises:
        ValueError: a space is not one of ``SPACES``.
    """

    def __init__(self, spaces: Sequence[str], output_transform: Callable) -> None:
        for space in spaces:
            if space not in SPACES:
                raise ValueError(f"target must be one of {SPACES}, got {space!r}; choose one")
        self.spaces = spaces
        super().__init__(output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self.kept: dict[str, list[Slices]] = {space: [] for space in self.spaces}

    def update(self, output: tuple[Any, Any]) -> None:
        pred, target = output
        if isinstance(pred, list):
            raise TypeError(
                f"the engine's output must be one batch, got a list of {len(pred)}; "
                "set decollate: false in the evaluator"
            )
        for space in self.spaces:
            token = pred.tokens.get(space, pred.tokens.get("joint"))
            if token is None:
                continue
            mask = target.valid & target.has_text if space == "text" else target.valid
            mask = mask.as_subclass(Tensor)  # MetaTensor indexing is slow
            about = (target.plane, target.position, target.modality, target.patient)
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
    """Recall at the first of ``ks``, slice → image or slice → text; one number to select by.

    Args:
        target: "image" or "text".
        within: only candidates of the same modality, plane and depth bin; else all.
        ks: numbers of places; ``compute`` returns recall at the first, ``latest`` holds all.
        depth_bins: equal parts of the extent.
        output_transform: engine output to (StudentOutput, SliceTargets).

    Examples:
        >>> from med3dinsight_ext.embeddings.targets import SliceTargets
        >>> from med3dinsight_ext.models.student import StudentOutput
        >>> unit, yes, zero = torch.eye(4)[None], torch.ones(1, 4).bool(), torch.zeros(1, 4)
        >>> number = zero.long()
        >>> target = SliceTargets(unit, unit, yes, yes, number, zero, number, zero, number)
        >>> metric = Retrieval("image")
        >>> metric.update((StudentOutput({"joint": unit}, None, None), target))
        >>> metric.compute(), metric.latest["r1_chance"]
        (1.0, 0.25)
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
    """Results of `retrieval` for every target and scope with a slice of two candidates.

    ``compute`` returns a flat dict, for instance ``image_within_r1_chance`` or ``text_all_r5``.

    Args:
        ks: numbers of places that count.
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
