"""Ten-line stand-ins, importable from bundle configs too."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from med3dinsight_ext.encoders import ImageTower, TextTower
from med3dinsight_ext.teacher import Teacher


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


def teacher() -> Teacher:
    return Teacher(FakeImages(), FakeTexts())


class PlainNet(nn.Module):
    """A network that is not MONAI's: a strided convolution, a neck, and one back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 4, 4, 4), nn.ReLU(inplace=True))
        self.neck = nn.Conv3d(4, 6, 2, 2)
        self.up = nn.ConvTranspose3d(6, 1, 8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.up(self.neck(self.down(x)))


def write_volumes(folder: Path, count: int, size: tuple[int, int, int] = (28, 32, 26)) -> Path:
    """A folder of volumes with a bright ball each, somewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    for i in range(count):
        random = np.random.default_rng(i)
        centre = random.uniform(0.3, 0.7, 3) * size
        ball = np.linalg.norm(grid - centre, axis=-1) < random.uniform(4, 8)
        array = (100 + 50 * ball + 10 * random.random(size)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"v{i}.nii.gz")
    return folder
