"""Training history and progress bar."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from tqdm import tqdm

from med3dinsight_ext.io.console import SECONDS
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import readable

logger = logging.getLogger(__name__)


def _parts(engine: Engine, latest: Callable[[], Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Parts of the last loss, without its graph."""
    return latest() if latest else {"loss": engine.state.output["loss"].detach()}


def scalar_metrics(engine: Engine) -> dict[str, float]:
    """An engine's metrics that are numbers, by name."""
    metrics = engine.state.metrics.items()
    return {name: float(value) for name, value in metrics if not isinstance(value, Mapping)}


class History:
    """One JSON line an epoch: mean of each loss part, seconds, validation metrics.

    A resumed run drops the lines of epochs that it repeats.

    Args:
        path: history.jsonl.
        latest: gives the parts of the last loss, name to value; by default the loss itself.
        evaluator: whose metrics are added, if it has run in this epoch.
    """

    def __init__(
        self,
        path: str | Path,
        latest: Callable[[], Mapping[str, Any]] | None = None,
        evaluator: Engine | None = None,
    ) -> None:
        self.path = Path(path)
        self.latest = latest
        self.evaluator = evaluator
        self._sums: dict[str, Any] = {}
        self._steps = 0
        self._start = 0.0

    def attach(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        kept = [row for row in read_history(self.path) if row["epoch"] <= engine.state.epoch]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomic(self.path, lambda draft: draft.write_text(text))

    def clear(self, engine: Engine) -> None:
        self._sums, self._steps, self._start = {}, 0, time.perf_counter()

    def add(self, engine: Engine) -> None:
        self._steps += 1
        for name, value in _parts(engine, self.latest).items():
            self._sums[name] = self._sums.get(name, 0.0) + value  # tensors: no sync within an epoch

    def write(self, engine: Engine) -> None:
        row: dict[str, Any] = {"epoch": engine.state.epoch, "steps": self._steps}
        row.update({name: float(value) / self._steps for name, value in self._sums.items()})
        row["seconds"] = round(time.perf_counter() - self._start, 3)
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row.update(scalar_metrics(self.evaluator))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a history file, none if there is no file; a last row that was cut off is left out."""
    path = Path(path)
    if not path.exists():
        return []
    with readable("history", path, "move it away to start anew"):
        text = path.read_text("utf-8")
        lines = text.splitlines()
        if lines and lines[-1].startswith("{") and not text.endswith(("}", "\n")):
            del lines[-1]
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["epoch"] >= 0]


class Progress:
    """A bar over the whole run on a terminal; in a file, a plain line an epoch at most.

    Both show the loss parts of the last step, the last validation and the remaining time. ignite's
    ``ProgressBar`` has one bar an epoch, and its loss would be copied from the device every step.

    Args:
        latest: gives the parts of the last loss, name to value; by default the loss itself.
        evaluator: whose key metric is shown.
    """

    def __init__(
        self,
        latest: Callable[[], Mapping[str, Any]] | None = None,
        evaluator: Engine | None = None,
    ) -> None:
        self.latest = latest
        self.evaluator = evaluator
        self._bar: Any = None
        self._start: tuple[float, int] = (0.0, 0)
        self._shown = -math.inf

    def attach(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, self.open)
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self._bar.update())
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.show)
            engine.add_event_handler(Events.COMPLETED, lambda _: self._bar and self._bar.close())

    def open(self, engine: Engine) -> None:
        if self._bar is None:  # not before a checkpoint has set the iteration
            done = engine.state.iteration
            self._start = (time.perf_counter(), done)
            self._bar = tqdm(
                total=_steps(engine), initial=done, unit="step", desc="train", disable=None
            )

    def show(self, engine: Engine) -> None:
        parts = {name: float(value) for name, value in _parts(engine, self.latest).items()}
        if self.evaluator is not None:
            name, found = self.evaluator.state.key_metric_name, self.evaluator.state.metrics
            parts |= {name: float(found[name])} if name in found else {}
        words = {name: f"{value:.4f}" for name, value in parts.items()}
        self._bar.set_postfix({"epoch": engine.state.epoch, **words}, refresh=False)
        now, last = time.perf_counter(), engine.state.epoch == engine.state.max_epochs
        if not self._bar.disable or not (last or now - self._shown > SECONDS):
            return
        self._shown = now
        done = engine.state.iteration
        rate = (now - self._start[0]) / max(1, done - self._start[1])
        left = tqdm.format_interval(rate * (_steps(engine) - done))
        shown = ", ".join(f"{name} {word}" for name, word in words.items())
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {shown}; {left} left")


def _steps(engine: Engine) -> int:
    """Steps of the whole run."""
    length = engine.state.epoch_length or len(engine.state.dataloader)
    return int(engine.state.max_epochs * length)
