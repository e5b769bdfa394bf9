"""Slice tokens of whole volumes, and scores of text prompts along each plane."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import dense_patch_slices
from monai.inferers import Inferer
from monai.transforms import MapTransform, SpatialPad
from safetensors.torch import save_file
from torch import Tensor

from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.saving import OutputStems
from med3dinsight_ext.embeddings.targets import map_positions
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.models.student import StudentOutput
from med3dinsight_ext.teachers.teacher import Teacher


class SlidingTokens(Inferer):
    """Runs a student on volumes larger than its patch, one window after another.

    A slice's token is the mean over the windows that contain it; its position is mapped into each
    window.

    Args:
        patch_size: (x, y, z) of a window in voxels; volumes must be at least as large.
        overlap: of neighbouring windows, in [0, 1).
    """

    def __init__(self, patch_size: Sequence[int], overlap: float = 0.25) -> None:
        self.patch_size = tuple(patch_size)
        self.overlap = overlap

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., StudentOutput],
        plane: Tensor,
        position: Tensor,
        **kwargs: Any,
    ) -> StudentOutput:
        """Slice tokens; there is no reconstruction.

        Args:
            inputs: (b, 1, x, y, z).
            network: the student.
            plane: (b, s) long.
            position: (b, s) fraction of the whole extent, in [0, 1].
            kwargs: unused, part of MONAI's interface.
        """
        size = inputs.shape[2:]
        step = [max(1, int(n * (1 - self.overlap))) for n in self.patch_size]
        windows = dense_patch_slices(tuple(size), self.patch_size, step)
        voxel = position * torch.tensor(size, device=position.device)[plane]
        total: dict[str, Tensor] = {}
        count = torch.zeros_like(position)
        for window in windows:
            start, extent = (
                torch.tensor(values, device=position.device)
                for values in zip(*((w.start, w.stop - w.start) for w in window), strict=True)
            )
            local = (voxel - start[plane]) / extent[plane]
            inside = (local >= 0) & (local <= 1)
            seen = inside.any(0).nonzero()[:, 0]
            if not len(seen):
                continue
            patch = (slice(None), slice(None), *window)
            out = network(inputs[patch], plane[:, seen], local[:, seen].clamp(0, 1))
            count += inside
            for name, tokens in out.tokens.items():
                tokens = tokens.float() * inside[:, seen, None]
                if name not in total:
                    total[name] = tokens.new_zeros(*plane.shape, tokens.shape[2])
                total[name].index_add_(1, seen, tokens)
        return StudentOutput({n: t / count[..., None] for n, t in total.items()}, None, None)


class SliceGridd(MapTransform):
    """Adds an even grid of slices, then pads the volume to at least one patch.

    ``grid`` (3 * per_plane,) holds positions in the volume as the file has it, turned to RAS;
    ``position`` those of the same slices in the padded one. They differ even without padding:
    resampled slices reach less far beyond their centres than thick ones.

    Args:
        keys: the image, a MetaTensor (1, x, y, z), in RAS.
        per_plane: slices a plane.
        patch_size: (x, y, z) in voxels.
    """

    def __init__(self, keys: str, per_plane: int, patch_size: Sequence[int]) -> None:
        super().__init__(keys)
        self.per_plane = per_plane
        self.pad = SpatialPad(patch_size)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = data[self.keys[0]]
        padded = self.pad(image)
        plane = torch.arange(3).repeat_interleave(self.per_plane)
        grid = ((torch.arange(self.per_plane) + 0.5) / self.per_plane).repeat(3)
        size = torch.tensor(image.shape[1:])
        _, position = map_positions(
            plane, grid, size, image.affine, padded.affine, padded.shape[1:]
        )
        return {
            **data,
            self.keys[0]: padded,
            "plane": plane,
            "position": position,
            "grid": _in_file(plane, grid, image),
        }


def _in_file(plane: Tensor, position: Tensor, image: MetaTensor) -> Tensor:
    """Positions (s,) of slices in the file that an image in RAS was read from, as if in RAS."""
    source, shape = image.meta.get("original_affine"), image.meta.get("spatial_shape")
    if source is None or shape is None:
        return position
    size = torch.tensor(image.shape[1:])
    first, found, last = (
        map_positions(plane, at, size, image.affine, torch.as_tensor(source), tuple(shape))[1]
        for at in (torch.zeros_like(position), position, torch.ones_like(position))
    )
    return torch.where(last > first, found, 1 - found).clamp(0, 1)


def prepare_grid(
    batchdata: dict[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None, tuple[Tensor, Tensor], dict[str, Any]]:
    """Batch from ``SliceGridd`` to (volume, None, (plane, position), {}) on the device."""
    volume = batchdata["image"].as_tensor().to(device, non_blocking=non_blocking)
    plane, position = (batchdata[k].to(device) for k in ("plane", "position"))
    return volume, None, (plane, position), {}


class PlaneScores(NamedTuple):
    """A prompt's scores along one plane's axis.

    position: (s,) in the volume, in [0, 1]. padded: (s,) in the padded volume. score: (s,).
    visible: (s,) the same, NaN where the slice is empty, unless all are. best: its maximum's index.
    """

    position: Tensor
    padded: Tensor
    score: Tensor
    visible: Tensor
    best: int


class TextScores(NamedTuple):
    """Scores of one volume: prompt to plane to ``PlaneScores``.

    stem: of the files that are written. image: (1, x, y, z), padded. source: file of the image.
    """

    stem: Path
    image: MetaTensor
    prompts: dict[str, dict[int, PlaneScores]]
    source: str


class TokenWriter:
    """Writes the tokens of each volume, and the scores of text prompts along each plane.

    For ``case.nii.gz``: ``case_tokens.safetensors`` (plane (n,), position (n,), and (n, d) unit
    tokens for each space); with prompts also ``case_text.json``. The batch's ``TextScores`` stay in
    ``engine.state.output["text_scores"]``, for handlers that draw them.

    Args:
        output_dir: folder of the files.
        teacher: encodes the prompts; None where there are none.
        prompts: texts.
        root: folder of the images; see ``OutputStems``.
    """

    def __init__(
        self,
        output_dir: str | Path,
        teacher: Teacher | None,
        prompts: Sequence[str] = (),
        root: str | Path | None = None,
    ) -> None:
        if isinstance(prompts, str):
            prompts = [prompts]
        self.stems = OutputStems(output_dir, root)
        self.teacher = teacher
        self.prompts = list(prompts)

    @cached_property
    def _texts(self) -> Tensor:
        if self.teacher is None:
            raise ValueError("teacher must be given for prompts, got None; name one in the config")
        return self.teacher.encode_text(self.prompts)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        scored: list[TextScores] = []
        for i, name in enumerate(map(str, batch["image"].meta["filename_or_obj"])):
            tokens = {
                space: F.normalize(values[i].float(), dim=-1).cpu()
                for space, values in engine.state.output["pred"].tokens.items()
            }
            place = {"plane": batch["plane"][i].cpu(), "position": batch["grid"][i].cpu()}
            stem = self.stems(name)
            tensors = {key: value.contiguous() for key, value in {**tokens, **place}.items()}
            target = stem.with_name(f"{stem.name}_tokens.safetensors")
            write_atomic(target, lambda draft, t=tensors: save_file(t, draft))
            if self.prompts:
                scores = self._scores(
                    tokens, **place, padded=batch["position"][i].cpu(), volume=batch["image"][i]
                )
                _write_scores(stem, name, scores)
                scored.append(TextScores(stem, batch["image"][i], scores, name))
        engine.state.output["text_scores"] = scored

    def _scores(
        self,
        tokens: dict[str, Tensor],
        plane: Tensor,
        position: Tensor,
        padded: Tensor,
        volume: MetaTensor,
    ) -> dict[str, dict[int, PlaneScores]]:
        """Scores of every prompt along every plane."""
        space = "joint" if "joint" in tokens else "text"
        if space not in tokens:
            raise ValueError(
                f"prompts must have a student with a text head, got heads {sorted(tokens)}; "
                "pre-train with captions"
            )
        scores = tokens[space] @ self._texts.mT  # (n, prompts)
        filled = [along.cpu() for along in slicing.usable(volume)]
        found: dict[str, dict[int, PlaneScores]] = {}
        for prompt, score in zip(self.prompts, scores.mT, strict=True):
            found[prompt] = {}
            for number, usable in enumerate(filled):
                rows = plane == number
                index = (padded[rows] * len(usable)).long().clamp(max=len(usable) - 1)
                empty = ~usable[index]
                visible = score[rows].masked_fill(empty & ~empty.all(), float("nan"))
                best = int(visible.nan_to_num(-2).argmax())
                found[prompt][number] = PlaneScores(
                    position[rows], padded[rows], score[rows], visible, best
                )
        return found


def _write_scores(stem: Path, image: str, prompts: dict[str, dict[int, PlaneScores]]) -> None:
    """Write ``case_text.json``."""
    readable = {
        prompt: {
            slicing.PLANES[number]: {
                "position": [round(v, 4) for v in scores.position.tolist()],
                "score": [round(v, 5) for v in scores.score.tolist()],
                "best": round(float(scores.position[scores.best]), 4),
            }
            for number, scores in planes.items()
        }
        for prompt, planes in prompts.items()
    }
    text = json.dumps({"image": image, "prompts": readable}, indent=1, ensure_ascii=False)
    path = stem.with_name(f"{stem.name}_text.json")
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))
