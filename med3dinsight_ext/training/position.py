"""Checkpoints within an epoch, from which a run goes on at its next step."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


class Position:
    """The step within an epoch, and the random states of all ranks after it.

    ``EpochSeed`` repeats an epoch's draws, so the batches before the step are loaded again and
    dropped: those after it are what they are without an interruption, and no step is trained twice.

    Args:
        trainer: MONAI's.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._step = 0
        self._random: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """On all ranks together: the states of all are in the checkpoint that one writes."""
        state = self.trainer.state
        step = state.iteration % state.epoch_length
        return {"step": step, "random": _of_all_ranks(_random_states()) if step else []}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._step, self._random = saved["step"], saved["random"]

    def go_on(self) -> None:
        """Let the resumed trainer go on after the step; at an epoch's start if epochs changed."""
        state, loader = self.trainer.state, self.trainer.data_loader
        if state.epoch_length != len(loader):
            was, state.epoch_length = state.epoch_length, len(loader)
            state.iteration = state.epoch * len(loader)
            logger.warning(
                f"an epoch has {len(loader)} steps, {was} when last.ckpt was written: epoch "
                f"{state.epoch + 1} begins anew"
            )
        elif self._step:
            logger.info(f"going on after step {self._step} of epoch {state.epoch + 1}")
            self.trainer.data_loader = _Rest(loader, self._step, self._restore)

    def _restore(self) -> None:
        if len(self._random) != idist.get_world_size():
            count = len(self._random)
            logger.warning(f"last.ckpt is of {count} processes: draws of this epoch differ")
            return
        _set_random_states(self._random[idist.get_rank()])


class _Rest:
    """A data loader whose first epoch begins after some steps."""

    def __init__(self, loader: Any, step: int, begin: Callable[[], None]) -> None:
        self.loader, self.step, self.begin = loader, step, begin

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        if self.step:
            for _ in range(self.step):
                next(batches)
            self.step = 0
            self.begin()
        yield from batches


class EveryMinutes:
    """Calls ``save`` within epochs when minutes have passed by the clock of rank 0.

    The ranks agree every ``interval`` steps, so that their clocks need not.

    Args:
        save: called with the engine, on all ranks.
        minutes: between two calls, and after the end of an epoch.
        interval: steps of an epoch between two looks at the clock.
    """

    def __init__(self, save: Callable[[Engine], Any], minutes: float, interval: int) -> None:
        if minutes <= 0:
            raise ValueError(
                f"checkpoint_minutes must be above 0, got {minutes}; null saves after epochs alone"
            )
        self.save, self.seconds, self.interval = save, 60 * minutes, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self._reset())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _reset(self) -> None:
        self._last = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        step = engine.state.iteration % engine.state.epoch_length
        if step == 0 or step % self.interval:
            return
        due = time.monotonic() - self._last >= self.seconds
        if idist.broadcast(float(due)):
            self.save(engine)
            self._reset()


def _random_states() -> dict[str, Any]:
    """Of torch, numpy and Python, as values that ``weights_only`` allows."""
    _, numbers, place, has_gauss, gauss = np.random.get_state()
    devices = torch.cuda.is_available()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if devices else None,
        "numpy": [torch.from_numpy(np.asarray(numbers, np.int64)), place, has_gauss, gauss],
        "python": random.getstate(),
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    numbers, *rest = states["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def _of_all_ranks(states: dict[str, Any]) -> list[dict[str, Any]]:
    return idist.all_gather(states) if idist.get_world_size() > 1 else [states]
