"""Inference with clicks: each one changes the answer only around itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor

from med3dinsight_ext.data.clicks import META, click_input, draw_click

MOST_CLICKS = 100
HELD = 1.0  # voxels around a click that keep its class, where no click of another is nearer
SAME = 0.5  # voxels between clicks of two classes that leave the place to the network
MARGIN = 4.0  # by which the score of that class is the largest: 98 % after a softmax
RISE = 3.5  # standard deviation, in voxels, of the rise of its score around it
MOST_STEPS = 300  # of a history, in all its branches
Click = tuple[float, ...]  # class, x, y, z
Box = tuple[slice, ...]


@dataclass
class Step:
    """An answer: what a click changed of the answer before it.

    Args:
        box: of (classes, x, y, z) that was changed; of the automatic answer, all.
        scores: in the box, in half precision.
        following: answers to one more click.
    """

    box: Box
    scores: Tensor = field(repr=False)
    following: dict[Click, Step] = field(default_factory=dict, repr=False)


@dataclass
class History:
    """The answers of a network for one volume, so that only a new click is computed.

    A click that is taken back leads to the answer before it.
    """

    automatic: Step | None = None
    steps: int = 0


class ClickInferer(Inferer):
    """Segments without clicks, then lets the network refine the answer around one click at a time.

    The network sees a window of ``patch_size`` around the click with all clicks so far and the
    answer so far; its scores replace the earlier ones in the ball of ``refine_radius`` around the
    click, so that a click changes nothing elsewhere. Where they do not follow the click, the score
    of its class rises around it (``_lift``). The clicked voxels themselves always get the class of
    their click.

    Args:
        inferer: of the whole volume and of a window.
        label_names: of all classes, the background first.
        patch_size: of a window, in voxels.
        radius: of a click in the guidance channels, in voxels.
        refine_radius: in voxels.
        earlier_answer: whether the network takes the earlier answer as channels.
        shape: of a click, as in ``draw_click``.
    """

    def __init__(
        self,
        inferer: Inferer,
        label_names: Sequence[str],
        patch_size: Sequence[int],
        radius: float = 3.0,
        refine_radius: float = 16.0,
        earlier_answer: bool = True,
        shape: str = "disc",
    ) -> None:
        if not refine_radius >= 1:
            raise ValueError(f"refine_radius must be at least 1 voxel, got {refine_radius}")
        self.inferer = inferer
        self.classes = len(label_names)
        self.patch_size = tuple(patch_size)
        self.radius = radius
        self.refine_radius = refine_radius
        self.earlier_answer = earlier_answer
        self.shape = shape
        self.history: History | None = None

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Scores (1, classes, x, y, z).

        Args:
            inputs: (1, 1, x, y, z), with the clicks of ``AddClicksd`` in its metadata.
            network: takes the channels of ``click_input``.
            *args: passed to ``inferer`` for the whole volume.
            **kwargs: likewise.

        ``history``, an attribute, may hold earlier answers for this volume.
        """
        volume = inputs.as_subclass(Tensor)
        if len(volume) != 1:
            raise ValueError(f"batch_size must be 1 for clicks, got {len(volume)}")
        clicks = getattr(inputs, "meta", {}).get(META, torch.zeros(0, 4))
        clicks = [tuple(row) for row in clicks.reshape(-1, 4).tolist()]
        if len(clicks) > MOST_CLICKS:
            raise ValueError(
                f"clicks must be at most {MOST_CLICKS} for a volume, got {len(clicks)}; save the "
                "segmentation and correct the rest by hand"
            )
        history = self.history or History()
        step = history.automatic
        if step is not None and history.steps > MOST_STEPS:
            step.following, history.steps = {}, 0
        if step is None:
            whole = self.inferer(volume, network, *args, **kwargs)[0]
            step = history.automatic = Step((slice(None),), _kept(whole))
        scores = step.scores.float()
        done: list[Click] = []
        while clicks:
            click = next((click for click in clicks if click in step.following), clicks[0])
            clicks.remove(click)
            done.append(click)
            if click not in step.following:
                history.steps += 1
                step.following[click] = self._refine(volume, scores, done, network)
            step = step.following[click]
            scores[step.box] = step.scores.float()
        return scores[None]

    def _refine(
        self, volume: Tensor, scores: Tensor, clicks: list[Click], network: Callable[..., Tensor]
    ) -> Step:
        """What the last click changes of the scores (classes, x, y, z)."""
        size, place = volume.shape[2:], clicks[-1][1:]
        window = tuple(
            slice(low := max(0, min(round(c) - p // 2, n - p)), min(n, low + p))
            for c, p, n in zip(place, self.patch_size, size, strict=True)
        )
        inside = (slice(None), *window)
        before = scores[inside]
        guidance = torch.zeros_like(before)
        for number, *centre in clicks:
            centre = [c - side.start for c, side in zip(centre, window, strict=True)]
            draw_click(guidance[int(number)], centre, self.radius, self.shape)
        answer = None
        if self.earlier_answer:
            hot = F.one_hot(before.max(0).indices, self.classes)
            answer = hot.movedim(-1, 0).to(volume)[None]
        image = click_input(volume[0][inside][None], guidance.to(volume)[None], answer)
        found = self.inferer(image, network)[0].to(before)
        reach = self.refine_radius
        low = [max(0, math.ceil(c - reach)) for c in centre]  # of the last click
        high = [
            min(n, math.floor(c + reach) + 1) for n, c in zip(before.shape[1:], centre, strict=True)
        ]
        inner = (slice(None), *map(slice, low, high))
        starts = [side.start + a for side, a in zip(window, low, strict=True)]
        box = [slice(s, s + b - a) for s, a, b in zip(starts, low, high, strict=True)]
        last = [c - a for c, a in zip(centre, low, strict=True)]
        changed = found[inner].clone()
        if not _contested(clicks[-1], clicks):
            _lift(changed, int(clicks[-1][0]), last)
        near = _squares(changed, last) <= reach**2
        changed = torch.where(near, changed, before[inner])
        _hold(changed, clicks, starts)
        return Step((slice(None), *box), _kept(changed))


def _squares(scores: Tensor, centre: Sequence[float]) -> Tensor:
    """Squared distances (x, y, z) of the voxels of scores (classes, x, y, z) from a place."""
    x, y, z = (
        (torch.arange(n, device=scores.device) - c) ** 2
        for n, c in zip(scores.shape[1:], centre, strict=True)
    )
    return x[:, None, None] + y[:, None] + z


def _contested(click: Click, clicks: Sequence[Click]) -> bool:
    """Whether a click of another class has the same place, so that neither counts more.

    Viewers send the clicks of each class in a list of their own: the last one is not known.
    """
    number, *centre = click
    return any(n != number and math.dist(centre, c) < SAME for n, *c in clicks)


def _lift(scores: Tensor, number: int, place: Sequence[float]) -> None:
    """Raise the score of a click's class around it, by what it lacks to be the largest there.

    Networks are seldom sure enough to follow a click, whose error they made themselves. Voxels
    about which they are as unsure as at the click change with it; others keep their class. BRS
    (Jang and Kim, CVPR 2019) and f-BRS (Sofiiuk et al., 2020, arXiv:2001.10331) find such a change
    by optimisation.

    Args:
        scores: (classes, x, y, z) of a part of the volume, is changed.
        number: class of the click.
        place: of the click, in voxels of the part.
    """
    i, j, k = (min(max(round(c), 0), n - 1) for c, n in zip(place, scores.shape[1:], strict=True))
    here = scores[:, i, j, k]
    others = torch.cat([here[:number], here[number + 1 :]])
    lack = (others.max() + MARGIN - here[number]).clamp(min=0)
    scores[number] += lack * torch.exp(-_squares(scores, place) / (2 * RISE**2))


def _hold(scores: Tensor, clicks: Sequence[Click], starts: Sequence[int]) -> None:
    """Give the voxels of each click its class, so that it is never ignored or undone by another.

    A voxel near clicks of several classes follows the nearest; contested clicks hold nothing.

    Args:
        scores: (classes, x, y, z) of a part of the volume, is changed.
        clicks: of the volume.
        starts: first voxel of the part.
    """
    far = {
        (number, *centre): _squares(scores, [c - s for c, s in zip(centre, starts, strict=True)])
        for number, *centre in clicks
    }
    for click in [click for click in clicks if not _contested(click, clicks)]:
        number, own = click[0], far[click] <= HELD**2
        for other in clicks:
            if other[0] != number:
                own &= far[click] < far[other]
        others = [other for other in range(len(scores)) if other != number]
        scores[int(number), own] = scores[others][:, own].amax(0) + MARGIN


def _kept(scores: Tensor) -> Tensor:
    """Half precision, without infinities."""
    limit = torch.finfo(torch.float16).max
    return scores.clamp(-limit, limit).half()
