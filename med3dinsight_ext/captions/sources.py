"""Captions from a file, or from a template."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import torch
from torch import Tensor

from med3dinsight_ext.captions.captioner import Captioner
from med3dinsight_ext.data.slicing import PLANES, depth, plane_number
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.images import open_volume
from med3dinsight_ext.io.reading import read_rows, readable
from med3dinsight_ext.io.remote import is_remote


def source(captions: str | Captioner | None, root: str | Path | None = None) -> Captioner:
    """The captioner of a config value.

    Args:
        captions: path of a caption file, None for the default template, or a captioner.
        root: folder of the image paths in a caption file.
    """
    if captions is None:
        return TemplateCaptions()
    return FileCaptions(captions, root) if isinstance(captions, (str, Path)) else captions


@dataclass(frozen=True)
class Row:
    """One row of a caption file."""

    where: str  # file and line, for error messages
    plane: int
    index: int | None  # voxel along the cut axis in RAS
    size: int | None  # voxels along the cut axis
    position: float  # fraction of the extent; NaN where only the index is given
    text: str


class _Caption(NamedTuple):
    size: int  # voxels along the cut axis
    text: str


class FileCaptions(Captioner):
    """Captions from a JSONL or CSV file, one row a slice.

    Columns: ``image`` (path below ``root``, or an address), ``plane`` (name or number), ``index``
    (voxel along the cut axis in RAS) or ``position`` (fraction of the extent) or both, ``caption``
    or ``text``, and optionally ``size`` (voxels along the cut axis); without it the image's header
    is read.

    Args:
        path: the file; rows of images that are not in the datalist are ignored.
        root: folder of the image paths; by default the file's own.

    Raises:
        ValueError: naming file and line, if a row is malformed or its image does not exist.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.root = Path(root or self.path.parent)
        self.rows: dict[str, list[Row]] = defaultdict(list)
        if not self.path.is_file():
            raise ValueError(f"captions must be a file, got {path}; correct the path")
        with readable("captions", path):
            for where, fields in read_rows(path):
                self.rows[self._image(where, fields)].append(_row(where, fields))

    @property
    def provenance(self) -> dict[str, Any]:
        """The file."""
        return {"kind": "FileCaptions", "file": self.path.name}

    def required(self, item: dict, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """See ``Captioner``: the slices that have a caption; ValueError if one has two."""
        slices = self._slices(item, shape)
        plane = torch.tensor([plane for plane, _ in slices], dtype=torch.long)
        position = [(index + 0.5) / slices[plane, index].size for plane, index in slices]
        return plane, torch.tensor(position, dtype=torch.float32)

    def caption(
        self, item: dict, plane: Tensor | Sequence[int], position: Tensor | Sequence[float]
    ) -> list[str | None]:
        """The caption of the slice at each position, or None where the file has none."""
        captions = self._slices(item)
        size = {p: row.size for (p, _), row in captions.items()}
        found = []
        for p, fraction in _pairs(plane, position):
            row = captions.get((p, _index(fraction, size[p]))) if p in size else None
            found.append(row.text if row else None)
        return found

    def fingerprint(self, item: dict) -> str:
        """Hash of the rows of this image alone."""
        rows = self.rows.get(_key(item["image"]), ())
        content = sorted(repr(astuple(row)[1:]) for row in rows)  # in any order, on any line
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def check_items(self, items: Sequence[dict]) -> None:
        """Check that at least one item has a caption.

        Raises:
            ValueError: none has; paths disagree.
        """
        if items and not any(_key(item["image"]) in self.rows for item in items):
            ours, theirs = next(iter(self.rows), "nothing"), _key(items[0]["image"])
            raise ValueError(
                f"captions must belong to images of the datalist, got {ours} in {self.path} and "
                f"{theirs} in the datalist; correct root={str(self.root)!r}"
            )

    def _image(self, where: str, fields: dict) -> str:
        image = fields.get("image")
        if not isinstance(image, str) or not image:
            raise ValueError(f"image must be a path, got {told(image)} in {where}; add it")
        if is_remote(image):
            return image
        key = _key(os.path.join(self.root, image))
        if key not in self.rows and not os.path.exists(key.split("::")[0]):
            raise ValueError(
                f"image must exist, got {told(image)} in {where}, so {key}; "
                f"correct it or root={str(self.root)!r}"
            )
        return key

    def _slices(
        self, item: dict, shape: Sequence[int] | None = None
    ) -> dict[tuple[int, int], _Caption]:
        """Size and text of each captioned (plane, index), in the order of planes and indices."""
        rows = self.rows.get(_key(item["image"]), [])
        sizes = dict(enumerate(shape or ()))
        if not sizes and any(row.size is None for row in rows):
            sizes = dict(enumerate(shape_of(item["image"])))
        found: dict[tuple[int, int], _Caption] = {}
        for row in rows:
            size = sizes.setdefault(row.plane, row.size or 0)
            if row.size not in (None, size):
                raise ValueError(
                    f"size must be {size} along the {PLANES[row.plane]} axis, got {row.size} in "
                    f"{row.where}; the caption was written for another image"
                )
            index = _index(row.position, size) if row.index is None else row.index
            if index >= size:
                raise ValueError(
                    f"index must be in 0..{size - 1}, got {index} in {row.where}; "
                    f"count {PLANES[row.plane]} slices from 0 in RAS"
                )
            if not math.isnan(row.position):
                _check_position(row.where, index, size, row.position)
            if (row.plane, index) in found:
                raise ValueError(
                    f"captions must be one a slice, got a second for {PLANES[row.plane]} {index} "
                    f"in {row.where}; join them"
                )
            found[row.plane, index] = _Caption(size, row.text)
        return dict(sorted(found.items()))


class TemplateCaptions(Captioner):
    """One caption for every slice, from modality, plane and depth.

    Args:
        template: text with any of ``{modality}``, ``{plane}`` and ``{depth}``.

    Raises:
        ValueError: the template has another field.
    """

    few_texts = True

    def __init__(self, template: str = "{modality} {plane} slice, {depth}") -> None:
        try:
            template.format(modality="CT", plane="axial", depth="middle")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                "template must use no field but {modality}, {plane} and {depth}, "
                f"got {template!r} ({error}); correct it"
            ) from error
        self.template = template

    @property
    def provenance(self) -> dict[str, Any]:
        """The template."""
        return {"kind": "TemplateCaptions", "template": self.template}

    def caption(
        self, item: dict, plane: Tensor | Sequence[int], position: Tensor | Sequence[float]
    ) -> list[str | None]:
        """The filled template of each slice."""
        modality = item.get("modality", "auto")
        return [
            self.template.format(
                modality="medical" if modality == "auto" else modality,
                plane=PLANES[p],
                depth=depth(p, fraction),
            )
            for p, fraction in _pairs(plane, position)
        ]

    def fingerprint(self, item: dict) -> str:
        """Hash of the template and the item's modality."""
        text = f"{self.template}\n{item.get('modality', 'auto')}"
        return hashlib.sha256(text.encode()).hexdigest()


def _row(where: str, fields: dict) -> Row:
    """Check and convert one row."""
    text = fields.get("caption") or fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"caption must be text, got {told(text)} in {where}; write it or drop the row"
        )
    number: dict[str, Any] = {}
    for name, kind in (("index", int), ("size", int), ("position", float)):
        value = fields.get(name)
        try:
            number[name] = None if value is None or value == "" else kind(value)
            if isinstance(value, bool) or kind is int and isinstance(value, float) and value % 1:
                raise ValueError(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{name} must be {'an integer' if kind is int else 'a number'}, got {told(value)} "
                f"in {where}; correct it"
            ) from None
    index, size, position = number["index"], number["size"], number["position"]
    if index is None and position is None:
        raise ValueError(f"index or position must be given, got neither in {where}; add one")
    if position is not None and not 0 <= position <= 1:
        raise ValueError(f"position must lie in [0, 1], got {position} in {where}; divide by size")
    if index is not None and (index < 0 or size is not None and index >= size):
        raise ValueError(
            f"index must be in 0..size - 1, got {index} of {size} in {where}; count from 0 in RAS"
        )
    if None not in (index, size, position):
        _check_position(where, index, size, position)
    try:
        plane = plane_number(fields.get("plane", ""))
    except ValueError as error:
        raise ValueError(f"{error} (in {where})") from None
    position = float("nan") if position is None else position
    text = text.strip().encode("utf-8", "replace").decode()  # half a surrogate cannot be written
    return Row(where, plane, index, size, position, text)


def _check_position(where: str, index: int, size: int, position: float) -> None:
    if abs(position - (index + 0.5) / size) > 0.5 / size:
        raise ValueError(
            f"position must be (index + 0.5) / size, got {position} for index {index} of {size} "
            f"in {where}; drop one of them"
        )


def _key(image: str) -> str:
    return image if is_remote(image) else os.path.realpath(image)


def _pairs(
    plane: Tensor | Sequence[int], position: Tensor | Sequence[float]
) -> list[tuple[int, float]]:
    planes, positions = torch.as_tensor(plane).tolist(), torch.as_tensor(position).tolist()
    return list(zip(planes, positions, strict=True))


def _index(position: float, size: int) -> int:
    return min(int(position * size), size - 1)


def shape_of(image: str) -> list[int]:
    """(x, y, z) voxels of an image in RAS, from its header where it has one.

    Raises:
        ValueError: the image cannot be read or is not a 3D volume.
    """
    if "::" in image:
        return list(read_volume(image).shape[1:])
    with readable("image", image):
        header = open_volume(image)
        axes = nib.io_orientation(header.affine)[:, 0].tolist()
        return [header.shape[axes.index(axis)] for axis in range(3)]
