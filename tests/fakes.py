"""Ten-line stand-ins, importable from bundle configs too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from med3dinsight_ext.captions.multimodal import MllmCaptions, SliceRequest
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower, TextTower


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


class FakeMllm(MllmCaptions):
    """Describes a slice by its brightness; refuses some, and can take its time or break down.

    Args:
        delay: seconds an answer.
        breaks_after: answers until it fails.
        refuses: every which slice.
        **asking: what ``MllmCaptions`` takes.
    """

    model_fingerprint = "fake-mllm"

    def __init__(
        self, delay: float = 0, breaks_after: int = 10**9, refuses: int = 7, **asking: Any
    ) -> None:
        super().__init__(**{"size": 16, **asking})
        self.delay, self.breaks_after, self.refuses = delay, breaks_after, refuses
        self.calls = 0

    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Two at a time, the second first."""
        requests = iter(requests)
        while batch := list(islice(requests, 2)):
            for request in reversed(batch):
                if self.calls >= self.breaks_after:
                    raise ConnectionError("url must answer, got nothing; start the server")
                self.calls += 1
                time.sleep(self.delay)
                yield request, self.answer(request)

    def answer(self, request: SliceRequest) -> str:
        brightness = int(np.asarray(request.image).astype(int).sum())
        if brightness % self.refuses == 0:
            return "I'm sorry, but I can't help with that."
        return f"Tissue of brightness {brightness} is visible. {request.prompt[:20]} is quoted."


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


class Bright(nn.Module):
    """Segments what is brighter than half the range; has a weight, so that it can be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))
        self.layer = nn.Conv3d(1, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 8 * torch.cat([self.threshold - x, x - self.threshold], 1)


SIZE = (12, 16, 20)


def volume(path: Path, seed: int = 0, codes: str = "RAS") -> dict:
    """A random volume on disk and its item."""
    array = np.random.default_rng(seed).random(SIZE, dtype=np.float32)
    image = nib.Nifti1Image(array, np.diag([1.5, 1.0, 2.0, 1.0]))
    turn = nib.orientations.axcodes2ornt(tuple(codes))
    nib.save(image.as_reoriented(turn), path)
    return {"image": str(path), "modality": "MR"}


def write_volumes(folder: Path, count: int, size: tuple[int, int, int] = (28, 32, 26)) -> Path:
    """A folder of volumes with a bright ball each, somewhere; odd ones are noisier.

    segmentation.json lists them with the ball as label, classification.json with "even" or "odd".
    """
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    masks, classes = [], []
    for i in range(count):
        random = np.random.default_rng(i)
        centre = random.uniform(0.3, 0.7, 3) * size
        ball = np.linalg.norm(grid - centre, axis=-1) < random.uniform(4, 8)
        noise = 10 * (1 + 3 * (i % 2)) * random.random(size)
        array = (100 + 50 * ball + noise).astype(np.float32)
        image, label = f"v{i}.nii.gz", f"labels/v{i}.nii.gz"
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        nib.save(nib.Nifti1Image(array, affine), folder / image)
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), folder / label)
        masks.append({"image": image, "label": label})
        classes.append({"image": image, "label": ("even", "odd")[i % 2]})
    (folder / "segmentation.json").write_text(json.dumps({"training": masks}))
    (folder / "classification.json").write_text(json.dumps(classes))
    return folder


def nnunet_plan() -> dict[str, Any]:
    """The part of an nnU-Net plan that is read here; its first axis is coarse."""
    arguments = {
        "n_stages": 3, "features_per_stage": [4, 6, 8], "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None,
        "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    needed = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return {
        "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"3d_fullres": {
            "spacing": [3.0, 1.0, 0.8], "patch_size": [8, 24, 32],
            "architecture": {"network_class_name": name, "arch_kwargs": arguments,
                             "_kw_requires_import": needed},
        }},
    }  # fmt: skip
