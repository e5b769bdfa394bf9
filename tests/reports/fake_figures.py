"""Inputs of figures that several tests share."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

from med3dinsight_ext.metrics.retrieval import retrieval
from med3dinsight_ext.reports.retrieval import Hit, Slice
from med3dinsight_ext.training.inferers import PlaneScores

EVENTS = [
    {"epoch": 1, "loss": 3.0, "image": 2.0, "reconstruction": 1.0},
    {"epoch": 2, "loss": 2.0, "image": 1.5, "reconstruction": 0.5},
    {"epoch": 2, "image_within_r1": 0.4, "image_within_r1_chance": 0.1, "text_all_r1": 0.2},
]


def retrieved(rows: int = 2, columns: int = 3, size: int = 8) -> list[tuple[Slice, list[Hit]]]:
    image = np.random.default_rng(0).random((size, size))
    slices = [Slice(image, i % 3, 0.25, f"volume_{i}") for i in range(columns)]
    hits = [Hit(s, 0.9 - 0.1 * i, i == 1) for i, s in enumerate(slices)]
    return [(slices[0]._replace(caption="A caption of $5 & <b>"), hits)] * rows


def prompts() -> tuple[dict[str, dict[int, PlaneScores]], MetaTensor]:
    """Scores of two prompts, best at 0.65, and their volume."""
    position = torch.arange(10) / 10 + 0.05
    score = -((position - 0.65) ** 2)
    score[2] = float("nan")
    planes = {k: PlaneScores(position, position, score, score, 6) for k in range(3)}
    image = MetaTensor(torch.rand(1, 8, 10, 12), affine=torch.eye(4))
    return {"heart": planes, "liver": planes}, image


def retrieval_metrics() -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(60, 6, generator=g)
    noisy = y + torch.randn(60, 6, generator=g)
    place = (
        torch.arange(60) % 3,
        torch.rand(60, generator=g),
        torch.zeros(60).long(),
        torch.arange(60) // 6,
    )
    rows: dict[str, float] = {}
    for scope in ("all", "within"):
        row = retrieval(noisy, y, *place, within=scope == "within")
        rows |= {f"image_{scope}_{key}": value for key, value in row.items()}
    return rows
