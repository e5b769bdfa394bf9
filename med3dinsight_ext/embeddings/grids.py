"""Feature grids of plane slices on disk, as targets of dense teaching.

A grid cell is centred on a known point of the volume, so a target is a point in the world and the
teacher's codes there. Files appear whole or not at all and are named by everything that can change
their values, as in ``store``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.volumes import check_straight, modality_of, read_volume
from med3dinsight_ext.embeddings.entry import REMADE, SliceChoice
from med3dinsight_ext.embeddings.shards import (
    check_unchanged,
    merge_ranks,
    paths_of,
    rank_share,
    wait_for_ranks,
    without,
)
from med3dinsight_ext.embeddings.whitening import Whitening, fit_whitening
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.files import HashMemo, key_of, keyed_path, sha256, write_atomic
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.io.remote import local_path
from med3dinsight_ext.teachers.dense import encode_grids, find_layers
from med3dinsight_ext.teachers.teacher import Teacher

logger = logging.getLogger(__name__)
FORMAT = 2  # raise it when slicing, windows, whitening or this file change what is stored
FIT_VOLUMES = 64  # at most, for the whitening
CLIPPED = 1 / 16  # of the codes; no distribution has more beyond four standard deviations
FIT_CELLS = 2000  # of each of them and each layer


def cell_voxels(
    size: Sequence[int],
    spacing: Sequence[float],
    plane: int,
    position: Tensor,
    side: int,
    picture: int,
) -> Tensor:
    """Voxel coordinates under the cell centres of slices from ``slicing.cut``.

    A square grid covers the square picture evenly. Cells over its padding lie outside the volume.

    Args:
        size: (x, y, z) voxels of the volume.
        spacing: mm.
        plane: 0 sagittal, 1 coronal, 2 axial.
        position: (s,) fractions of the extent.
        side: cells along a side of the grid.
        picture: pixels along a side of the picture.

    Returns:
        (s, side * side, 3) float64; 0 is the centre of the first voxel.
    """
    across, up = (axis for axis in range(3) if axis != plane)
    longer = max(size[axis] * spacing[axis] for axis in (across, up))
    pixel = (torch.arange(side, dtype=torch.float64) + 0.5) * picture / side
    voxel = {}
    for axis in (across, up):  # pictures show high coordinates left and up
        filled = max(1, round(picture * size[axis] * spacing[axis] / longer))
        before = (picture - filled) // 2
        voxel[axis] = (1 - (pixel - before) / filled) * size[axis] - 0.5
    index = (position.double() * size[plane]).long().clamp(max=size[plane] - 1)
    found = torch.empty(len(index), side, side, 3, dtype=torch.float64)
    found[..., plane] = index[:, None, None].double()
    found[..., up] = voxel[up][None, :, None]
    found[..., across] = voxel[across][None, None, :]
    return found.flatten(1, 2)


class Slices(NamedTuple):
    """The slices of one volume: pictures (s, c, h, w), plane and position (s,), geometry.

    modality: that of the item, or what "auto" found.
    """

    pictures: Tensor
    plane: Tensor
    position: Tensor
    affine: Tensor
    size: list[int]
    spacing: list[float]
    modality: str

    def voxels(self, side: int) -> Tensor:
        """(s, side * side, 3) voxel coordinates of the cells of all slices."""
        picture = self.pictures.shape[-1]
        return slice_voxels(self.plane, self.position, self.size, self.spacing, side, picture)


def read_slices(
    item: dict[str, Any], per_plane: int, seed: int, planes: Sequence[int], picture: int
) -> Slices:
    """Slices of an item's volume as the teacher sees them.

    Args:
        item: image and modality.
        per_plane: slices a plane.
        seed: of their choice.
        planes: numbers of the planes.
        picture: pixels along a side of a picture.
    """
    volume = read_volume(item["image"])
    check_straight(volume, item["image"])
    modality = modality_of(item, volume)
    shown = slicing.window(volume, modality)
    plane, position = slicing.choose(shown, per_plane, seed, planes)
    spacing = [float(mm) for mm in volume.pixdim]
    pictures = slicing.cut_planes(shown, spacing, plane, position, picture)
    size = list(volume.shape[1:])
    return Slices(pictures, plane, position, volume.affine, size, spacing, modality)


def slice_voxels(
    plane: Tensor,
    position: Tensor,
    size: Sequence[int],
    spacing: Sequence[float],
    side: int,
    picture: int,
) -> Tensor:
    """``cell_voxels`` of slices of several planes: (s, side * side, 3)."""
    found = torch.empty(len(plane), side * side, 3, dtype=torch.float64)
    for p in plane.unique().tolist():
        rows = plane == p
        found[rows] = cell_voxels(size, spacing, p, position[rows], side, picture)
    return found


def open_grids(path: str | Path) -> safe_open:
    """A file of ``GridStore``, to be used in a ``with``.

    Raises:
        ValueError: it is missing or broken.
    """
    with readable("grids", path, REMADE):
        return safe_open(path, "pt")


class GridStore:
    """Codes of the teacher's feature grids, made once and read in training.

    Args:
        root: folder; many writers may share it.
        teacher: frozen encoders; run only for volumes that are not there yet.
        layers: module paths in the teacher's image tower, or "auto" (``find_layers``).
        codes: numbers a cell.
        per_plane: slices a plane.
        planes: names of the planes.
        seed: of the choice of slices and of the cells that the whitening is fitted on.
        limit_gb: an error if the grids of all volumes need more.
        device: where the teacher computes.
    """

    def __init__(
        self,
        root: str | Path,
        teacher: Teacher,
        layers: str | Sequence[str] = "auto",
        codes: int = 64,
        per_plane: int = 24,
        planes: Sequence[str] = slicing.PLANES,
        seed: int = 0,
        limit_gb: float = 50.0,
        device: str | torch.device = "cpu",
    ) -> None:
        if codes < 1:
            raise ValueError(f"codes must be at least 1, got {codes}; 64 is the default")
        choice = SliceChoice.of(per_plane, seed, planes)
        self.root = local_path(root, "store_dir")
        self.teacher = teacher.on(device)
        self.layers = find_layers(teacher.image) if layers == "auto" else list(layers)
        if not self.layers:
            raise ValueError("layers must name at least one layer, got none; auto finds them")
        self.codes, self.per_plane, self.seed = codes, per_plane, seed
        self.planes = choice.planes
        self.limit_gb = limit_gb
        self._hashes = HashMemo(self.root / "files.jsonl")

    @property
    def dims(self) -> list[int]:
        """Codes of each layer; known once ``fill`` has run."""
        return [part.basis.shape[1] for part in self._whitening.values()]

    @property
    def _made(self) -> list[Any]:
        settings = [self.layers, self.codes, self.per_plane, self.planes, self.seed]
        return [FORMAT, self.teacher.fingerprint, *settings]

    def path(self, item: dict[str, Any]) -> Path:
        """Where the item's grids are, or would be, once ``fill`` has chosen the whitening."""
        content = [*self._hashes.content(item["image"]), item["modality"]]
        made = [*self._made, self._whitening_hash, *content]
        return keyed_path(self.root / "grids", made, ".safetensors")

    def fill(self, items: Sequence[dict[str, Any]], skip_bad: bool = False) -> list[dict[str, Any]]:
        """Make the grids that are missing; each rank of torchrun makes its share.

        Args:
            items: image and modality. Where ``root`` has no whitening for these settings yet, it is
                fitted on an even sample of them, and kept for all that come later.
            skip_bad: leave bad volumes out with a warning, instead of raising.

        Returns:
            The good items, each with ``grids``, the path of its file.

        Raises:
            ValueError: the grids of all volumes would be larger than ``limit_gb``; or volumes are
                bad, after the grids of the others are made.
        """
        if not items:
            raise ValueError("items must name at least one volume, got none; check the datalist")
        self._load_whitening(items[:: -(-len(items) // FIT_VOLUMES)])
        bad: dict[str, str] = {}
        paths = paths_of(items, range(len(items)), self.path, bad)
        own = [(items[n], paths[n]) for n in rank_share(len(items)) if n in paths]
        missing = [(item, path) for item, path in own if not path.exists()]
        if missing:
            self._check_size(len(items))
            logger.info(f"{len(missing)} of {len(own)} volumes have no feature grids: making them")
        clipped: list[float] = []
        for item, path in Bar(missing, "feature grids", unit="volume", disable=not missing):
            try:
                clipped.append(self._write(item, path))
            except ValueError as error:
                bad[item["image"]] = str(error)
        if clipped and (share := fmean(clipped)) > CLIPPED:
            logger.warning(
                f"{share:.0%} of the codes are clipped: their whitening was fitted on unlike "
                f"volumes; remove {self._whitening_path} to fit it on these"
            )
        self.teacher.free()
        good = without(items, merge_ranks(bad), skip_bad)
        found = ((items[n], path) for n, path in paths.items())
        return [{**item, "grids": str(path)} for item, path in found if item["image"] in good]

    def _check_size(self, volumes: int) -> None:
        size = self.teacher.image.size
        maps = encode_grids(self.teacher, torch.zeros(1, 1, size, size), self.layers)
        bytes_a_slice = sum(
            m[0, 0].numel() * d for m, d in zip(maps.values(), self.dims, strict=True)
        )
        needed = volumes * self.per_plane * len(self.planes) * bytes_a_slice / 1e9
        if needed > self.limit_gb:
            raise ValueError(
                f"grids must fit into limit_gb={self.limit_gb:g}, got up to {needed:.3g} GB for "
                f"{volumes} volumes; lower codes, per_plane or the teacher's size, name coarser "
                "layers, or raise limit_gb"
            )

    def _slices(self, item: dict[str, Any]) -> Slices:
        size = self.teacher.image.size
        return read_slices(item, self.per_plane, self.seed, self.planes, size)

    def _cells(self, slices: Slices) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each layer: features (s, cells, c) and positions (s, cells, 3) as fractions.

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        maps = encode_grids(self.teacher, slices.pictures, self.layers)
        for layer in self.layers:
            if not maps[layer].isfinite().all():
                raise ValueError(
                    f"features must be finite, got NaN or infinity in {layer}; try the teacher in "
                    "float32, or on a CPU"
                )
            features = maps[layer].flatten(2).mT
            voxels = slices.voxels(maps[layer].shape[2])
            yield layer, features, (voxels + 0.5) / torch.tensor(slices.size)

    @property
    def _whitening_path(self) -> Path:
        return self.root / "grids" / f"whitening-{key_of(self._made)}.safetensors"

    def _load_whitening(self, sample: Sequence[dict[str, Any]]) -> None:
        path = self._whitening_path
        if not path.exists() and rank_share(1):  # of a group, the first rank
            fitted = self._fit(sample)
            tensors = {
                f"{number}.{field}": value.contiguous()
                for number, layer in enumerate(self.layers)
                for field, value in fitted[layer]._asdict().items()
            }
            if not path.exists():  # another job's, which its codes hang on
                about = {"volumes": str(len(sample))}
                write_atomic(path, lambda draft: save_file(tensors, draft, about))
        wait_for_ranks()
        with readable("whitening", path, REMADE):
            file, stored = safe_open(path, "pt"), load_file(path)
        with file:
            fitted_on = int((file.metadata() or {}).get("volumes", FIT_VOLUMES))
        if fitted_on < len(sample) and rank_share(1):
            logger.warning(
                f"the codes are whitened by {fitted_on} volumes of an earlier run, instead of "
                f"{len(sample)} of these; remove {path} to fit it anew"
            )
        self._whitening_hash = sha256(path)
        self._whitening = {
            layer: Whitening(*(stored[f"{number}.{field}"] for field in Whitening._fields))
            for number, layer in enumerate(self.layers)
        }

    def _fit(self, sample: Sequence[dict[str, Any]]) -> dict[str, Whitening]:
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in self.layers}
        bad: dict[str, str] = {}
        for item in Bar(sample, "whitening", unit="volume"):
            try:
                slices = self._slices(item)
                cells = list(self._cells(slices))
            except ValueError as error:  # which `fill` decides about
                bad[item["image"]] = str(error)
                continue
            for layer, features, fraction in cells:
                inside = ((fraction >= 0) & (fraction <= 1)).all(-1)
                row, cell = inside.nonzero(as_tuple=True)
                pick = torch.randperm(len(row), generator=generator)[:FIT_CELLS]
                row, cell = row[pick], cell[pick]
                found[layer].append((features[row, cell], slices.plane[row], fraction[row, cell]))
        without(sample, bad, skip_bad=True)
        fitted = {}
        for layer, rows in found.items():
            features, plane, fraction = (torch.cat(part) for part in zip(*rows, strict=True))
            fitted[layer] = fit_whitening(features, plane, fraction, self.codes)
            position, held = fitted[layer].explained.tolist()
            logger.info(
                f"{layer}: position explains {position:.0%} of the variance, "
                f"{fitted[layer].basis.shape[1]} codes hold {held:.0%} of the rest"
            )
        return fitted

    def _write(self, item: dict[str, Any], path: Path) -> float:
        """Write the grids of an item; the share of their codes that were clipped."""
        slices = self._slices(item)
        check_unchanged(item, path, self.path)
        tensors = {
            "plane": slices.plane.to(torch.uint8),
            "position": slices.position.float(),
            "affine": torch.as_tensor(slices.affine).double().contiguous(),
            "size": torch.tensor(slices.size, dtype=torch.int32),
            "spacing": torch.tensor(slices.spacing, dtype=torch.float64),
            "picture": torch.tensor(slices.pictures.shape[-1]),
            "modality": torch.tensor(slicing.MODALITIES.index(slices.modality)),
        }
        clipped = []
        for number, (layer, features, fraction) in enumerate(self._cells(slices)):
            s, cells, _ = features.shape
            plane = slices.plane[:, None].expand(s, cells).flatten()
            codes = self._whitening[layer].encode(
                features.flatten(0, 1), plane, fraction.flatten(0, 1)
            )
            tensors[f"codes.{number}"] = codes.view(s, cells, -1).contiguous()
            inside = ((fraction >= 0) & (fraction <= 1)).all(-1).flatten()
            clipped.append(float((codes[inside].abs() == 127).float().mean()))
        write_atomic(path, lambda draft: save_file(tensors, draft))
        return fmean(clipped)
