"""The interface between a source of captions and the embedding store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from med3dinsight_ext.captions.cleaning import Reply
from med3dinsight_ext.io.console import Bar


class SlicedVolume(NamedTuple):
    """The slices of one volume that are embedded and captioned."""

    path: Path  # of the store's entry
    item: dict[str, Any]  # of the datalist; its modality is never "auto"
    plane: Tensor  # (s,) long, sorted: 0 sagittal, 1 coronal, 2 axial
    position: Tensor  # (s,) float32, slice centres as fractions of the extent, in [0, 1]
    slices: Tensor  # (s, 1 or 3, h, w) in [0, 1]
    affine: Tensor  # (4, 4) voxels to mm, in RAS
    size: Tensor  # (3,) voxels along x, y, z
    answers: Path | None  # file for a model's raw answers; None without a model
    questions: Any  # from Captioner.prepare


class Captioner(ABC):
    """A source of captions for plane slices.

    Subclasses implement ``provenance``, ``fingerprint`` and ``caption``; those that run a model
    override ``caption_volumes`` and what belongs to it instead of ``caption``. The store calls
    ``check_items`` once, the fingerprints for each item and then, for items without an entry,
    ``required`` and ``prepare`` in a thread that reads ahead, and ``caption_volumes`` once for all.

    Attributes:
        few_texts: whether equal captions recur in many volumes, so that caching their embeddings
            pays.
    """

    few_texts = False

    @property
    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Kind, model, prompt and decoding, as JSON values; stored beside the captions."""

    @abstractmethod
    def fingerprint(self, item: dict) -> str:
        """String that changes whenever the captions of this item may change."""

    def answer_fingerprint(self, item: dict) -> str | None:
        """String that changes whenever a model's raw answers may change; None without a model.

        It names the file ``SlicedVolume.answers``.
        """
        return None

    def free(self) -> None:  # noqa: B027 (optional)
        """Let go of the model's memory, if there is one; the next use loads it again."""

    def check_items(self, items: Sequence[dict]) -> None:  # noqa: B027 (optional)
        """Check that the captions belong to these items; accepts all by default.

        Raises:
            ValueError: they belong to none.
        """

    def required(self, item: dict, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Slices that must be embedded beside the drawn ones; none by default.

        Args:
            item: of the datalist.
            shape: (x, y, z) voxels in RAS; if given, captions are checked against it.

        Returns:
            Plane (n,) long and position (n,) float32, sorted slice centres, in [0, 1].

        Raises:
            ValueError: a caption belongs to a slice that the volume does not have.
        """
        return torch.empty(0, dtype=torch.long), torch.empty(0)

    def prepare(
        self, item: dict, shown: Tensor, spacing: Sequence[float], slots: Sequence[tuple[int, int]]
    ) -> Any:
        """Data for ``caption_volumes`` from the pixels, which are freed then; None by default.

        Args:
            item: of the datalist, with the modality resolved.
            shown: (1 or 3, x, y, z) in [0, 1], from ``slicing.window``.
            spacing: mm a voxel along x, y, z.
            slots: (plane, voxel index along the cut axis) of each slice, sorted.
        """
        return None

    def max_calls(self, slices: Sequence[int]) -> int:
        """Upper bound of the model calls that one volume takes; 0 by default.

        Args:
            slices: number of embedded slices in each plane.
        """
        return 0

    def caption(
        self, item: dict, plane: Tensor | Sequence[int], position: Tensor | Sequence[float]
    ) -> list[str | None]:
        """A text or None for each slice.

        Args:
            item: of the datalist.
            plane: (s,) 0 sagittal, 1 coronal, 2 axial.
            position: (s,) fractions of the extent, in [0, 1].
        """
        raise NotImplementedError

    def caption_volumes(
        self,
        volumes: Iterable[SlicedVolume],
        write: Callable[[SlicedVolume, dict[int, Reply]], None],
        count: int,
        slices: Sequence[int],
    ) -> None:
        """Caption volumes under a progress bar and write each one as soon as it is complete.

        Args:
            volumes: taken lazily, since each holds its pixels.
            write: called with a volume and its captions by row, in any order of volumes.
            count: number of volumes.
            slices: expected number of embedded slices in each plane of a volume.

        Raises:
            ValueError: the captioner is not configured correctly.
            ConnectionError: a model cannot be reached.
        """
        with Bar(total=count, unit="volume", desc="embed") as bar:
            for volume in volumes:
                texts = self.caption(volume.item, volume.plane, volume.position)
                write(volume, {n: Reply(t, "ok") for n, t in enumerate(texts) if t is not None})
                bar.update()
