"""Prepared copies of volumes: checked, oriented, resampled and scaled once, then read by patches.

An entry is one file of chunks for the image and one for the label. Its name is a hash of the
files' content and of every setting of the transforms, so a stale entry cannot be read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    MapTransform,
    RandCropByPosNegLabeld,
    Randomizable,
    RandSpatialCropd,
    ResizeWithPadOrCropd,
    SpatialPadd,
)
from torch.utils.data import DataLoader, Dataset

from med3dinsight_ext.data.chunks import (
    BrokenChunks,
    CannotWrite,
    ChunkFile,
    write_chunks,
    writing,
)
from med3dinsight_ext.data.labels import label_values
from med3dinsight_ext.data.settings import described
from med3dinsight_ext.data.volumes import good_ones
from med3dinsight_ext.io.claims import ClaimError
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.errors import causes
from med3dinsight_ext.io.files import HashMemo, keyed_path
from med3dinsight_ext.io.packages import NotHere
from med3dinsight_ext.io.reading import whole_lines
from med3dinsight_ext.io.remote import local_path

log = logging.getLogger(__name__)
FORMAT = 1  # raise it when entries change
STEPS = 4095  # between the least and the greatest intensity: 0.12 HU each in a range of 500 HU
INDICES = 10_000  # voxels of the foreground, and of the background, that crops are drawn among
PADS, CROPS = (SpatialPadd, ResizeWithPadOrCropd), (RandSpatialCropd, RandCropByPosNegLabeld)
Record = dict[str, Any]


def prepared_copy(root: str | Path | None, load_transforms: Sequence[Any], workers: int) -> Any:
    """The prepared copy in a folder; None without one: whole files are read then."""
    if root is None:
        log.info("volumes are read from their files (prepared=DIR keeps a copy to read patches of)")
        return None
    if find_spec("blosc2") is None:
        raise ValueError("prepared must find blosc2; pip install 'med3dinsight-ext[scale]'")
    copy = PreparedCopy(root, [t for t in load_transforms if not isinstance(t, PADS)], workers)
    log.info(f"volumes are read by patches from the prepared copy in {root}")
    return copy


class PreparedCopy:
    """Volumes as ``transforms`` leave them, on disk.

    Many processes may share the folder. ``index.jsonl`` has a line for each entry: whether the
    volume is sound or why not, its shape, statistics and label values.

    Args:
        root: folder.
        transforms: deterministic ones, from paths to (1, x, y, z) images and labels; each fault of
            a volume is a ValueError.
        workers: processes that prepare volumes.

    Raises:
        ValueError: ``root`` is an address.
    """

    def __init__(self, root: str | Path, transforms: Sequence[Any], workers: int = 0) -> None:
        self.root = local_path(root, "prepared")
        self.transforms, self.workers = list(transforms), workers
        self._settings = json.dumps([FORMAT, described(self.transforms)])
        keys = [key for t in self.transforms for key in getattr(t, "keys", ())]
        self.keys = [key for key in ("image", "label") if key in keys]
        self._load_index()

    def _load_index(self) -> None:
        self._hashes = HashMemo(self.root / "files.jsonl")
        self._records: dict[str, Record] = {}
        for record in whole_lines(self.root / "index.jsonl"):
            if isinstance(record, dict) and isinstance(record.get("entry"), str):
                self._records[record["entry"]] = record

    def entry(self, item: Mapping[str, Any]) -> str:
        """Name of the item's entry, whether it exists or not; reads files that are new."""
        return self._name(item, [_content(item.get(key), self._hashes) for key in self.keys])

    def _name(self, item: Mapping[str, Any], hashes: list[Any]) -> str:
        return keyed_path(Path(), [self._settings, item.get("modality"), hashes], "").as_posix()

    def path(self, entry: str, key: str) -> Path:
        """File of an entry's image or label."""
        return self.root / f"{entry}.{key}.b2nd"

    def _record(self, item: Mapping[str, Any]) -> Record | None:
        """What is known of an item without reading it."""
        hashes = [_content(item.get(key), self._hashes.get) for key in self.keys]
        if any(known is None for known, _ in hashes):
            return None
        record = self._records.get(self._name(item, hashes))
        if record and not record["fault"]:
            paths = (f"{self.root}/{record['entry']}.{key}.b2nd" for key in self.keys)
            return record if all(map(os.path.exists, paths)) else None
        return record

    def check(self, items: Sequence[dict], skip_bad: bool = False) -> dict[int, Record]:
        """Prepare what is not there and find bad volumes; good items get their ``prepared`` entry.

        Args:
            items: from ``datalist``.
            skip_bad: leave bad volumes out with a warning, instead of raising.

        Returns:
            The record of each good item, by ``id``.

        Raises:
            ValueError: volumes are bad; names all of them, after the good ones are prepared. Or
                the folder cannot be written, as when the disk is full.
        """
        records = {id(item): self._record(item) for item in items}
        if missing := [item for item in items if records[id(item)] is None]:
            log.info(f"{len(missing)} of {len(items)} volumes are not in {self.root}: preparing")
            made = DataLoader(_Makers(self, missing), None, num_workers=self.workers)
            for index, new in Bar(made, "Preparing volumes", len(missing)):
                item = missing[index]
                records[id(item)] = new or self.make(item)  # raises what a worker could not
            self._load_index()

        found: list[Record | ValueError] = []
        for item in items:
            record: Record = records[id(item)] or {}
            found.append(ValueError(record["fault"]) if record["fault"] else record)
            if not record["fault"]:
                item["prepared"] = record["entry"]
        return good_ones(items, found, "volumes", skip_bad)

    def sound(self, items: Sequence[dict], skip_bad: bool = False) -> list[dict]:
        """The good items of ``check``."""
        good = self.check(items, skip_bad)
        return [item for item in items if id(item) in good]

    def prepare(self, items: Sequence[dict], skip_bad: bool = False) -> None:
        """``check``, then print what is there and how to train from it."""
        good = self.sound(items, skip_bad)
        files = {self.path(item["prepared"], key) for item in good for key in self.keys}
        size = sum(os.path.getsize(path) for path in files)
        print(f"{len(good):,} of {len(items):,} volumes are in {self.root}: {size / 1e9:.3g} GB")
        print(f"train from it: --prepared {self.root}")

    def missing(self, items: Sequence[dict]) -> list[dict]:
        """Items that the copy has no verdict of, and no entry."""
        return [item for item in items if self._record(item) is None]

    def make(self, item: Mapping[str, Any]) -> Record:
        """Prepare one volume and add its line to the index.

        Raises:
            CannotWrite: the folder cannot be written.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        entry = self.entry(item)
        record: Record = {"entry": entry, "image": str(item["image"]), "fault": None}
        try:
            data: Any = dict(item)
            for transform in self.transforms:
                data = transform(data)
            arrays = {key: data[key] for key in self.keys}
        except NotHere as error:
            return record | {"fault": str(error)}
        except ValueError as error:
            record["fault"] = str(error)
            if any(map(_of_the_machine, causes(error))):
                return record  # and not its content: it is tried again
        else:
            if self.entry(item) != entry:  # named after what the file was before
                changed = f"got a change of {item['image']}; start again when it is whole"
                return record | {"fault": f"volume must stay as it is while it is read, {changed}"}
            for key in reversed(self.keys):  # the image marks the entry complete
                with writing(self.root):
                    record |= self._write(self.path(entry, key), key, arrays[key])
        with writing(self.root), (self.root / "index.jsonl").open("a", encoding="utf-8") as index:
            index.write("\n" + json.dumps(record))
        return record

    def _write(self, path: Path, key: str, volume: MetaTensor) -> Record:
        array = volume.numpy()[0]
        about: Record = {"affine": volume.affine.double().flatten().tolist()}
        low, step = 0.0, 1.0
        if key == "label":
            found: Record = {"values": [int(value) for value in label_values(array)]}
            array = array.astype(np.min_scalar_type(max(found["values"])))
            random = np.random.default_rng(0)
            for name, places in (("fg", array > 0), ("bg", array == 0)):
                index = np.flatnonzero(places)
                if len(index) > INDICES:
                    index = np.sort(random.choice(index, INDICES, replace=False))
                about[name] = index.astype("<u4").tobytes()
        else:
            low, high = float(array.min()), float(array.max())
            step = (high - low) / STEPS or 1.0
            found = {"shape": array.shape, "mean": float(array.mean()), "std": float(array.std())}
            array = np.rint((array - low) / step).astype(np.uint16)
        write_chunks(path, array, about, low, step)
        return found

    def open(self, item: Mapping[str, Any], key: str) -> ChunkFile:
        """The chunks of an item's image or label.

        Raises:
            ValueError: ``check`` has not seen the item.
        """
        if "prepared" not in item:
            raise ValueError(
                f"item must be prepared, got {item['image']} without an entry; leave out prepared, "
                "or this overlay"
            )
        return ChunkFile(self.path(item["prepared"], key))


def _content(file: Any, hash_of: Callable[[str], str | None]) -> list[Any]:
    """Hash of a file's content, None if ``hash_of`` has none, and the member of an archive."""
    path, _, member = str(file).partition("::")
    try:
        return [hash_of(path), member]
    except ValueError:  # no file: its verdict says so
        return ["", str(file)]


def _of_the_machine(error: BaseException) -> bool:
    """Whether a limit, the memory or the disk is the cause; a broken gzip has no ``errno``."""
    limits = (ClaimError, MemoryError)
    return isinstance(error, limits) or (isinstance(error, OSError) and error.errno is not None)


class _Makers(Dataset):
    def __init__(self, copy: PreparedCopy, items: Sequence[dict]) -> None:
        self.copy, self.items = copy, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Record | None]:
        try:
            return index, self.copy.make(self.items[index])
        except CannotWrite:  # the traceback of a worker would be its message
            return index, None


class ReadPreparedd(MapTransform):
    """Reads the part of a prepared volume that pads and crops would leave of it.

    They run on a stand-in without voxels, whose affine and shape then name the part. A broken entry
    is made again from its files.

    Args:
        copy: from ``prepared_copy``.
        pads: of the ``load_transforms``: the first has the least ``spatial_size``.
        crop: ``RandSpatialCropd`` or ``RandCropByPosNegLabeld``; None reads the whole volume.
    """

    def __init__(self, copy: PreparedCopy, pads: Sequence[Any], crop: Any = None) -> None:
        super().__init__(copy.keys)
        self.copy, self.pads, self.crop = copy, list(pads), crop
        if crop is not None and "label" in copy.keys:
            crop.fg_indices_key, crop.bg_indices_key = "fg", "bg"

    def __call__(self, data: dict[str, Any]) -> Any:
        try:
            return self._read(data)
        except BrokenChunks as error:
            log.warning(f"{error}; preparing {data['image']} again")
            if fault := self.copy.make(data)["fault"]:
                raise ValueError(fault) from error
            return self._read(data)

    def _read(self, data: dict[str, Any]) -> Any:
        files = {key: self.copy.open(data, key) for key in self.copy.keys}
        image = files["image"]
        affine = torch.tensor(image.about["affine"], dtype=torch.float64).view(4, 4)
        size = np.array(image.shape)
        for pad in self.pads:
            padder = getattr(pad.padder, "padder", pad.padder)
            size = np.maximum(size, padder.spatial_size)
        before = (size - image.shape) // 2
        # expand() repeats one voxel, so that neither padding nor cropping moves any
        blank = torch.zeros((), dtype=torch.uint8).expand(1, *size.tolist())
        padded = affine @ _shift(-before)
        part: Any = {**data}
        for key in files:
            part[key] = MetaTensor(blank, affine=padded, meta={"filename_or_obj": data[key]})
        if self.crop is not None and "label" in files:
            for name in ("fg", "bg"):
                index = np.frombuffer(files["label"].about[name], "<u4").astype(np.int64)
                place = np.stack(np.unravel_index(index, image.shape)) + before[:, None]
                part[name] = np.ravel_multi_index(tuple(place), tuple(size))
        for transform in [*self.pads, *([self.crop] if self.crop is not None else [])]:
            part = transform(part)
        parts = [
            self._fill(one, files, affine) for one in (part if isinstance(part, list) else [part])
        ]
        return parts if isinstance(part, list) else parts[0]

    def _fill(self, part: Any, files: dict[str, ChunkFile], affine: torch.Tensor) -> dict[str, Any]:
        """The part with its voxels."""
        place: MetaTensor = part["image"]
        step = torch.linalg.solve(affine, place.affine.double())
        start = step[:3, 3].round().long().tolist()
        for key, file in files.items():
            voxels = torch.from_numpy(file.read(start, place.shape[1:]))[None]
            meta = {"filename_or_obj": part[key].meta["filename_or_obj"]}
            part[key] = MetaTensor(voxels, affine=place.affine, meta=meta)
        return part


class RandReadPreparedd(ReadPreparedd, Randomizable):
    """``ReadPreparedd`` with a random crop, which draws as it does after loading."""

    def set_random_state(self, seed: Any = None, state: Any = None) -> RandReadPreparedd:
        self.crop.set_random_state(seed, state)
        return self


def _shift(voxels: np.ndarray) -> torch.Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.as_tensor(voxels.astype(np.float64))
    return matrix


def loading(
    load_transforms: Sequence[Any], copy: PreparedCopy | None, augment: Sequence[Any] = ()
) -> list:
    """Transforms of a dataset: those given, or ``ReadPreparedd`` in place of loading and cropping.

    Args:
        load_transforms: deterministic ones, with pads last.
        copy: from ``prepared_copy``, made of the same transforms; None reads the files.
        augment: random ones; with a copy a leading crop is replaced, too.
    """
    if copy is None:
        return [*load_transforms, *augment]
    crop = augment[0] if augment and isinstance(augment[0], CROPS) else None
    pads = [t for t in load_transforms if isinstance(t, PADS)]
    if crop is None:
        return [ReadPreparedd(copy, pads), *augment]
    return [RandReadPreparedd(copy, pads, crop), *augment[1:]]
