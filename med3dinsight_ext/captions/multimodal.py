"""Captions by a multimodal language model: prompts, pictures and the loop over volumes."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from med3dinsight_ext.captions.answer_log import AnswerLog, Slot
from med3dinsight_ext.captions.captioner import Captioner, SlicedVolume
from med3dinsight_ext.captions.cleaning import Reply, clean_caption
from med3dinsight_ext.data.slicing import PLANES, WINDOWS, cut, depth
from med3dinsight_ext.io.console import Bar

logger = logging.getLogger(__name__)
PROMPT = (
    "This is one {plane} slice of a {modality} scan of the {body_part}, from the {depth} part of "
    "the scan; a voxel is {spacing}. In at most two sentences, name the anatomy that is visible "
    "and any abnormality. Say only what the image shows; do not guess, and give no advice."
)
FIELDS = ("modality", "plane", "depth", "spacing", "body_part")


class SliceRequest(NamedTuple):
    """One slice for a model to describe."""

    volume: int  # number of its volume in this run
    row: int  # of the slice in its volume's entry
    prompt: str
    image: Image.Image  # mode "L" or "RGB"


def check_least(**settings: tuple[float | None, float]) -> None:
    """Raise ValueError for a value that is not None and not at least its bound."""
    for name, (value, least) in settings.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}; correct captioner")


class Questions(NamedTuple):
    """The slices of one volume to describe: row in the entry, slot, prompt and picture of each."""

    rows: list[int]
    slots: list[Slot]
    prompts: list[str]
    images: list[Image.Image]


class _Open(NamedTuple):
    """A volume that lacks answers, without its pictures."""

    volume: SlicedVolume
    slots: dict[int, Slot]
    log: AnswerLog
    missing: set[int]


class MllmCaptions(Captioner):
    """Captions by a multimodal model. Subclasses implement ``model_fingerprint`` and ``answers``.

    Args:
        prompt: text with any of ``{modality}``, ``{plane}``, ``{depth}``, ``{spacing}`` and
            ``{body_part}`` (the datalist's ``body_part``, else "body").
        max_tokens: upper bound of an answer's tokens, >= 1.
        temperature: of sampling, >= 0; 0 is greedy.
        seed: of sampling.
        per_plane: captioned slices a plane, >= 1, evenly spread over the embedded ones; None
            captions all.
        size: pixels of the longer side of a picture, >= 1.
        ct_window: window of CT pictures, a name of ``slicing.WINDOWS``, or "all" for three as RGB.

    Attributes:
        tokens: read and written so far, where the model reports them.

    Raises:
        TypeError: the prompt is not text.
        ValueError: another argument is out of range.
    """

    def __init__(
        self,
        prompt: str = PROMPT,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        per_plane: int | None = None,
        size: int = 448,
        ct_window: str = "soft tissue",
    ) -> None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be text, got {prompt!r}; leave it out for the default")
        try:
            prompt.format(**dict.fromkeys(FIELDS, "text"))
        except (ValueError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(
                f"prompt must use no field but {', '.join(FIELDS)}, got {prompt!r} ({error}); "
                "double braces that are text"
            ) from error
        check_least(max_tokens=(max_tokens, 1), temperature=(temperature, 0))
        check_least(per_plane=(per_plane, 1), size=(size, 1))
        if ct_window not in (*WINDOWS, "all"):
            raise ValueError(
                f"ct_window must be one of {', '.join(WINDOWS)} or all, got {ct_window!r}"
            )
        self.prompt, self.max_tokens, self.temperature = prompt, max_tokens, temperature
        self.seed, self.per_plane, self.size, self.ct_window = seed, per_plane, size, ct_window
        self.tokens = 0

    @property
    @abstractmethod
    def model_fingerprint(self) -> str:
        """Everything about the model that changes an answer; found without loading weights."""

    @abstractmethod
    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Each request with the model's raw answer, in any order.

        Args:
            requests: taken lazily and by the caller's thread alone; each holds a picture.

        Raises:
            ValueError: the model or server cannot be used as configured.
            ConnectionError: the server does not answer after all retries.
        """

    @property
    def provenance(self) -> dict[str, Any]:
        """Kind, model, prompt and decoding."""
        return {
            "kind": type(self).__name__,
            "model": self.model_fingerprint,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "size": self.size,
            "ct_window": self.ct_window,
        }

    def answer_fingerprint(self, item: dict) -> str:
        """Hash of model, prompt, decoding and picture settings."""
        parts = [
            self.model_fingerprint,
            self.prompt,
            self.max_tokens,
            self.temperature,
            self.seed if self.temperature else None,
            self.size,
            self.ct_window,
            item.get("body_part"),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fingerprint(self, item: dict) -> str:
        """Hash of the answers' settings, and the number of captioned slices."""
        return f"{self.answer_fingerprint(item)}:{self.per_plane}"

    def max_calls(self, slices: Sequence[int]) -> int:
        """See ``Captioner``."""
        return sum(min(n, self.per_plane or n) for n in slices)

    def selected_rows(self, plane: Tensor) -> list[int]:
        """Rows of ``plane`` (s,), sorted, whose slices are captioned."""
        rows = []
        for p in range(len(PLANES)):
            of_plane = (plane == p).nonzero().flatten().tolist()
            count = min(len(of_plane), self.per_plane or len(of_plane))
            rows += [of_plane[int((i + 0.5) * len(of_plane) / count)] for i in range(count)]
        return rows

    def prepare(
        self, item: dict, shown: Tensor, spacing: Sequence[float], slots: Sequence[tuple[int, int]]
    ) -> Questions:
        """See ``Captioner``: prompts and pictures of the captioned slices."""
        rows = self.selected_rows(torch.tensor([p for p, _ in slots]))
        questions = Questions(rows, [], [], [])
        for p, index in (slots[row] for row in rows):
            position = (index + 0.5) / shown.shape[p + 1]
            questions.slots.append((PLANES[p], index))
            questions.prompts.append(self.slice_prompt(item, p, position, spacing))
            questions.images.extend(self.pictures(shown, spacing, p, torch.tensor([position])))
        return questions

    def caption_volumes(
        self,
        volumes: Iterable[SlicedVolume],
        write: Callable[[SlicedVolume, dict[int, Reply]], None],
        count: int,
        slices: Sequence[int],
    ) -> None:
        """See ``Captioner``; slices of several volumes are open at once.

        So the model never waits for the last slice of a volume. Volumes are taken as slices are,
        so that few of them are in memory; one whose answers are all logged is written at once.
        """
        expected = self.max_calls(slices)
        open_volumes: dict[int, _Open] = {}
        statuses: Counter[str] = Counter()
        unusable = 0

        def finish(done: _Open) -> None:
            done.log.save()  # before the entry exists, after which nobody reads the log again
            replies = {
                row: clean_caption(done.log.answers[slot])._replace(raw=done.log.answers[slot])
                for row, slot in done.slots.items()
            }
            write(done.volume, replies)
            statuses.update(reply.status for reply in replies.values())

        def requests() -> Iterator[SliceRequest]:
            for number, volume in enumerate(volumes):
                assert volume.answers is not None
                log, questions = AnswerLog(volume.answers, self.provenance), volume.questions
                slots = dict(zip(questions.rows, questions.slots, strict=True))
                missing = {row for row, slot in slots.items() if slot not in log.answers}
                bar.total += len(missing) - expected
                current = _Open(volume._replace(questions=None), slots, log, missing.copy())
                if not missing:
                    finish(current)
                    continue
                open_volumes[number] = current
                for row, *question in zip(
                    questions.rows, questions.prompts, questions.images, strict=True
                ):
                    if row in missing:
                        yield SliceRequest(number, row, *question)

        with Bar(total=count * expected, unit="slice", desc="caption") as bar:
            for request, answer in self.answers(requests()):
                current = open_volumes[request.volume]
                current.log.add(current.slots[request.row], answer)
                current.missing.discard(request.row)
                unusable += clean_caption(answer).text is None
                bar.set_postfix(tokens=self.tokens, unusable=unusable, refresh=False)
                bar.update()
                if not current.missing:
                    finish(open_volumes.pop(request.volume))
        listed = ", ".join(f"{n:,} {status}" for status, n in statuses.most_common())
        logger.info(f"answers: {listed}")

    def slice_prompt(
        self, item: dict, plane: int, position: float, spacing: Sequence[float]
    ) -> str:
        """The prompt of one slice.

        Args:
            item: with ``modality`` and optionally ``body_part``; nothing else of it is used.
            plane: 0 sagittal, 1 coronal, 2 axial.
            position: fraction of the extent, in [0, 1].
            spacing: mm a voxel along x, y, z.
        """
        across, up = (mm for axis, mm in enumerate(spacing) if axis != plane)
        return self.prompt.format(
            modality=item["modality"],
            plane=PLANES[plane],
            depth=depth(plane, position),
            spacing=f"{across:.2g} x {up:.2g} mm",
            body_part=item.get("body_part") or "body",
        )

    def pictures(
        self, shown: Tensor, spacing: Sequence[float], plane: int, position: Tensor
    ) -> list[Image.Image]:
        """Slices of one plane as images whose longer side is ``size``.

        Args:
            shown: (1 or 3, x, y, z) in [0, 1], from ``slicing.window``.
            spacing: mm a voxel along x, y, z.
            plane: 0 sagittal, 1 coronal, 2 axial.
            position: (s,) fractions.
        """
        if len(shown) == 3 and self.ct_window != "all":
            shown = shown[[list(WINDOWS).index(self.ct_window)]]
        pixels = cut(shown, spacing, plane, position, self.size).mul(255).round().byte()
        return [
            Image.fromarray(p[0].numpy() if len(p) == 1 else p.movedim(0, -1).contiguous().numpy())
            for p in pixels
        ]
