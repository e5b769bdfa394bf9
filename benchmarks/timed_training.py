"""Training for a given time instead of a given number of epochs."""

from __future__ import annotations

import math
from time import perf_counter, process_time
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.optim import Optimizer


class TimedCosine:
    """Lowers the learning rates to zero over the seconds of a training, and ends it after them.

    Seconds are those of the clock on a GPU, and of the process on a CPU, so that other processes
    take no time from a training there. It ends after a whole epoch, whose weights are saved.

    Args:
        optimizer: of the trainer.
        rate: the largest learning rate.
        seconds: from the first iteration on.
        warmup: share of them with a linear rise.
    """

    def __init__(
        self, optimizer: Optimizer, rate: float, seconds: float, warmup: float = 0.05
    ) -> None:
        self.optimizer = optimizer
        self.rate = rate
        self.seconds = seconds
        self.warmup = warmup
        self.clock = perf_counter if torch.cuda.is_available() else process_time
        self.begin: float | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)

    def passed(self) -> float:
        """Share of the seconds that have passed, at most 1."""
        self.begin = self.clock() if self.begin is None else self.begin
        return min(1.0, (self.clock() - self.begin) / self.seconds)

    def __call__(self, engine: Engine) -> None:
        passed = self.passed()
        height = 0.5 + 0.5 * math.cos(math.pi * passed)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(height, passed / self.warmup)

    def end(self, engine: Engine) -> None:
        if self.passed() >= 1:
            engine.terminate()


def timed_overlay(seconds: float) -> dict[str, Any]:
    """Overlay of a bundle's train config: ``TimedCosine`` with its learning rate."""
    timing = {
        "_target_": "timed_training.TimedCosine",
        "optimizer": "@optimizer",
        "rate": "@learning_rate",
        "seconds": seconds,
    }
    return {"train_handlers::timing": timing}
