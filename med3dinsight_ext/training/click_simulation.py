"""Clicks that correct a segmentation, simulated for training and for measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from scipy import ndimage
from torch import Tensor

from med3dinsight_ext.data.clicks import click_input, draw_click

Click = tuple[int, tuple[int, ...]]  # true class, voxel
Region = tuple[int, int, tuple[slice, ...], np.ndarray]  # voxels, class, box, mask in the box


def corrective_clicks(
    prediction: np.ndarray,
    label: np.ndarray,
    random: np.random.RandomState | None = None,
    count: int = 1,
) -> list[Click]:
    """Simulate clicks in the largest errors of a segmentation, each in another error.

    Args:
        prediction: (x, y, z) class numbers.
        label: (x, y, z) true class numbers.
        random: draws regions in proportion to their voxels and a voxel in proportion to its depth,
            so that clicks near borders occur too; None takes the largest regions and their deepest
            voxel, the most central of several.
        count: largest number of clicks.

    Returns:
        True class and voxel of each click; empty if nothing is wrong.
    """
    regions = _error_regions(prediction, label)
    sizes = np.array([region[0] for region in regions], dtype=float)
    count = min(count, len(regions))
    if random and count:
        chosen = random.choice(len(sizes), count, replace=False, p=sizes / sizes.sum())
    else:
        chosen = np.argsort(-sizes, kind="stable")[:count]
    return [_click_in(regions[i], random) for i in chosen]


def _click_in(region: Region, random: np.random.RandomState | None) -> Click:
    """A voxel of a region by its depth."""
    _, number, box, mask = region
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    if random:
        odds = (depth / depth.sum()).ravel()
        inside = np.unravel_index(random.choice(odds.size, p=odds), mask.shape)
    else:
        deepest = np.argwhere(depth == depth.max())
        away = np.linalg.norm(deepest - np.argwhere(mask).mean(0), axis=1)
        inside = tuple(deepest[away.argmin()])
    return number, tuple(int(i) + side.start for i, side in zip(inside, box, strict=True))


def _error_regions(prediction: np.ndarray, label: np.ndarray) -> list[Region]:
    """Connected components of the wrongly classified voxels of each class."""
    wrong = np.where(prediction != label, label + 1, 0)
    found = []
    for number, outer in enumerate(ndimage.find_objects(wrong)):
        if outer is None:
            continue
        parts, _ = ndimage.label(wrong[outer] == number + 1)
        for i, inner in enumerate(ndimage.find_objects(parts), 1):
            mask = parts[inner] == i
            box = tuple(
                slice(a.start + b.start, a.start + b.stop)
                for a, b in zip(outer, inner, strict=True)
            )
            found.append((int(mask.sum()), number, box, mask))
    return found


class SimulatedClicks:
    """A trainer's ``iteration_update`` with clicks simulated in the network's current errors.

    Each item gets 0 or 1 to ``max_clicks`` clicks in up to ``max_rounds`` rounds; the network
    segments it again before each round. An item without clicks has zeros in all channels that
    follow the image, so that the network learns to segment alone too. MONAI's DeepEdit has
    ``Interaction`` for this, whose click transforms fail on a label without errors, need
    scikit-image, and block ranks if the network has running statistics. Draws come from numpy's
    global state, which ``EpochSeed`` seeds.

    Args:
        label_names: of all classes, the background first.
        max_clicks: of an item.
        max_rounds: of an item.
        automatic_share: share of the items without clicks.
        radius: of a click, in voxels.
        earlier_answer: whether the network takes the earlier answer as channels.
        shape: of a click, as in ``draw_click``.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        max_clicks: int = 8,
        max_rounds: int = 3,
        automatic_share: float = 0.3,
        radius: float = 3.0,
        earlier_answer: bool = True,
        shape: str = "disc",
    ) -> None:
        for name, value in (("max_clicks", max_clicks), ("max_rounds", max_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= automatic_share <= 1:
            raise ValueError(f"automatic_share must be in [0, 1], got {automatic_share}")
        self.classes = len(label_names)
        self.max_clicks = max_clicks
        self.max_rounds = max_rounds
        self.automatic_share = automatic_share
        self.radius = radius
        self.earlier_answer = earlier_answer
        self.shape = shape

    def __call__(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        random = np.random.RandomState(np.random.randint(2**31))
        volume, label = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        if label.shape[1] > 1:
            raise ValueError(
                f"labels must be class numbers (b, 1, x, y, z), got {tuple(label.shape)}; use "
                "click.yaml without unlabelled.yaml"
            )
        truth = label[:, 0].cpu().numpy().astype(np.int64)
        guidance = volume.new_zeros((len(volume), self.classes, *volume.shape[2:]))
        answer = torch.zeros_like(guidance) if self.earlier_answer else None
        left = random.randint(1, self.max_clicks + 1, len(volume))
        left[random.random_sample(len(volume)) < self.automatic_share] = 0
        rounds = random.randint(1, self.max_rounds + 1)
        for turn in range(rounds):
            if not len(rows := np.flatnonzero(left)):
                break
            image = click_input(volume, guidance, answer)[rows]
            for row, classes in zip(rows, self._segment(engine, image), strict=True):
                count = -(-left[row] // (rounds - turn))
                left[row] -= count
                prediction = classes.cpu().numpy()
                for number, place in corrective_clicks(prediction, truth[row], random, count):
                    draw_click(guidance[row, number], place, self.radius, self.shape)
                if answer is not None:
                    answer[row] = F.one_hot(classes, self.classes).movedim(-1, 0).to(answer)
        image = click_input(volume, guidance, answer)
        return engine._iteration(engine, {**batchdata, "image": image, "label": label})

    @torch.no_grad()
    def _segment(self, engine: SupervisedTrainer, image: Tensor) -> Tensor:
        """Class numbers (b, x, y, z), without DDP: ranks have different numbers of clicks."""
        network = getattr(engine.network, "module", engine.network)
        network.eval()
        with torch.autocast("cuda", enabled=engine.amp, **engine.amp_kwargs):
            return engine.inferer(image, network).argmax(1)
