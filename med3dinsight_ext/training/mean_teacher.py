"""Mean teacher: the running mean of the weights teaches the network on unlabelled volumes.

Tarvainen and Valpola, 2017 (arXiv:1703.01780).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import Dataset
from monai.engines.utils import IterationEvents
from monai.transforms import Randomizable, Transform
from monai.utils import MAX_SEED
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

KEYS = ("unlabelled", "unlabelled_clean")  # what the network sees, and its mean


class RandUnlabelled(Randomizable, Transform):
    """Adds a patch of a random unlabelled volume to each labelled patch, under ``KEYS``.

    The last transform of the labelled volumes: its draws follow theirs, so that workers, seeds and
    resumed runs treat both alike.

    Args:
        dataset: of unlabelled volumes; its items hold ``image`` and ``clean``, one patch each.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandUnlabelled:
        super().set_random_state(seed, state)
        self.dataset.transform.set_random_state(int(self.R.randint(MAX_SEED, dtype="uint32")))
        return self

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        patch = self.dataset[int(self.R.randint(len(self.dataset)))]
        return {**data, **dict(zip(KEYS, (patch["image"], patch["clean"]), strict=True))}


def ramp_up(share: float) -> float:
    """Rises from 0.007 to 1 as ``share`` rises to 1, then stays (Laine and Aila, arXiv:1610.02242).

    Examples:
        >>> round(ramp_up(0.5), 3), ramp_up(2)
        (0.287, 1.0)
    """
    return math.exp(-5 * (1 - min(share, 1)) ** 2)


class MeanTeacher:
    """Adds to the loss how far the network is from the mean of its weights on unlabelled patches.

    Mean squared difference of the class probabilities. The mean sees the patch without noise, in
    evaluation mode, and has no gradient. It takes no part before the optimizer's first step, after
    which it begins.

    Args:
        average: from ``ema.ema_of``.
        weight: of the difference, once ramped up.
        rampup: share of the training in which the weight rises, in [0, 1].
    """

    def __init__(self, average: AveragedModel | None, weight: float, rampup: float = 0.25) -> None:
        if average is None:
            raise ValueError("ema_decay must be above 0 for a mean teacher, got 0; 0.99 is usual")
        if weight < 0 or not 0 <= rampup <= 1:
            raise ValueError(
                f"consistency_weight must be >= 0 and rampup in [0, 1], got {weight} and {rampup}; "
                "a weight of 0 leaves the unlabelled volumes out"
            )
        self.average, self.weight, self.rampup = average, weight, rampup

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        state = engine.state
        step = state.iteration - 1
        if not self.average.n_averaged:  # it holds no weights yet
            return
        noisy, clean = (
            torch.as_tensor(state.batch[key]).as_subclass(Tensor).to(state.device) for key in KEYS
        )
        with torch.no_grad():
            target = _probabilities(self.average.module.eval()(clean))
        found = _probabilities(engine.network(noisy))
        ramp = self.rampup * state.max_epochs * state.epoch_length  # steps
        weight = self.weight * (ramp_up(step / ramp) if ramp else 1.0)
        state.output["loss"] = state.output["loss"] + weight * (found - target).square().mean()


def _probabilities(output: Any) -> Tensor:
    """Of the classes, at full resolution where a network returns several."""
    logits = output[0] if isinstance(output, (list, tuple)) else output
    return (logits[:, 0] if logits.ndim == 6 else logits).float().softmax(1)
