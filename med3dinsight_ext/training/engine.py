"""Training and evaluation runs on MONAI's engines."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.handlers import CheckpointLoader, ValidationHandler
from torch import Tensor, nn

from med3dinsight_ext.io.errors import TRACEBACK, root_cause, wrong_input
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.folder_lock import only_training
from med3dinsight_ext.training import incremental
from med3dinsight_ext.training.checkpoints import (
    POSITION,
    SCALER,
    SETTINGS,
    VALIDATED,
    checkpoint,
    resume,
)
from med3dinsight_ext.training.history import scalar_metrics
from med3dinsight_ext.training.origin import scored
from med3dinsight_ext.training.position import EveryMinutes, Position
from med3dinsight_ext.training.provenance import FixedSettings, image_names
from med3dinsight_ext.training.record import recorded
from med3dinsight_ext.training.weights import not_finite

logger = logging.getLogger(__name__)
CHECK_STEPS = 20  # between two waits for the device, for losses and for clocks


def cause_last() -> None:
    """Print the cause of a failed run last, and nothing else if it is wrong input.

    MONAI wraps it in "Failed to evaluate", with two pages of traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (shown := wrong_input(error)) is not None:
            print(f"\n({TRACEBACK}=1 shows the traceback)", file=sys.stderr)
            print(f"{type(shown).__name__}: {shown}", file=sys.stderr)
            return
        sys.__excepthook__(kind, error, trace)
        if (cause := root_cause(error)) is not error:
            print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)

    sys.excepthook = hook


class StopOnNan:
    """Ends training when a loss or a weight is not finite, before a checkpoint is written.

    Reading a loss waits for the device, so losses are read together, every ``interval`` steps and
    before the end of an epoch.

    Args:
        interval: steps between two readings.
    """

    def __init__(self, interval: int = CHECK_STEPS) -> None:
        self.interval = interval
        self._waiting: list[tuple[int, str, Tensor]] = []  # step, volumes, loss

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self._waiting.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check_weights)

    def check_weights(self, engine: Engine) -> None:
        """Check the losses, then the weights: no loss follows the last step of an epoch."""
        self._check_losses(engine)
        check_weights(engine)

    def __call__(self, engine: Engine) -> None:
        meta = getattr(engine.state.batch["image"], "meta", {})
        names = str(meta.get("filename_or_obj", "this batch"))
        loss = engine.state.output["loss"].detach()
        self._waiting.append((engine.state.iteration, names, loss))
        if len(self._waiting) >= self.interval:
            self._check_losses(engine)

    def _check_losses(self, engine: Engine) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        losses = torch.stack([loss.float().sum() for _, _, loss in waiting]).tolist()
        for (step, names, _), loss in zip(waiting, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"loss must be finite, got {loss} in epoch {engine.state.epoch} at step "
                    f"{step} on {names}; lower learning_rate, or look at these volumes; "
                    "last.ckpt holds an earlier step"
                )


def check_weights(engine: Engine) -> None:
    """Raise a ValueError if a weight of the network or the loss is not finite."""
    parts = (engine.network, engine.loss_function)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if bad := [name for module in modules for name in not_finite(module.state_dict())]:
        raise ValueError(
            f"weights must be finite, got NaN or infinity in {len(bad)} of them ({bad[0]}) "
            f"after step {engine.state.iteration}, in epoch {engine.state.epoch}; lower "
            "learning_rate"
        )


class Scaler:
    """State of the loss scaling of mixed precision, which MONAI makes when a training begins.

    Args:
        trainer: of MONAI; without ``amp`` the state is empty.
    """

    def __init__(self, trainer: Engine) -> None:
        self.trainer = trainer
        self.saved: Mapping[str, Any] = {}
        trainer.add_event_handler(Events.STARTED, self._go_on)

    def state_dict(self) -> Mapping[str, Any]:
        scaler = getattr(self.trainer, "scaler", None)
        return scaler.state_dict() if scaler is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.saved = state

    def _go_on(self) -> None:
        if self.saved and getattr(self.trainer, "scaler", None) is not None:
            self.trainer.scaler.load_state_dict(self.saved)


class Validated:
    """Which cases and metric have chosen the best epoch so far; of others none is the best yet."""

    def __init__(self, evaluator: Engine | None) -> None:
        metric = getattr(evaluator.state, "key_metric_name", None) if evaluator else None
        items = getattr(evaluator.data_loader.dataset, "data", ()) if evaluator else ()
        names = sorted(Path(name).name for name in image_names(items))  # folders may be moved
        self.content = json.dumps([metric, names])
        self.changed = False

    def state_dict(self) -> dict[str, str]:
        """Metric and cases as JSON."""
        return {"json": self.content}

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Compare with those of a checkpoint."""
        self.changed = saved["json"] != self.content
        if self.changed and idist.get_rank() == 0:
            logger.warning("validation is by other cases than before: the best epoch is of these")


class Validation(ValidationHandler):
    """Validates every ``interval`` epochs and after the last one, which MONAI's may miss."""

    def attach(self, engine: Engine) -> None:
        def due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)


def present(**objects: Any) -> dict[str, Any]:
    """The objects that are not None, by name."""
    return {name: value for name, value in objects.items() if value is not None}


def plain_batch(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Image and label of a batch on the device, as plain tensors: metadata slows every layer."""
    values = (torch.as_tensor(batchdata[key]).as_subclass(Tensor) for key in ("image", "label"))
    image, label = (value.to(device, non_blocking=non_blocking, **kwargs) for value in values)
    return image, label


def run(
    trainer: Engine,
    evaluator: Engine | None,
    best: Sequence[Checkpoint],
    state: Mapping[str, Any],
    ckpt_dir: str | Path,
    handlers: Sequence[Any] = (),
    minutes: float | None = None,
) -> None:
    """Train, from ``last.ckpt`` if there is one, writing it after every epoch.

    No other process may train in ``ckpt_dir`` at the same time (``only_training``).

    MONAI Label starts a training by adding a ``CheckpointLoader`` to the config's handlers and
    nothing else, so with one in ``handlers`` the training is ``incremental``.

    Args:
        trainer: runs.
        evaluator: whose metric decides what ``best`` keeps; None keeps the last epoch's.
        best: savers from ``checkpoints.checkpoint``.
        state: all that a resumed run needs, the trainer and the savers among it.
        ckpt_dir: folder of ``last.ckpt``.
        handlers: of the trainer.
        minutes: after which ``last.ckpt`` is written within an epoch, too; None never does.
    """
    loaders = [handler for handler in handlers if isinstance(handler, CheckpointLoader)]
    with only_training(ckpt_dir):
        if loaders:
            incremental.run(trainer, evaluator, best, state, loaders, ckpt_dir)
        else:
            _run(trainer, evaluator, best, state, ckpt_dir, minutes)


def _run(
    trainer: Engine,
    evaluator: Engine | None,
    best: Sequence[Checkpoint],
    state: Mapping[str, Any],
    ckpt_dir: str | Path,
    minutes: float | None,
) -> None:
    """``run`` that is not incremental."""
    path = Path(ckpt_dir) / "last.ckpt"
    if trainer.state.epoch_length == 0:
        raise ValueError(
            "training must have a batch, got none: cases are fewer than batch_size, and "
            "drop_last drops them; lower batch_size or start fewer processes"
        )
    state = {SETTINGS: FixedSettings(), **state, SCALER: Scaler(trainer)}
    state[POSITION] = position = Position(trainer)
    state[VALIDATED] = validated = Validated(evaluator)
    resume(path, state, trainer)
    if validated.changed:
        for saver in best:
            saver._saved = []
    if trainer.state.epoch >= trainer.state.max_epochs:  # ignite would start again at epoch 0
        logger.info(
            f"{path} is trained for {trainer.state.epoch} epochs; raise max_epochs for more"
        )
        return
    for saver in best:
        (evaluator or trainer).add_event_handler(Events.EPOCH_COMPLETED, saver)
    record = recorded(trainer, evaluator, best, ckpt_dir)
    save = checkpoint(state, ckpt_dir, path.name)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, save)
    if minutes is not None:

        def save_sound(engine: Engine) -> None:
            check_weights(engine)
            save(engine)

        interval = CHECK_STEPS * getattr(trainer, "accumulation_steps", 1)
        EveryMinutes(save_sound, minutes, interval).attach(trainer)
    position.go_on()
    trainer.run()
    for saver in best:
        if not saver._saved:  # the validation is disabled
            saver.score_function = None
            saver(trainer)
    record.update(trainer.state.epoch)
    if idist.get_rank() == 0:
        names = ", ".join(str(Path(ckpt_dir) / saver.filename_pattern) for saver in best)
        wrote = f"; wrote {names}{_best(record.content)}" if best else ""
        logger.info(f"trained for {trainer.state.epoch} epochs{wrote}")


def _best(record: Mapping[str, Any]) -> str:
    """The epoch that was kept, and its key metric if it has one."""
    if not record["best_metric"]:
        return " of the last epoch"
    name, found = record["best_metric"]
    return f" of epoch {record['best_epoch']}, {name} {found:.4f}"


def evaluate(
    evaluator: Engine, control: Engine, path: str | Path, weights: str | Path
) -> dict[str, dict[str, float]]:
    """Run an evaluator and its control, and write and log both tables of numbers.

    Args:
        evaluator: with the volumes.
        control: the same with every volume set to zero.
        path: JSON file to write: {"student": metrics, "volume_zero": metrics}, and of which weights
            and cases they are.
        weights: model.pt of the network.
    """
    tables: dict[str, dict[str, float]] = {}
    for name, engine in (("student", evaluator), ("volume_zero", control)):
        engine.run()
        tables[name] = scalar_metrics(engine)
    if idist.get_rank() == 0:
        images = [str(item["image"]) for item in evaluator.data_loader.dataset.data]
        text = json.dumps({**tables, **scored(images, weights)}, indent=1)
        write_atomic(Path(path), lambda draft: draft.write_text(text))
        logger.info(f"wrote {path}\n{summary(tables)}")
    return tables


def summary(tables: Mapping[str, Mapping[str, float]]) -> str:
    """Table of the retrieval metrics: a line for each target and scope."""
    student, zero = tables["student"], tables["volume_zero"]
    lines = [f"{'retrieval':<16}{'k':>4}{'student':>10}{'interval':>18}{'zero':>8}{'chance':>8}"]
    for key in student:
        if key.endswith("_chance"):
            name = key.removesuffix("_chance")
            scope, _, k = name.rpartition("_r")
            interval = f"{student[name + '_low']:.3f} to {student[name + '_high']:.3f}"
            lines.append(
                f"{scope:<16}{k:>4}{student[name]:>10.3f}{interval:>18}"
                f"{zero[name]:>8.3f}{student[key]:>8.3f}"
            )
    return "\n".join(lines)
