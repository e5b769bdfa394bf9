"""Asks a multimodal model about the slices of many volumes, and remembers every answer."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from .files import write_atomic
from .mllm import MllmCaptions, SliceRequest
from .replies import clean

Slot = tuple[str, int]  # plane and index


class Questions(NamedTuple):
    """What a model is asked about one volume.

    rows: of its entry. slots, prompts, images: of these rows.
    """

    rows: list[int]
    slots: list[Slot]
    prompts: list[str]
    images: list[Image.Image]


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
        self.known: dict[Slot, str] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                fields = json.loads(line)
                self.known[fields["plane"], fields["index"]] = fields["answer"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, slot: Slot, answer: str) -> None:
        """Keep one answer."""
        if not self.path.exists():
            self.save()
        self.known[slot] = answer
        with self.path.open("a", encoding="utf-8") as file:  # a cut line must not swallow this one
            file.write("\n" + self._line(slot))

    def save(self) -> None:
        """All answers, tidy, in the order of planes and indices."""
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


def interview(
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
        volumes: number, questions and log.
        bar: counts slices, and shows tokens and what was not usable.
        expected: slices that ``bar.total`` counts for each volume; corrected here.
    """
    under_way: dict[int, _Open] = {}
    complete: deque[int] = deque()
    unusable = 0

    def requests() -> Iterator[SliceRequest]:
        for number, questions, log in volumes:
            slots = dict(zip(questions.rows, questions.slots, strict=True))
            left = {row for row, slot in slots.items() if slot not in log.known}
            under_way[number] = _Open(questions, log, left)
            bar.total += len(left) - expected
            if not left:
                complete.append(number)
            for row, prompt, image in zip(
                questions.rows, questions.prompts, questions.images, strict=True
            ):
                if row in left:
                    yield SliceRequest(number, row, prompt, image)

    def finished() -> Iterator[tuple[int, dict[int, str]]]:
        while complete:
            number = complete.popleft()
            questions, log, _ = under_way.pop(number)
            yield (
                number,
                {
                    row: log.known[slot]
                    for row, slot in zip(questions.rows, questions.slots, strict=True)
                },
            )
            log.save()

    for request, answer in captioner.answers(requests()):
        volume = under_way[request.volume]
        slot = volume.questions.slots[volume.questions.rows.index(request.row)]
        volume.log.add(slot, answer)
        volume.left.discard(request.row)
        if not volume.left:
            complete.append(request.volume)
        unusable += clean(answer).text is None
        bar.set_postfix(tokens=captioner.tokens, unusable=unusable, refresh=False)
        bar.update()
        yield from finished()
    yield from finished()
