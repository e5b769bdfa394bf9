"""Training for a given time instead of a given number of epochs."""

from __future__ import annotations

import math
from time import perf_counter

from ignite.engine import Engine, Events
from torch.optim import Optimizer


class TimedCosine:
    """Lowers the learning rates to zero over the seconds of a training, and ends it after them.

    It ends after a whole epoch, whose weights are saved.

    Args:
        optimizer: of the trainer; its rates at construction are the largest ones.
        seconds: from the first iteration on.
        warmup: share of them with a linear rise.
    """

    def __init__(self, optimizer: Optimizer, seconds: float, warmup: float = 0.05) -> None:
        self.optimizer = optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.seconds = seconds
        self.warmup = warmup
        self.begin: float | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)

    def passed(self) -> float:
        """Share of the seconds that have passed, at most 1."""
        self.begin = perf_counter() if self.begin is None else self.begin
        return min(1.0, (perf_counter() - self.begin) / self.seconds)

    def __call__(self, engine: Engine) -> None:
        passed = self.passed()
        height = 0.5 + 0.5 * math.cos(math.pi * passed)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(height, passed / self.warmup)

    def end(self, engine: Engine) -> None:
        if self.passed() >= 1:
            engine.terminate()
