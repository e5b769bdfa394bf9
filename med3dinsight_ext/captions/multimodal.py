"""Slices described by a multimodal language model: what all such captioners have in common."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, WINDOWS, cut, depth

PROMPT = (
    "This is one {plane} slice of a {modality} scan of the {body_part}, from the {depth} part of "
    "the scan; a voxel is {spacing}. In at most two sentences, name the anatomy that is visible "
    "and any abnormality. Say only what the image shows; do not guess, and give no advice."
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
        per_plane: slices a plane that it is asked about, evenly spread over those of the entry;
            None for all.
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
        per_plane: int | None = None,
        size: int = 448,
        ct_window: str = "soft tissue",
    ) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be text, got {prompt!r}; leave it out for the default")
        try:
            prompt.format(**dict.fromkeys(FIELDS, "text"))
        except (ValueError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(
                f"prompt must use no field but {', '.join(FIELDS)}, got {prompt!r} ({error}); "
                "double braces that are text"
            ) from error
        least = {"max_tokens": (max_tokens, 1), "size": (size, 1), "temperature": (temperature, 0)}
        if per_plane is not None:
            least["per_plane"] = (per_plane, 1)
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}; correct captioner")
        if ct_window not in (*WINDOWS, "all"):
            raise ValueError(
                f"ct_window must be one of {', '.join(WINDOWS)} or all, got {ct_window!r}"
            )
        self.prompt, self.max_tokens, self.temperature, self.seed = (
            prompt, max_tokens, temperature, seed,
        )  # fmt: skip
        self.per_plane, self.size, self.ct_window = per_plane, size, ct_window
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

    @property
    def about(self) -> dict[str, Any]:
        """What a reader of a caption wants to know of its origin."""
        return {
            "kind": type(self).__name__, "model": self.model_print, "prompt": self.prompt,
            "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
            "size": self.size, "ct_window": self.ct_window,
        }  # fmt: skip

    def answer_print(self, item: dict) -> str:
        """Hash of what changes the answer for one slice: model, prompt, decoding and picture."""
        parts = [
            self.model_print, self.prompt, self.max_tokens, self.temperature,
            self.seed if self.temperature else None, self.size, self.ct_window,
            item.get("body_part"),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fingerprint(self, item: dict) -> str:
        """The same, and how many slices it is asked about."""
        return f"{self.answer_print(item)}:{self.per_plane}"

    def asked(self, plane: Tensor) -> list[int]:
        """Rows (of ``plane`` (s,), sorted) that it is asked about."""
        rows = []
        for p in range(len(PLANES)):
            of_plane = (plane == p).nonzero().flatten().tolist()
            count = min(len(of_plane), self.per_plane or len(of_plane))
            rows += [of_plane[int((i + 0.5) * len(of_plane) / count)] for i in range(count)]
        return rows

    def required(self, item: dict, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Any slice will do: two empty tensors."""
        return torch.empty(0, dtype=torch.long), torch.empty(0)

    def check_items(self, items: Sequence[dict]) -> None:  # noqa: B027 (optional)
        """Any item will do."""

    def ask(self, item: dict, plane: int, position: float, spacing: Sequence[float]) -> str:
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
