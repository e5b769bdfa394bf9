"""Tiny stand-ins that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from med3dinsight_ext.encoders import ImageTower, TextTower
from med3dinsight_ext.teacher import Teacher

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MED3D_DATA", ROOT.parent / "shared" / "data"))


def real_data(name: str) -> Path:
    """Folder of a real dataset; the test is skipped where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; set MED3D_DATA to the folder that holds {name}")
    return DATA / name


class FakeImages(ImageTower):
    """Embeds an image by its 2 x 3 mean intensities."""

    size, mean, std, fingerprint = 24, (0.0,) * 3, (1.0,) * 3, "fake-images"

    def load(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def embed(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1), (2, 3)).flatten(1) + 0.1


class FakeTexts(TextTower):
    """Embeds a text by the counts of its letters; takes five words."""

    fingerprint = "fake-texts"

    def load(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def fits(self, text: str) -> bool:
        return len(text.split()) <= 5

    def embed(self, texts: list[str]) -> Tensor:
        return (
            torch.tensor([[float(text.lower().count(c)) for c in "aeinorst"] for text in texts])
            + 0.1
        )


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(FakeImages(), FakeTexts())
