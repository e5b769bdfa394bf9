"""Teacher outputs on disk, one file a volume.

A file's name is a hash of everything that can change its values, and a file appears whole
(``os.replace``) or not at all: a stale or half-written entry cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import ignite.distributed as idist
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from med3dinsight_ext.captions.answer_log import AnswerLog, Questions, caption_volumes
from med3dinsight_ext.captions.cleaning import Reply, clean_caption
from med3dinsight_ext.captions.multimodal import MllmCaptions
from med3dinsight_ext.captions.sources import Captioner, KnownCaptions, shape_of
from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.io.files import HashMemo, write_atomic
from med3dinsight_ext.teachers.teacher import Teacher

logger = logging.getLogger(__name__)
BYTES_A_SLICE, BYTES_A_VOLUME = 300, 1500  # text and numbers beside the embeddings
FORMAT = 2  # raise it when slicing, windows or this file change what is stored


class Store:
    """Embeddings and captions of plane slices, made once by the teacher and read ever after.

    Args:
        root: folder; many writers may share it.
        teacher: frozen encoders; woken only for volumes that are not there yet.
        captioner: slice to text.
        per_plane: slices a plane that are drawn beside those the captioner has texts for.
        seed: of that draw.
        device: where the teacher computes.
        planes: names of the planes to draw from.
    """

    def __init__(
        self,
        root: str | Path,
        teacher: Teacher,
        captioner: Captioner,
        per_plane: int = 16,
        seed: int = 0,
        device: str | torch.device = "cpu",
        planes: Sequence[str] = slicing.PLANES,
    ) -> None:
        self.root = Path(root)
        self.teacher = teacher.on(device)
        self.captioner = captioner
        self.per_plane = per_plane
        self.seed = seed
        self.planes = sorted(
            {slicing.plane_number(p) for p in ([planes] if isinstance(planes, str) else planes)}
        )
        if not self.planes:
            raise ValueError("planes must name at least one plane, got none; leave it out for all")
        self._teacher_print = teacher.fingerprint
        self._texts: dict[str, Tensor] = {}
        self._hashes = HashMemo(self.root / "files.jsonl")

    def path(self, item: dict[str, Any]) -> Path:
        """Where the item's entry is, or would be."""
        captions = self.captioner.fingerprint(item)
        made = [self._teacher_print, captions, self.per_plane, self.planes, self.seed]
        key = self._key(item, made)
        return self.root / key[:2] / f"{key}.safetensors"

    def log(self, item: dict[str, Any]) -> AnswerLog:
        """What a model answered about the item so far; another teacher asks no second time."""
        assert isinstance(self.captioner, MllmCaptions)
        key = self._key(item, [self.captioner.answer_print(item)])
        return AnswerLog(self.root / "answers" / key[:2] / f"{key}.jsonl", self.captioner.about)

    def _key(self, item: dict[str, Any], made: list[Any]) -> str:
        place = item["image"].partition("::")[2]  # in an archive
        parts = [FORMAT, self._hashes(_file(item)), place, item["modality"], *made]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Name and length of each target space: {"image", "text"}, or {"joint"} for CLIP's kind."""
        name = hashlib.sha256(self._teacher_print.encode()).hexdigest()[:16]
        path = self.root / f"teacher-{name}.json"
        if path.exists() and "embedding_dims" in (about := json.loads(path.read_text())):
            return about["embedding_dims"]
        size = self.teacher.image.size
        image = self.teacher.encode_image(torch.zeros(1, 1, size, size)).shape[1]
        text = self.teacher.encode_text(["image"]).shape[1]
        dims = {"joint": image} if self.teacher.joint else {"image": image, "text": text}
        about = {"fingerprint": self._teacher_print, "embedding_dims": dims}
        try:
            write_atomic(path, lambda draft: draft.write_text(json.dumps(about)))
        except OSError as error:  # a store that may only be read
            logger.warning(f"{path} could not be written: {error}")
        return dims

    def fill(
        self, items: Sequence[dict[str, Any]], skip_bad: bool = False, shard: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the entries that are missing; every volume is read, so this also finds bad ones.

        Each rank of torchrun makes its share. What is done is never done again, whatever ended the
        last run: an entry is there or not, and each answer of a multimodal model is kept as it
        comes.

        Args:
            items: from ``data.datalist``: image, modality.
            skip_bad: leave bad volumes out and list them, instead of raising.
            shard: "3/16" makes the third of sixteen parts, for independent jobs on one store.

        Returns:
            The items, each with ``targets``, the path of its entry. Of the shard alone; and without
            a process group, of the rank alone.

        Raises:
            ValueError: names every bad volume at once; the good ones are stored by then.
        """
        self.captioner.check_items(items)
        items = part_of(items, shard)
        together = dist.is_available() and dist.is_initialized()
        # torchrun's ranks need no process group here, so none waits for another at the end
        rank = dist.get_rank() if together else int(os.environ.get("RANK", 0))
        ranks = dist.get_world_size() if together else int(os.environ.get("WORLD_SIZE", 1))
        # A fixed share: what is missing may look different to a rank that comes later.
        share = range(rank, len(items), ranks)
        bad: dict[str, str] = {}
        paths: dict[int, Path] = {}
        for i in share:
            try:
                paths[i] = self.path(items[i])
            except (OSError, ValueError) as error:
                bad[items[i]["image"]] = str(error)
        twins: dict[Path, list[int]] = {}  # copies of a volume share an entry
        for i, path in paths.items():
            twins.setdefault(path, []).append(i)
        missing = [found[0] for path, found in twins.items() if not os.path.exists(path)]
        if missing:
            logger.info(
                f"{len(missing)} of {len(items)} volumes are not in {self.root}: embedding them"
            )
            faults: dict[int, str] = {}
            prepared = self._sound(self._prepare([(i, items[i]) for i in missing]), faults)
            if isinstance(self.captioner, MllmCaptions):
                self._fill_asking(prepared, items, paths, len(missing))
            else:
                with tqdm(total=len(missing), unit="volume", desc="embed") as bar:
                    for i, made in prepared:
                        known = cast(KnownCaptions, self.captioner)
                        texts = known.caption(made.item, made.plane, made.position)
                        replies = {n: Reply(t, "ok") for n, t in enumerate(texts) if t is not None}
                        self._write(paths[i], items[i], made, replies, {})
                        bar.update()
            bad |= {items[j]["image"]: why for i, why in faults.items() for j in twins[paths[i]]}
        if together:
            for found in idist.all_gather(bad):
                bad = {**bad, **found}
            for found in idist.all_gather({str(i): str(path) for i, path in paths.items()}):
                paths |= {int(i): Path(path) for i, path in found.items()}
        if bad:
            listed = "\n".join(f"  {reason}" for reason in bad.values())
            if not skip_bad or all(items[i]["image"] in bad for i in paths):
                raise ValueError(
                    f"volumes must be readable and not empty, got {len(bad)} bad of {len(items)}; "
                    f"mend them, or set skip_bad to leave them out:\n{listed}"
                )
            logger.warning(f"left out {len(bad)} bad volumes:\n{listed}")
        return [
            {**items[i], "targets": str(paths[i])}
            for i in sorted(paths)
            if items[i]["image"] not in bad
        ]

    def embed(
        self, items: Sequence[dict[str, Any]], skip_bad: bool = False, shard: str | None = None
    ) -> None:
        """``fill``, and say where to look at the result."""
        count = len(self.fill(items, skip_bad, shard))
        print(f"{count:,} volumes are in {self.root}")
        print(f"look at what the teacher says: python -m med3dinsight_ext captions {self.root}")

    def plan(self, items: Sequence[dict[str, Any]], shard: str | None = None) -> dict[str, float]:
        """Print and return what ``fill`` would make: volumes, slices, calls and gigabytes.

        Slices and calls are upper bounds from the headers of at most 200 volumes: nearly empty
        slices will be left out. No volume is read; one that no run has read yet counts as missing.
        """
        self.captioner.check_items(items)
        items = part_of(items, shard)
        read = {item["image"]: self._hashes.knows(_file(item)) for item in items}
        missing = [i for i in items if not read[i["image"]] or not self.path(i).exists()]
        sample = missing[:: -(-len(missing) // 200) or 1]
        slices = calls = 0
        unreadable = 0
        for item in sample:
            try:
                shape = shape_of(item["image"])
            except ValueError:
                unreadable += 1
                continue
            given = torch.bincount(self.captioner.required(item, shape)[0], minlength=3).tolist()
            counts = [
                min(size, given[p] + self.per_plane * (p in self.planes))
                for p, size in enumerate(shape)
            ]
            slices += sum(counts)
            if isinstance(self.captioner, MllmCaptions):
                most = self.captioner.per_plane or max(counts)
                known = len(self.log(item).known) if read[item["image"]] else 0
                calls += max(sum(min(n, most) for n in counts) - known, 0)
        scale = len(missing) / max(len(sample), 1)
        dims = self.embedding_dims
        width = 2 * dims["joint"] if "joint" in dims else sum(dims.values())
        size = scale * (slices * (2 * width + BYTES_A_SLICE) + len(sample) * BYTES_A_VOLUME)
        found = {
            "volumes": len(items), "missing": len(missing), "slices": round(scale * slices),
            "calls": round(scale * calls), "gigabytes": size / 1e9,
        }  # fmt: skip
        print(
            f"{found['volumes']:,} volumes, {found['missing']:,} of them not in {self.root}: "
            f"at most {found['slices']:,} slices, {found['calls']:,} model calls, "
            f"{found['gigabytes']:.3g} GB; nothing was made"
            + (f"; {unreadable} of {len(sample)} looked at cannot be read" if unreadable else "")
        )
        return found

    def _sound(
        self,
        prepared: Iterator[tuple[int, _Prepared | Exception]],
        faults: dict[int, str],
    ) -> Iterator[tuple[int, _Prepared]]:
        """Those that could be read; what is wrong with the others goes into ``faults``."""
        for i, made in prepared:
            if isinstance(made, Exception):
                faults[i] = str(made)
            else:
                yield i, made

    def _fill_asking(
        self,
        prepared: Iterator[tuple[int, _Prepared]],
        items: Sequence[dict[str, Any]],
        paths: dict[int, Path],
        volumes: int,
    ) -> None:
        captioner = cast(MllmCaptions, self.captioner)
        expected = len(self.planes) * min(self.per_plane, captioner.per_plane or self.per_plane)
        waiting: dict[int, _Prepared] = {}
        found: Counter[str] = Counter()

        def questions() -> Iterator[tuple[int, Questions, AnswerLog]]:
            for i, made in prepared:
                assert made.questions is not None
                log, asked = self.log(items[i]), made.questions
                waiting[i] = made._replace(questions=None)
                answers = asked.known(log)
                if len(answers) < len(asked.rows):
                    yield i, asked, log
                else:  # at once: nothing is to be held until some other volume has a question
                    bar.total -= expected
                    log.save()  # a run that was killed may have left it untidy
                    finish(i, answers)

        def finish(i: int, answers: dict[int, str]) -> None:
            replies = {row: clean_caption(answer) for row, answer in answers.items()}
            self._write(paths[i], items[i], waiting.pop(i), replies, answers)
            found.update(reply.status for reply in replies.values())

        with tqdm(total=volumes * expected, unit="slice", desc="caption") as bar:
            for i, answers in caption_volumes(captioner, questions(), bar, expected):
                finish(i, answers)
        logger.info("answers: " + ", ".join(f"{n:,} {status}" for status, n in found.most_common()))

    def _prepare(
        self, items: list[tuple[int, dict[str, Any]]]
    ) -> Iterator[tuple[int, _Prepared | Exception]]:
        """Read and cut the next volume in a thread while the teacher works on this one."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque((pair, pool.submit(self._slices, pair[1])) for pair in items[:2])
            for n in range(len(items)):
                (i, _), future = ahead.popleft()
                if n + 2 < len(items):
                    ahead.append((items[n + 2], pool.submit(self._slices, items[n + 2][1])))
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
        drawn_plane, drawn_position = slicing.choose(shown, self.per_plane, self.seed, self.planes)
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
                slicing.cut(shown, spacing, p, position[plane == p], pixels)
                for p in plane.unique().tolist()
            ]
        )
        full = {**item, "modality": modality}
        questions = None
        if isinstance(self.captioner, MllmCaptions):
            questions = self._questions(self.captioner, full, shown, spacing, unique)
        return _Prepared(
            full, plane, position, slices, volume.affine, torch.tensor(size), questions
        )

    def _questions(
        self,
        captioner: MllmCaptions,
        item: dict[str, Any],
        shown: Tensor,
        spacing: list[float],
        unique: list[tuple[int, int]],
    ) -> Questions:
        rows = captioner.asked(torch.tensor([p for p, _ in unique]))
        slots, prompts, images = [], [], []
        for row in rows:
            p, index = unique[row]
            position = (index + 0.5) / shown.shape[p + 1]
            slots.append((slicing.PLANES[p], index))
            prompts.append(captioner.ask(item, p, position, spacing))
            images += captioner.pictures(shown, spacing, p, torch.tensor([position]))
        return Questions(rows, slots, prompts, images)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings whose last bit does not depend on what was embedded before."""
        if not self.captioner.few_texts:
            unique = sorted(set(texts))
            found = dict(zip(unique, self.teacher.encode_text(unique), strict=True))
            return torch.stack([found[text] for text in texts])
        for text in set(texts) - self._texts.keys():
            self._texts[text] = self.teacher.encode_text([text])[0]
        return torch.stack([self._texts[text] for text in texts])

    def _write(
        self,
        path: Path,
        item: dict[str, Any],
        made: _Prepared,
        replies: dict[int, Reply],
        answers: dict[int, str],
    ) -> None:
        rows = [row for row, reply in sorted(replies.items()) if reply.text is not None]
        tensors = {
            "plane": made.plane.to(torch.uint8),
            "position": made.position.float(),
            "modality": torch.tensor(slicing.MODALITIES.index(made.item["modality"])),
            "image": self.teacher.encode_image(made.slices).half(),
            "text_row": torch.tensor(rows, dtype=torch.int32),
            "affine": made.affine.double().contiguous(),
            "size": made.size.to(torch.int32),
        }
        similarity: dict[int, float] = {}
        if rows:
            tensors["text"] = self._embed_texts([str(replies[row].text) for row in rows]).half()
            if self.teacher.joint:
                product = tensors["image"][rows].float() * tensors["text"].float()
                similarity = dict(zip(rows, product.sum(1).tolist(), strict=True))
        slices = []
        for row, (p, position) in enumerate(
            zip(made.plane.tolist(), made.position.tolist(), strict=True)
        ):
            reply = replies.get(row)
            known = {
                "plane": slicing.PLANES[p],
                "index": int(position * int(made.size[p])),
                "position": round(position, 4),
                "caption": reply and reply.text,
                "status": reply and reply.status,
                "similarity": round(similarity[row], 4) if row in similarity else None,
            }
            if reply and reply.text is None:
                known["raw"] = answers[row]
            slices.append(known)
        about = {
            "image": str(item["image"]),
            "modality": made.item["modality"],
            "teacher": self._teacher_print,
            "joint": self.teacher.joint,
            "captioner": self.captioner.about,
            "per_plane": self.per_plane,
            "seed": self.seed,
            "slices": slices,
        }
        # A file name need not be UTF-8; JSON has an escape for such letters.
        text = json.dumps(about, indent=1, ensure_ascii=False)
        readable = text.encode("utf-8", "backslashreplace")
        write_atomic(path.with_suffix(".json"), lambda draft: draft.write_bytes(readable))
        write_atomic(path, lambda draft: save_file(tensors, draft))  # last: it marks the entry done


def _file(item: dict[str, Any]) -> str:
    return item["image"].partition("::")[0]


class _Prepared(NamedTuple):
    item: dict[str, Any]
    plane: Tensor  # (s,)
    position: Tensor  # (s,)
    slices: Tensor  # (s, c, h, w)
    affine: Tensor  # (4, 4)
    size: Tensor  # (3,)
    questions: Questions | None


def part_of(items: Sequence[dict[str, Any]], shard: str | None) -> list[dict[str, Any]]:
    """Every n-th item from the k-th on, for shard "k/n"."""
    if shard is None:
        return list(items)
    found = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(
            f"shard must be 1/n to n/n, got {shard!r}; --shard 3/16 is the third of sixteen"
        )
    return list(items)[number - 1 :: count]
