"""One entry of the embedding store: its slices, their embeddings and its two files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dinsight_ext.captions.captioner import Captioner, SlicedVolume
from med3dinsight_ext.captions.cleaning import Reply
from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.volumes import check_straight, modality_of, read_volume
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.teachers.teacher import Teacher

REMADE = "delete it, and the next run makes it again"  # what to do about a broken file


def read_entry(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an entry, see ``EntryMaker``.

    Raises:
        ValueError: the file is broken, or its tensors do not fit together.
    """
    with readable("entry", path, REMADE):
        entry = load_file(path)
        slices, texts = len(entry["plane"]), len(entry["text_row"])
        shapes = {"plane": (slices,), "position": (slices,), "image": (slices, -1), "size": (3,),
                  "text_row": (texts,), "affine": (4, 4), "modality": ()}  # fmt: skip
        shapes |= {"text": (texts, -1)} if texts else {}
        for name, shape in shapes.items():
            entry[name].view(shape)
        rows, planes = entry["text_row"], entry["plane"]
        if (planes >= 3).any() or (rows < 0).any() or (rows >= slices).any():
            raise IndexError("a plane or row is out of range")
        if not all(torch.isfinite(value).all() for value in entry.values()):
            raise ValueError("NaN or infinity")
        torch.linalg.inv(entry["affine"].double())
    return entry


class SliceChoice(NamedTuple):
    """Which slices are drawn: how many a plane, with which seed, from which planes."""

    per_plane: int
    seed: int
    planes: list[int]

    @classmethod
    def of(cls, per_plane: int, seed: int, planes: str | Sequence[str]) -> SliceChoice:
        """From the names of planes, or of one.

        Raises:
            ValueError: ``per_plane`` is no number from 1, or there is no plane.
        """
        if not isinstance(per_plane, int) or per_plane < 1:
            raise ValueError(f"per_plane must be a whole number from 1, got {per_plane!r}")
        names = [planes] if isinstance(planes, str) else planes
        if not names:
            raise ValueError("planes must name at least one plane, got none; leave it out for all")
        return cls(per_plane, seed, sorted({slicing.plane_number(p) for p in names}))

    def counts(self) -> list[int]:
        """Number of drawn slices in each plane."""
        return [self.per_plane * (p in self.planes) for p in range(len(slicing.PLANES))]


class EntryMaker:
    """Cuts volumes into slices and writes their entries.

    An entry is a safetensors file (float16 embeddings ``image`` (s, d) and ``text`` (t, d'),
    ``plane``, ``position``, ``text_row``, ``modality``, ``affine``, ``size``) and a JSON file with
    the captions and their provenance. The former is written last and marks the entry complete.

    Args:
        teacher: embeds slices and captions.
        captioner: selects slices and names its provenance.
        choice: slices that are drawn beside those the captioner requires.
    """

    def __init__(self, teacher: Teacher, captioner: Captioner, choice: SliceChoice) -> None:
        self.teacher, self.captioner, self.choice = teacher, captioner, choice
        self._texts: dict[str, Tensor] = {}

    def cut(self, item: dict[str, Any], path: Path, answers: Path | None) -> SlicedVolume:
        """Choose and cut the slices of one volume.

        Args:
            item: of the datalist: image, modality.
            path: of the entry.
            answers: file of a model's raw answers.

        Raises:
            ValueError: the volume is bad or sheared, or a caption does not fit it.
        """
        volume = read_volume(item["image"])
        check_straight(volume, item["image"])
        modality = modality_of(item, volume)
        item = {**item, "modality": modality}
        shown, size = slicing.window(volume, modality), volume.shape[1:]
        required = self.captioner.required(item, size)
        drawn = slicing.choose(shown, *self.choice)
        planes, positions = (torch.cat(pair).tolist() for pair in zip(required, drawn, strict=True))
        slots = sorted(
            {
                (p, min(int(t * size[p]), size[p] - 1))
                for p, t in zip(planes, positions, strict=True)
            }
        )
        plane = torch.tensor([p for p, _ in slots])
        position = torch.tensor([(i + 0.5) / size[p] for p, i in slots])
        spacing, pixels = volume.pixdim.tolist(), self.teacher.image.size
        slices = slicing.cut_planes(shown, spacing, plane, position, pixels)
        questions = self.captioner.prepare(item, shown, spacing, slots)
        return SlicedVolume(
            path, item, plane, position, slices, volume.affine, torch.tensor(size),
            answers, questions,
        )  # fmt: skip

    def write(self, volume: SlicedVolume, replies: dict[int, Reply]) -> None:
        """Embed slices and captions, and write both files of the entry.

        Args:
            volume: from ``cut``.
            replies: caption, or the reason why there is none, by row.

        Raises:
            ValueError: the teacher gave NaN or infinity.
        """
        texts = {row: text for row, (text, *_) in sorted(replies.items()) if text is not None}
        tensors = {
            "plane": volume.plane.to(torch.uint8),
            "position": volume.position.float(),
            "modality": torch.tensor(slicing.MODALITIES.index(volume.item["modality"])),
            "image": self.teacher.encode_image(volume.slices).half(),
            "text_row": torch.tensor(list(texts), dtype=torch.int32),
            "affine": volume.affine.double().contiguous(),
            "size": volume.size.to(torch.int32),
        }
        similarity: dict[int, float] = {}
        if texts:
            tensors["text"] = self._embed_texts(list(texts.values())).half()
        for kind in tensors.keys() & {"image", "text"}:
            if not tensors[kind].isfinite().all():
                raise ValueError(
                    f"{kind} embeddings must be finite, got NaN or infinity for "
                    f"{volume.item['image']}; try the teacher in float32, or on a CPU"
                )
        if texts:
            if self.teacher.joint:
                product = tensors["image"][list(texts)].float() * tensors["text"].float()
                similarity = dict(zip(texts, product.sum(1).tolist(), strict=True))
        about = {
            "image": str(volume.item["image"]),
            "modality": volume.item["modality"],
            "teacher": self.teacher.fingerprint,
            "joint": self.teacher.joint,
            "captioner": self.captioner.provenance,
            "per_plane": self.choice.per_plane,
            "seed": self.choice.seed,
            "slices": _rows(volume, replies, similarity),
        }
        # A file name need not be UTF-8; JSON has an escape for such letters.
        text = json.dumps(about, indent=1, ensure_ascii=False)
        readable = text.encode("utf-8", "backslashreplace")
        write_atomic(volume.path.with_suffix(".json"), lambda draft: draft.write_bytes(readable))
        write_atomic(volume.path, lambda draft: save_file(tensors, draft))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings whose last bit does not depend on earlier volumes."""
        if not self.captioner.few_texts:
            unique = sorted(set(texts))
            found = dict(zip(unique, self.teacher.encode_text(unique), strict=True))
            return torch.stack([found[text] for text in texts])
        for text in set(texts) - self._texts.keys():
            self._texts[text] = self.teacher.encode_text([text])[0]
        return torch.stack([self._texts[text] for text in texts])


def _rows(
    volume: SlicedVolume, replies: dict[int, Reply], similarity: dict[int, float]
) -> list[dict[str, Any]]:
    """Rows of the slices in the JSON file."""
    rows = []
    pairs = zip(volume.plane.tolist(), volume.position.tolist(), strict=True)
    for row, (p, position) in enumerate(pairs):
        reply = replies.get(row)
        fields = {
            "plane": slicing.PLANES[p],
            "index": int(position * int(volume.size[p])),
            "position": round(position, 4),
            "caption": reply and reply.text,
            "status": reply and reply.status,
            "similarity": round(similarity[row], 4) if row in similarity else None,
        }
        if reply and reply.text is None:
            fields["raw"] = reply.raw
        rows.append(fields)
    return rows
