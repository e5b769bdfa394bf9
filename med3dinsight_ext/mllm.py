"""Captions that a multimodal language model writes of the slices it is shown: what all have in common."""

from __future__ import annotations

import hashlib
import json
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .slicing import PLANES, WINDOWS, cut, depth

PROMPT = (
    "This is one {plane} slice of a {modality} scan of the {body_part}, from the {depth} part of the "
    "scan; one pixel is {spacing}. In at most two sentences, name the anatomy that is visible and any "
    "abnormality. Say only what the image shows; do not guess, and give no advice."
)
FIELDS = ("modality", "plane", "depth", "spacing", "body_part")


class SliceRequest(NamedTuple):
    """One slice that a model is to describe.

    volume: number of its volume in this run. row: number of the slice in its volume's entry.
    prompt: what to ask, complete. image: the slice, mode "L" or "RGB".
    """

    volume: int
    row: int
    prompt: str
    image: Image.Image


class MllmCaptions(ABC):
    """A model that looks at slices; subclasses say how it is asked.

    Args:
        prompt: text with any of ``{modality}``, ``{plane}``, ``{depth}``, ``{spacing}`` and
            ``{body_part}`` (the datalist's ``body_part``, else "body").
        max_tokens: the longest answer.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
        size: pixels of the longer side of the slices shown.
        ct_window: what CT is shown in, a name of ``slicing.WINDOWS``, or "all" for three as RGB.
    """

    few_texts = False

    def __init__(
        self,
        prompt: str = PROMPT,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        size: int = 448,
        ct_window: str = "soft tissue",
    ) -> None:
        used = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        if not used <= set(FIELDS):
            raise ValueError(
                f"prompt must use no field but {', '.join('{%s}' % f for f in FIELDS)}, got "
                f"{', '.join('{%s}' % f for f in sorted(used - set(FIELDS)))}; double other braces"
            )
        if max_tokens < 1 or temperature < 0 or size < 1:
            raise ValueError(
                "max_tokens and size must be at least 1 and temperature at least 0, got "
                f"{max_tokens}, {size} and {temperature}; correct the captioner"
            )
        if ct_window not in (*WINDOWS, "all"):
            raise ValueError(
                f"ct_window must be one of {', '.join(WINDOWS)} or all, got {ct_window!r}"
            )
        self.prompt, self.max_tokens, self.temperature, self.seed = (
            prompt, max_tokens, temperature, seed,
        )  # fmt: skip
        self.size, self.ct_window = size, ct_window
        self.tokens = 0  # read and written so far, where the model tells

    @property
    @abstractmethod
    def model_print(self) -> str:
        """Names everything about the model that changes an answer; needs no weights in memory."""

    @abstractmethod
    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Each request with the model's raw answer, in any order.

        Requests are taken lazily, from the caller's thread alone and no more of them than are
        under way, since each holds a picture and behind it a volume.

        Raises:
            ValueError: the model or server cannot be used as configured; says what to change.
            ConnectionError: the server stays away after all retries.
        """

    def fingerprint(self, item: dict) -> str:
        """Hash of model, prompt, decoding and picture."""
        parts = [
            self.model_print, self.prompt, self.max_tokens, self.temperature,
            self.seed if self.temperature else None, self.size, self.ct_window,
            item.get("body_part"),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def required(self, item: dict, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Any slice will do: two empty tensors."""
        return torch.empty(0, dtype=torch.long), torch.empty(0)

    def check_items(self, items: Sequence[dict]) -> None:
        """Any item will do."""

    def ask(
        self, item: dict, plane: int, position: float, spacing: Sequence[float]
    ) -> str:
        """The prompt of one slice.

        Args:
            item: with ``modality`` and perhaps ``body_part``; nothing else of it is told.
            plane: 0 sagittal, 1 coronal, 2 axial.
            position: fraction of the extent.
            spacing: mm a voxel along x, y, z.
        """
        across, up = (mm for axis, mm in enumerate(spacing) if axis != plane)
        return self.prompt.format(
            modality=item["modality"],
            plane=PLANES[plane],
            depth=depth(plane, position),
            spacing=f"{across:.2g} x {up:.2g} mm",
            body_part=item.get("body_part") or "body",
        )

    def pictures(
        self, shown: Tensor, spacing: Sequence[float], plane: int, position: Tensor
    ) -> list[Image.Image]:
        """Slices of one plane as images whose longer side is ``size``.

        Args:
            shown: (1 or 3, x, y, z) from ``slicing.window``.
            spacing: mm a voxel.
            plane: 0 sagittal, 1 coronal, 2 axial.
            position: (s,) fractions.
        """
        if len(shown) == 3 and self.ct_window != "all":
            shown = shown[[list(WINDOWS).index(self.ct_window)]]
        pixels = cut(shown, spacing, plane, position, self.size).mul(255).round().byte()
        return [
            Image.fromarray(p[0].numpy() if len(p) == 1 else p.movedim(0, -1).contiguous().numpy())
            for p in pixels
        ]
