"""The embedding store: teacher outputs on disk, one entry a volume.

An entry's name is a hash of everything that can change its values, and its file is moved into place
in one step: a stale or half-written entry cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch

from med3dinsight_ext.captions.answer_log import AnswerLog
from med3dinsight_ext.captions.captioner import Captioner, SlicedVolume
from med3dinsight_ext.captions.cleaning import Reply
from med3dinsight_ext.captions.sources import shape_of
from med3dinsight_ext.data.costs import measure
from med3dinsight_ext.data.slicing import PLANES
from med3dinsight_ext.embeddings.entry import EntryMaker, SliceChoice
from med3dinsight_ext.embeddings.shards import (
    check_unchanged,
    merge_ranks,
    part_of,
    paths_of,
    rank_share,
    without,
)
from med3dinsight_ext.embeddings.usable_captions import caption_statuses, shown
from med3dinsight_ext.io.files import HashMemo, keyed_path, write_atomic
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.io.remote import local_path
from med3dinsight_ext.teachers.teacher import Teacher

logger = logging.getLogger(__name__)
BYTES_A_SLICE, BYTES_A_VOLUME = 300, 1500  # text and numbers beside the embeddings
FORMAT = 2  # raise it when slicing, windows or entries change


class Store:
    """Embeddings and captions of plane slices, computed once and then read by training.

    Args:
        root: folder; many writers may share it.
        teacher: frozen encoders; run only for volumes without an entry.
        captioner: slice to text.
        per_plane: slices drawn in each plane, beside those that the captioner requires.
        seed: of that draw.
        device: where the teacher computes.
        planes: names of the planes to draw from.
        readers: threads that read and cut volumes while the teacher computes.

    Raises:
        ValueError: ``root`` is an address; ``planes`` is empty or names an unknown plane.

    Examples:
        >>> import tempfile, nibabel, numpy, safetensors.torch
        >>> from med3dinsight_ext import TemplateCaptions
        >>> from med3dinsight_ext.teachers.towers import ImageTower, TextTower
        >>> class Pixels(ImageTower):
        ...     size, mean, std, fingerprint = 8, [0.0] * 3, [1.0] * 3, "pixels"
        ...     def embed(self, pixels):
        ...         return pixels.mean(1).flatten(1)
        >>> class Lengths(TextTower):
        ...     fingerprint, fits = "lengths", lambda self, text: True
        ...     def embed(self, texts):
        ...         return torch.tensor([[len(text), 1.0] for text in texts])
        >>> folder = tempfile.TemporaryDirectory()
        >>> image = f"{folder.name}/mr.nii.gz"
        >>> volume = numpy.random.default_rng(0).random((8, 9, 10))
        >>> nibabel.save(nibabel.Nifti1Image(volume, numpy.eye(4)), image)
        >>> teacher = Teacher(Pixels(), Lengths())
        >>> store = Store(f"{folder.name}/store", teacher, TemplateCaptions(), per_plane=2)
        >>> store.embedding_dims
        {'image': 64, 'text': 2}
        >>> items = store.fill([{"image": image, "modality": "MR"}])
        >>> safetensors.torch.load_file(items[0]["targets"])["text"].shape
        torch.Size([6, 2])
    """

    def __init__(
        self,
        root: str | Path,
        teacher: Teacher,
        captioner: Captioner,
        per_plane: int = 16,
        seed: int = 0,
        device: str | torch.device = "cpu",
        planes: Sequence[str] = PLANES,
        readers: int = 1,
    ) -> None:
        self.root = local_path(root, "store_dir")
        self.readers = max(1, readers)
        self.teacher = teacher.on(device)
        self.captioner = captioner
        self.choice = SliceChoice.of(per_plane, seed, planes)
        self.entries = EntryMaker(self.teacher, captioner, self.choice)
        self._teacher_print = teacher.fingerprint
        self._hashes = HashMemo(self.root / "files.jsonl")

    def reload(self) -> None:
        """Read the hashes of files that other processes have added to the folder."""
        self._hashes = HashMemo(self.root / "files.jsonl")

    def path(self, item: dict[str, Any]) -> Path:
        """Path of the item's entry, whether it exists or not.

        Args:
            item: of the datalist: image, modality.

        Raises:
            ValueError: the image is not a file.
        """
        per_plane, seed, planes = self.choice
        captions = self.captioner.fingerprint(item)
        settings = [self._teacher_print, captions, per_plane, planes, seed]
        return keyed_path(self.root, [*self._content(item), *settings], ".safetensors")

    def answers_path(self, item: dict[str, Any]) -> Path | None:
        """Path of a model's raw answers, shared by all teachers; None without a model."""
        answers = self.captioner.answer_fingerprint(item)
        if answers is None:
            return None
        return keyed_path(self.root / "answers", [*self._content(item), answers], ".jsonl")

    def _content(self, item: dict[str, Any]) -> list[Any]:
        return [FORMAT, *self._hashes.content(item["image"]), item["modality"]]

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Length of each target space: {"image": d, "text": d'}, or {"joint": d} if it is one."""
        name = hashlib.sha256(self._teacher_print.encode()).hexdigest()[:16]
        path = self.root / f"teacher-{name}.json"
        known = _known_dims(path, self._teacher_print)
        if known and ("joint" in known) == self.teacher.joint:
            return known
        size = self.teacher.image.size
        image = self.teacher.encode_image(torch.zeros(1, 1, size, size)).shape[1]
        text = self.teacher.encode_text(["image"]).shape[1]
        self.teacher.free()
        dims = {"joint": image} if self.teacher.joint else {"image": image, "text": text}
        about = {"fingerprint": self._teacher_print, "embedding_dims": dims}
        try:
            write_atomic(path, lambda draft: draft.write_text(json.dumps(about)))
        except OSError as error:  # a read-only store
            logger.warning(f"{path} could not be written: {error}")
        return dims

    def fill(
        self, items: Sequence[dict[str, Any]], skip_bad: bool = False, shard: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the entries that do not exist, and find bad volumes.

        Each rank of a process group makes its share. No work is repeated after an interruption: an
        entry is complete or absent, and each answer of a multimodal model is logged as it arrives.

        Args:
            items: from ``datalist``: image, modality.
            skip_bad: leave bad volumes out with a warning, instead of raising.
            shard: "3/16" takes the third of sixteen parts, for independent jobs on one store.

        Returns:
            The items, each with ``targets``, the path of its entry, and ``content``, a hash of the
            image. Of the shard alone.

        Raises:
            ValueError: volumes are bad; names all of them, after the good ones are stored. Or the
                captions do not belong to the items.
            ConnectionError: a served captioner does not answer.
        """
        self.captioner.check_items(items)
        items = part_of(items, shard)
        bad: dict[str, str] = {}
        paths = paths_of(items, rank_share(len(items)), self.path, bad)
        bad = merge_ranks(bad | self._make(items, paths))
        contents = merge_ranks(
            {str(i): "".join(self._hashes.content(items[i]["image"])) for i in paths}
        )
        paths = {
            int(i): Path(p)
            for i, p in merge_ranks({str(i): str(p) for i, p in paths.items()}).items()
        }
        good = without(items, bad, skip_bad)
        return [
            {**items[i], "targets": str(paths[i]), "content": contents[str(i)]}
            for i in sorted(paths)
            if items[i]["image"] in good
        ]

    def _make(self, items: Sequence[dict[str, Any]], paths: dict[int, Path]) -> dict[str, str]:
        """Make the entries that do not exist; image and reason of those that cannot be made."""
        copies: dict[Path, list[dict[str, Any]]] = {}  # copies of a volume share an entry
        for i, path in paths.items():
            copies.setdefault(path, []).append(items[i])
        missing = [path for path in copies if not os.path.exists(path)]
        if not missing:
            return {}
        logger.info(
            f"{len(missing)} of {len(items)} volumes are not in {self.root}: embedding them"
        )
        faults: dict[Path, str] = {}

        def cut(path: Path) -> SlicedVolume:
            item = copies[path][0]
            volume = self.entries.cut(item, path, self.answers_path(item))
            check_unchanged(item, path, self.path)
            return volume

        def volumes() -> Iterator[SlicedVolume]:
            for path, result in read_ahead(cut, missing, self.readers):
                if isinstance(result, Exception):
                    faults[path] = str(result)
                else:
                    yield result

        def write(volume: SlicedVolume, replies: dict[int, Reply]) -> None:
            try:
                self.entries.write(volume, replies)
            except ValueError as error:
                faults[volume.path] = str(error)

        self.captioner.caption_volumes(volumes(), write, len(missing), self.choice.counts())
        self.teacher.free()  # a training needs the memory
        self.captioner.free()
        return {item["image"]: why for path, why in faults.items() for item in copies[path]}

    def embed(
        self, items: Sequence[dict[str, Any]], skip_bad: bool = False, shard: str | None = None
    ) -> None:
        """``fill``, then print the numbers of volumes and captions, and how to view them."""
        filled = self.fill(items, skip_bad, shard)
        if idist.get_rank() > 0:
            return
        print(f"{len(filled):,} volumes are in {self.root}; {shown(caption_statuses(filled))}")
        print(f"view their captions: python -m med3dinsight_ext captions {self.root}")

    def plan(self, items: Sequence[dict[str, Any]], shard: str | None = None) -> dict[str, float]:
        """Print and return the amount of work for ``fill``, which reads three volumes.

        Slices and calls are upper bounds from the headers of at most 200 volumes, since nearly
        empty slices are left out later. A volume that no run has read yet counts as missing.

        Args:
            items: from ``datalist``: image, modality.
            shard: as in ``fill``.

        Returns:
            Numbers of ``volumes``, ``missing`` ones, ``slices``, model ``calls``, and ``logged``
            answers about these volumes, each of which saves a call if its slice is still chosen;
            ``gigabytes``; ``hours`` without the model's calls; gigabytes of ``memory`` of a reader.
        """
        self.captioner.check_items(items)
        items = part_of(items, shard)
        hashed = {item["image"]: self._hashes.get(_file(item)) is not None for item in items}
        missing = [i for i in items if not hashed[i["image"]] or not self.path(i).exists()]
        sample = missing[:: -(-len(missing) // 200) or 1]
        slices = calls = logged = unreadable = 0
        for item in sample:
            try:
                shape = shape_of(item["image"])
            except ValueError:
                unreadable += 1
                continue
            required = self.captioner.required(item, shape)[0]
            sums = torch.bincount(required, minlength=3) + torch.tensor(self.choice.counts())
            counts = [min(n, size) for n, size in zip(sums.tolist(), shape, strict=True)]
            slices += sum(counts)
            calls += self.captioner.max_calls(counts)
            if hashed[item["image"]] and (answers := self.answers_path(item)):
                logged += len(AnswerLog(answers, {}).answers)
        scale = len(missing) / max(len(sample), 1)
        dims = self.embedding_dims
        width = 2 * dims["joint"] if "joint" in dims else sum(dims.values())
        size = scale * (slices * (2 * width + BYTES_A_SLICE) + len(sample) * BYTES_A_VOLUME)
        cut: list[SlicedVolume] = []
        reading = measure(lambda i: cut.append(self.entries.cut(i, self.root, None)), missing)
        embedding = measure(lambda volume: self.teacher.encode_image(volume.slices), cut)
        seconds = max(reading.seconds / self.readers, embedding.seconds)
        found = {
            "volumes": len(items),
            "missing": len(missing),
            "slices": round(scale * slices),
            "calls": round(scale * calls),
            "logged": round(scale * logged),
            "gigabytes": size / 1e9,
            "hours": len(missing) * seconds / 3600,
            "memory": reading.gigabytes,
        }
        print(
            f"{found['volumes']:,} volumes, {found['missing']:,} of them not in {self.root}: "
            f"at most {found['slices']:,} slices, {found['calls']:,} model calls"
            + (f" ({found['logged']:,} answers are logged)" if logged else "")
            + ", "
            f"{found['gigabytes']:.3g} GB; {found['hours']:.2g} hours beside the model's with "
            f"{self.readers} readers of {found['memory']:.2g} GB, as {reading.volumes} volumes "
            f"took {reading.seconds:.2g} s to read and {embedding.seconds:.2g} s to embed; nothing "
            "was made"
            + (f"; {unreadable} of {len(sample)} sampled cannot be read" if unreadable else "")
        )
        return found


def read_ahead(
    read: Callable[[Path], SlicedVolume], paths: Iterable[Path], readers: int = 1
) -> Iterator[tuple[Path, SlicedVolume | Exception]]:
    """Each path with its volume or error, in order; each thread reads one or two ahead."""
    source = iter(paths)
    with ThreadPoolExecutor(readers) as pool:
        waiting = deque((path, pool.submit(read, path)) for path in islice(source, 2 * readers))
        while waiting:
            path, future = waiting.popleft()
            waiting.extend((path, pool.submit(read, path)) for path in islice(source, 1))
            try:
                yield path, future.result()
            except (ValueError, OSError, RuntimeError) as error:
                yield path, error


def _known_dims(path: Path, fingerprint: str) -> dict[str, int] | None:
    """Embedding dimensions from a teacher's file; None if it is missing, broken or of another."""
    try:
        about = read_json(path, "teacher file")
        dims = about["embedding_dims"]
        sound = all(type(n) is int and 0 < n < 2**20 for n in dims.values())
        named = set(dims) in ({"joint"}, {"image", "text"})
        return dims if sound and named and about["fingerprint"] == fingerprint else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _file(item: dict[str, Any]) -> str:
    return item["image"].partition("::")[0]
