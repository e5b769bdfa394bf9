"""Teacher outputs on disk, one file a volume, and the transform that samples targets from them.

A file's name is a hash of everything that can change its values, and a file appears whole
(``os.replace``) or not at all: a stale or half-written entry cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import ignite.distributed as idist
import torch
from monai.data import MetaTensor
from monai.engines.utils import PrepareBatch
from monai.transforms import MapTransform, Randomizable
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import slicing
from .captions import Captioner
from .encoders import sha256
from .teacher import Teacher
from .volumes import guess_modality, read_volume

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when slicing, windows or this file change what is stored


class SliceTargets(NamedTuple):
    """What the teacher says of the slices of a batch.

    image: (b, s, d) unit embeddings of the slices.
    text: (b, s, d') unit embeddings of their captions, zeros where there is none.
    has_text: (b, s) bool.
    valid: (b, s) bool, False where a row is padding.
    plane: (b, s) long. position: (b, s) float, fraction of the extent of ``volume``.
    volume: (b, 1, x, y, z), what the student gets.
    """

    image: Tensor
    text: Tensor
    has_text: Tensor
    valid: Tensor
    plane: Tensor
    position: Tensor
    volume: Tensor


def write_atomic(path: Path, write: Any) -> None:
    """Call ``write(draft)`` on a name beside ``path``, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # safetensors would leave it to the owner alone
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class Store:
    """Embeddings and captions of plane slices, made once by the teacher and read ever after.

    Args:
        root: folder; many writers may share it.
        teacher: frozen encoders; woken only for volumes that are not there yet.
        captioner: slice to text.
        per_plane: slices a plane that are drawn beside those the captioner has texts for.
        seed: of that draw.
        device: where the teacher computes.
    """

    def __init__(
        self,
        root: str | Path,
        teacher: Teacher,
        captioner: Captioner,
        per_plane: int = 16,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.root = Path(root)
        self.teacher = teacher.on(device)
        self.captioner = captioner
        self.per_plane = per_plane
        self.seed = seed
        self._teacher_print = teacher.fingerprint
        self._texts: dict[str, Tensor] = {}
        self._hashes = HashMemo(self.root / "files.jsonl")

    def path(self, item: dict[str, Any]) -> Path:
        """Where the item's entry is, or would be."""
        file, _, place = item["image"].partition("::")
        parts = [
            FORMAT,
            self._hashes(Path(file)),
            place,  # in an archive
            item["modality"],
            self._teacher_print,
            self.captioner.fingerprint(item),
            self.per_plane,
            self.seed,
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return self.root / key[:2] / f"{key}.safetensors"

    @property
    def spaces(self) -> dict[str, int]:
        """Name and length of each target space: {"image", "text"}, or {"joint"} for CLIP's kind."""
        name = hashlib.sha256(self._teacher_print.encode()).hexdigest()[:16]
        path = self.root / f"teacher-{name}.json"
        if not path.exists():
            size = self.teacher.image.size
            image = self.teacher.encode_image(torch.zeros(1, 1, size, size)).shape[1]
            text = self.teacher.encode_text(["image"]).shape[1]
            spaces = {"joint": image} if self.teacher.joint else {"image": image, "text": text}
            about = {"fingerprint": self._teacher_print, "spaces": spaces}
            write_atomic(path, lambda draft: draft.write_text(json.dumps(about)))
        return json.loads(path.read_text())["spaces"]

    def fill(self, items: Sequence[dict[str, Any]], skip_bad: bool = False) -> list[dict[str, Any]]:
        """Make the entries that are missing; every volume is read, so this also finds bad ones.

        Under torch.distributed each rank makes its share.

        Args:
            items: from ``data.datalist``: image, modality.
            skip_bad: leave bad volumes out and list them, instead of raising.

        Returns:
            The items, each with ``targets``, the path of its entry.

        Raises:
            ValueError: names every bad volume at once; the good ones are stored by then.
        """
        self.captioner.check_items(items)
        paths = [self.path(item) for item in items]
        self._hashes.save()
        # A fixed share: what is missing may look different to a rank that comes later.
        share = range(idist.get_rank(), len(items), idist.get_world_size())
        missing = [i for i in share if not paths[i].exists()]
        bad: dict[str, str] = {}
        if missing:
            logger.info(
                f"{len(missing)} of {len(items)} volumes are not in {self.root}: embedding them"
            )
            with tqdm(total=len(missing), unit="volume", desc="embed") as bar:
                for i, prepared in self._prepare([(i, items[i]) for i in missing]):
                    if isinstance(prepared, Exception):
                        bad[items[i]["image"]] = str(prepared)
                    else:
                        self._write(paths[i], items[i], prepared)
                    bar.update()
        if idist.get_world_size() > 1:
            for found in idist.all_gather(bad):
                bad = {**bad, **found}
        if bad:
            listed = "\n".join(f"  {reason}" for reason in bad.values())
            if not skip_bad or len(bad) == len(items):
                raise ValueError(
                    f"volumes must be readable and not empty, got {len(bad)} bad of {len(items)}; "
                    f"mend them, or set skip_bad to leave them out:\n{listed}"
                )
            logger.warning(f"left out {len(bad)} bad volumes:\n{listed}")
        return [
            {**item, "targets": str(path)}
            for item, path in zip(items, paths, strict=True)
            if item["image"] not in bad
        ]

    def _prepare(
        self, items: list[tuple[int, dict[str, Any]]]
    ) -> Iterator[tuple[int, _Prepared | Exception]]:
        """Read and cut the next volume in a thread while the teacher works on this one."""
        with ThreadPoolExecutor(1) as pool:
            ahead = [(i, pool.submit(self._slices, item)) for i, item in items[:2]]
            for n in range(len(items)):
                i, future = ahead.pop(0)
                if n + 2 < len(items):
                    ahead.append((items[n + 2][0], pool.submit(self._slices, items[n + 2][1])))
                try:
                    yield i, future.result()
                except (ValueError, OSError, RuntimeError) as error:
                    yield i, error

    def _slices(self, item: dict[str, Any]) -> _Prepared:
        """Choose and cut the slices of one volume."""
        volume = read_volume(item["image"])
        modality = item["modality"]
        if modality == "auto":
            modality = guess_modality(volume)
        shown = slicing.window(volume, modality)
        given_plane, given_position = self.captioner.required(item, volume.shape[1:])
        drawn_plane, drawn_position = slicing.choose(shown, self.per_plane, self.seed)
        both = zip(
            torch.cat((given_plane, drawn_plane)).tolist(),
            torch.cat((given_position, drawn_position)).tolist(),
            strict=True,
        )
        size = volume.shape[1:]
        unique = sorted({(p, min(int(t * size[p]), size[p] - 1)) for p, t in both})
        plane = torch.tensor([p for p, _ in unique])
        position = torch.tensor([(i + 0.5) / size[p] for p, i in unique])
        spacing = volume.pixdim.tolist()
        pixels = self.teacher.image.size
        slices = torch.cat(
            [
                slicing.cut(shown, spacing, p, position[[n for n, _ in group]], pixels)
                for p, group in groupby(enumerate(plane.tolist()), key=lambda pair: pair[1])
            ]
        )
        full = {**item, "modality": modality}
        return _Prepared(full, plane, position, slices, volume.affine, torch.tensor(size))

    def _write(self, path: Path, item: dict[str, Any], made: _Prepared) -> None:
        captions = self.captioner.caption(made.item, made.plane, made.position, made.slices)
        rows = [i for i, caption in enumerate(captions) if caption is not None]
        texts = [str(captions[i]) for i in rows]
        new = sorted(set(texts) - self._texts.keys())
        if len(self._texts) + len(new) > 10_000:  # a template's few texts come back, others do not
            self._texts.clear()
            new = sorted(set(texts))
        if new:
            self._texts.update(zip(new, self.teacher.encode_text(new), strict=True))
        tensors = {
            "plane": made.plane.to(torch.uint8),
            "position": made.position.float(),
            "image": self.teacher.encode_image(made.slices).half(),
            "text_row": torch.tensor(rows, dtype=torch.int32),
            "affine": made.affine.double().contiguous(),
            "size": made.size.to(torch.int32),
        }
        if rows:
            tensors["text"] = torch.stack([self._texts[text] for text in texts]).half()
        about = {
            "image": str(item["image"]),
            "modality": made.item["modality"],
            "teacher": self._teacher_print,
            "captioner": type(self.captioner).__name__,
            "per_plane": self.per_plane,
            "seed": self.seed,
            "slices": [
                {"plane": slicing.PLANES[p], "position": round(t, 4), "caption": caption}
                for p, t, caption in zip(
                    made.plane.tolist(), made.position.tolist(), captions, strict=True
                )
            ],
        }
        readable = json.dumps(about, indent=1, ensure_ascii=False)
        write_atomic(path.with_suffix(".json"), lambda draft: draft.write_text(readable, "utf-8"))
        write_atomic(path, lambda draft: save_file(tensors, draft))  # last: it marks the entry done


class _Prepared(NamedTuple):
    item: dict[str, Any]
    plane: Tensor  # (s,)
    position: Tensor  # (s,)
    slices: Tensor  # (s, c, h, w)
    affine: Tensor  # (4, 4)
    size: Tensor  # (3,)


class HashMemo:
    """Content hashes of files, remembered by path, size and time of change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, int, int], str] = {}
        self._new: list[str] = []
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    name, size, mtime, digest = json.loads(line)
                except ValueError:  # a line cut by a full disk
                    continue
                self._known[name, size, mtime] = digest

    def __call__(self, file: Path) -> str:
        try:
            stat = file.stat()
        except OSError as error:
            raise ValueError(f"image must be a file, got {file}; correct the datalist") from error
        key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in self._known:
            self._known[key] = sha256(file)
            self._new.append(json.dumps([*key, self._known[key]]) + "\n")
        return self._known[key]

    def save(self) -> None:
        if self._new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._new))
            self._new.clear()


def map_positions(
    plane: Tensor,
    position: Tensor,
    size: Tensor,
    source: Tensor,
    target: Tensor,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Planes and positions of a volume's slices in a flipped, cropped, padded or rescaled copy.

    Args:
        plane: (s,) long, in the source.
        position: (s,) fraction of the source's extent.
        size: (3,) voxels of the source.
        source: (4, 4) voxel-to-world affine of the source.
        target: (4, 4) of the copy.
        shape: (x, y, z) voxels of the copy.

    Returns:
        plane (s,) and position (s,) in the copy; a position outside [0, 1] was cropped away.

    Raises:
        ValueError: the copy was rotated, so that a slice of the source is none of the copy.
    """
    step = torch.linalg.solve(target.double(), source.double())  # source voxel -> copy voxel
    size_of_step = step[:3, :3].abs()
    new_axis = size_of_step.argmax(0)  # for each source axis
    off = size_of_step.clone()
    off[new_axis, torch.arange(3)] = 0
    if len(set(new_axis.tolist())) < 3 or off.max() > 1e-3 * size_of_step.max():
        raise ValueError(
            "image must be flipped, cropped, padded, zoomed or turned by right angles only, got a "
            "rotated grid, in which slices tilt; take rotations and deformations out of the "
            "transforms before SampleTargetsd"
        )
    index = position.double() * size.double()[plane] - 0.5
    axis = new_axis[plane]
    moved = step[axis, plane] * index + step[axis, 3]
    # The other two axes add nothing: their step is zero along this one.
    return axis, ((moved + 0.5) / torch.tensor(shape, dtype=torch.float64)[axis]).float()


class SampleTargetsd(MapTransform, Randomizable):
    """Adds targets of ``slices`` slices of each volume, placed in the volume as it is by then.

    It belongs behind every spatial transform. Half of the slices are ones with a caption, if there
    are so many. Adds plane, position, image_target, text_target, has_text and valid (see
    ``SliceTargets``); an item's ``targets`` names its entry in the store.

    Args:
        keys: the image, a MetaTensor (1, x, y, z).
        spaces: of the store.
        slices: slices a volume; None takes all of them, in order, for evaluation.
    """

    def __init__(self, keys: str, spaces: dict[str, int], slices: int | None = 16) -> None:
        super().__init__(keys)
        if slices is not None and slices < 1:
            raise ValueError(f"slices must be at least 1, got {slices}; use None for all")
        self.slices = slices
        self.text_length = spaces.get("joint", spaces.get("text", 0))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = data[self.keys[0]]
        if not isinstance(image, MetaTensor):
            raise TypeError(
                f"image must be a MetaTensor, got {type(image).__name__}; load it by LoadImaged"
            )
        entry = load_file(data["targets"])
        plane, position = map_positions(
            entry["plane"].long(), entry["position"], entry["size"], entry["affine"],
            image.affine, image.shape[1:],
        )  # fmt: skip
        has_text = torch.zeros(len(plane), dtype=torch.bool)
        has_text[entry["text_row"].long()] = True
        row_of_text = torch.zeros(len(plane), dtype=torch.long)
        row_of_text[entry["text_row"].long()] = torch.arange(len(entry["text_row"]))
        inside = (position >= 0) & (position <= 1)
        usable = inside.nonzero().flatten()
        if not len(usable):
            raise ValueError(
                f"image must hold a stored slice, got none of {len(plane)} inside the crop of "
                f"{image.meta.get('filename_or_obj', 'a volume')}; raise per_plane or patch_size"
            )
        if self.slices is not None:
            usable = self._draw(usable, has_text)
        count = len(usable) if self.slices is None else self.slices
        pad = count - len(usable)
        valid = torch.arange(count) < len(usable)
        usable = torch.cat((usable, usable.new_zeros(pad)))
        has_text = has_text[usable] & valid
        text = torch.zeros(count, self.text_length)
        if has_text.any():
            text[has_text] = entry["text"][row_of_text[usable[has_text]]].float()
        return {
            **data,
            "plane": plane[usable],
            "position": position[usable].clamp(0, 1),
            "image_target": entry["image"][usable].float() * valid[:, None],
            "text_target": text,
            "has_text": has_text,
            "valid": valid,
        }

    def _draw(self, usable: Tensor, has_text: Tensor) -> Tensor:
        assert self.slices is not None
        order = usable[torch.from_numpy(self.R.permutation(len(usable)))]
        told, untold = order[has_text[order]], order[~has_text[order]]
        half = max(self.slices // 2, self.slices - len(untold))
        return torch.cat((told[:half], untold))[: self.slices]


class PrepareSlices(PrepareBatch):
    """Batch from ``SampleTargetsd`` to (volume, targets, (plane, position), {}) on the device.

    Args:
        blank: set the student's volume to zero: the control that shows what it answers from plane
            and position alone.
    """

    def __init__(self, blank: bool = False) -> None:
        self.blank = blank

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, SliceTargets, tuple[Tensor, Tensor], dict[str, Any]]:
        def get(key: str) -> Tensor:
            value = batchdata[key]
            if isinstance(value, MetaTensor):  # plain tensors: the network need not carry metadata
                value = value.as_tensor()
            return value.to(device=device, non_blocking=non_blocking, **kwargs)

        volume = get("image")
        plane, position = get("plane"), get("position")
        targets = SliceTargets(
            get("image_target"), get("text_target"), get("has_text"), get("valid"),
            plane, position, volume,
        )  # fmt: skip
        shown = torch.zeros_like(volume) if self.blank else volume
        return shown, targets, (plane, position), {}
