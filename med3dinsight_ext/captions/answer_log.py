"""Asks a multimodal model about the slices of many volumes, and remembers every answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from med3dinsight_ext.captions.cleaning import clean_caption
from med3dinsight_ext.captions.multimodal import MllmCaptions, SliceRequest
from med3dinsight_ext.io.files import write_atomic

Slot = tuple[str, int]  # plane and index


class Questions(NamedTuple):
    """What a model is asked about one volume.

    rows: of its entry. slots, prompts, images: of these rows.
    """

    rows: list[int]
    slots: list[Slot]
    prompts: list[str]
    images: list[Image.Image]

    def known(self, log: AnswerLog) -> dict[int, str]:
        """Row to answer, as far as the log has it."""
        pairs = zip(self.rows, self.slots, strict=True)
        return {row: log.known[slot] for row, slot in pairs if slot in log.known}


class AnswerLog:
    """Raw answers about one volume: a line each, written as it comes, so that a kill loses none.

    A line that a kill or a full disk cut short is skipped, and its slice asked about again.

    Args:
        path: JSONL file; its first line tells the origin.
        about: model, prompt and decoding.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = about
        self.known = self._read()

    def _read(self) -> dict[Slot, str]:
        found = {}
        # As bytes: a line may be cut within a letter, and answers may hold odd line separators.
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            try:
                fields = json.loads(line)
                found[fields["plane"], fields["index"]] = fields["answer"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, slot: Slot, answer: str) -> None:
        """Keep one answer."""
        if not self.path.exists():
            self.save()
        self.known[slot] = answer
        with self.path.open("a", encoding="utf-8") as file:  # a cut line must not swallow this one
            file.write("\n" + self._line(slot))

    def save(self) -> None:
        """All answers, another process's too, in the order of planes and indices."""
        self.known = {**self._read(), **self.known}
        lines = [json.dumps(self.about, ensure_ascii=False)]
        lines += [self._line(slot) for slot in sorted(self.known)]
        text = "\n".join(lines) + "\n"
        write_atomic(self.path, lambda draft: draft.write_text(text, "utf-8"))

    def _line(self, slot: Slot) -> str:
        fields = {"plane": slot[0], "index": slot[1], "answer": self.known[slot]}
        return json.dumps(fields, ensure_ascii=False)


class _Open(NamedTuple):
    questions: Questions
    log: AnswerLog
    left: set[int]


def caption_volumes(
    captioner: MllmCaptions,
    volumes: Iterable[tuple[int, Questions, AnswerLog]],
    bar: tqdm,
    expected: int,
) -> Iterator[tuple[int, dict[int, str]]]:
    """Number and raw answers (row to text) of each volume, once all of them are there.

    Slices of several volumes are under way at once, so that the model never waits for a volume's
    last slice; volumes are taken as slices are, so that few of them are in memory.

    Args:
        captioner: the model.
        volumes: number, questions and log; each lacks an answer.
        bar: counts slices, and shows tokens and what was not usable.
        expected: slices that ``bar.total`` counts for each volume; corrected here.
    """
    under_way: dict[int, _Open] = {}
    unusable = 0

    def requests() -> Iterator[SliceRequest]:
        for number, questions, log in volumes:
            slots = dict(zip(questions.rows, questions.slots, strict=True))
            left = {row for row, slot in slots.items() if slot not in log.known}
            under_way[number] = _Open(questions, log, left)
            bar.total += len(left) - expected
            for row, prompt, image in zip(
                questions.rows, questions.prompts, questions.images, strict=True
            ):
                if row in left:
                    yield SliceRequest(number, row, prompt, image)

    for request, answer in captioner.answers(requests()):
        volume = under_way[request.volume]
        slot = volume.questions.slots[volume.questions.rows.index(request.row)]
        volume.log.add(slot, answer)
        volume.left.discard(request.row)
        unusable += clean_caption(answer).text is None
        bar.set_postfix(tokens=captioner.tokens, unusable=unusable, refresh=False)
        bar.update()
        if not volume.left:
            questions, log, _ = under_way.pop(request.volume)
            log.save()  # before its entry is there, after which nobody looks at the log again
            yield request.volume, questions.known(log)
