"""What MONAI's engines lack for a run that may be killed and resumed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.utils import manual_seed
from torch import nn

from med3dinsight_ext.io.files import write_atomic

logger = logging.getLogger(__name__)


def cause_last() -> None:
    """Let a failed run end with its cause; MONAI ends it with "Failed to evaluate" around that."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is not error:
            print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)

    sys.excepthook = hook


class EpochSeed:
    """Seeds every random source from (seed, epoch), so that a resumed run repeats the same draws.

    Nothing random then has to be saved: an epoch's draws depend on its number only.

    Args:
        seed: of the run.
        loader: its dataset's random transforms and its sampler are seeded too.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        self.seed = seed
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = self.seed + 1_000_003 * engine.state.epoch
        # One stream for each rank; the sampler's permutation must be the same on all.
        own = (seed + 7919 * idist.get_rank()) % 2**32
        manual_seed(own)
        transform: Any = getattr(self.loader.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(own)
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(engine.state.epoch)


class StopOnNan:
    """Ends training when a loss or a weight is not finite, before a checkpoint is written."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check_weights)

    def check_weights(self, engine: Engine) -> None:
        """The last step of an epoch has no loss after it that would show what it did."""
        weights = engine.network.named_parameters()
        if bad := [name for name, value in weights if not value.isfinite().all()]:
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {len(bad)} of them ({bad[0]}) "
                f"after epoch {engine.state.epoch}; lower learning_rate"
            )

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]
        if not torch.isfinite(loss).all():
            meta = getattr(engine.state.batch["image"], "meta", {})
            raise ValueError(
                f"loss must be finite, got {loss.item()} in epoch {engine.state.epoch} at step "
                f"{engine.state.iteration} on {meta.get('filename_or_obj', 'this batch')}; lower "
                "learning_rate, or look at these volumes; last.ckpt holds the epoch before"
            )


class FreezeEncoder:
    """Keeps a network's encoder as it is for the first epochs.

    Norm layers with running statistics still adapt them.

    Args:
        network: whose encoder is frozen.
        encoder: names of the encoder's parameters.
        epochs: how many, 0 for none, -1 for all.
    """

    def __init__(self, network: nn.Module, encoder: Sequence[str], epochs: int) -> None:
        self.parameters = [network.get_parameter(name) for name in encoder]
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        frozen = self.epochs < 0 or engine.state.epoch <= self.epochs
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None  # else momentum would go on moving it


class EMA:
    """Keeps an exponential moving average of the weights, updated after every step.

    Args:
        average: torch's ``AveragedModel``; its first update copies the network.
        network: that is trained.
    """

    def __init__(self, average: torch.optim.swa_utils.AveragedModel, network: nn.Module) -> None:
        self.average = average
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda _: self.average.update_parameters(self.network)
        )


def ema_of(network: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel | None:
    """A moving average of a network's weights, or None if ``decay`` is 0.

    After n steps the past has the weight min(decay, (1 + n) / (10 + n)), so that a short run does
    not end as an average of its first steps.

    Args:
        network: to copy.
        decay: weight of the past at each step, in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}; 0 averages nothing")

    @torch.no_grad()
    def average(past: list[torch.Tensor], now: list[torch.Tensor], steps: torch.Tensor) -> None:
        n = float(steps)
        torch._foreach_lerp_(past, now, 1 - min(decay, (1 + n) / (10 + n)))

    return torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average) if decay else None


def present(**objects: Any) -> dict[str, Any]:
    """The objects that are not None, by name."""
    return {name: value for name, value in objects.items() if value is not None}


def plain_batch(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and label of a batch on the device, as plain tensors: metadata slows every layer."""
    image, label = (
        torch.as_tensor(batchdata[key]).as_subclass(torch.Tensor) for key in ("image", "label")
    )
    return (
        image.to(device=device, non_blocking=non_blocking, **kwargs),
        label.to(device=device, non_blocking=non_blocking, **kwargs),
    )


class KeepingDiskSaver(DiskSaver):
    """Replaces a file in one step. ignite's own saver deletes the old one first."""

    def __init__(self, dirname: str | Path) -> None:
        super().__init__(str(dirname), atomic=True, create_dir=True, require_empty=False)

    def remove(self, filename: str) -> None:
        """Nothing: the next save goes under the same name."""


def checkpoint(
    to_save: Mapping[str, Any],
    dirname: str | Path,
    filename: str,
    metric: str | None = None,
) -> Checkpoint:
    """A stock ignite ``Checkpoint`` that keeps one file under a fixed name.

    Args:
        to_save: name to object; a single network is saved as its flat state dict.
        dirname: folder.
        filename: fixed name.
        metric: save only when this metric of the engine rises; None saves at every call.
    """
    return Checkpoint(
        dict(to_save),
        KeepingDiskSaver(dirname),
        filename_pattern=filename,
        score_function=Checkpoint.get_default_score_fn(metric) if metric else None,
        score_name=metric,
        n_saved=1,
    )


def resume(path: str | Path, objects: Mapping[str, Any], trainer: Engine) -> None:
    """Load a run's last checkpoint into ``objects``, if there is one, and say so.

    Args:
        path: written by ``checkpoint`` with the same ``objects``.
        objects: name to object, the trainer among them.
        trainer: keeps its own ``max_epochs``.

    Raises:
        ValueError: the file is of another run's shape, or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return
    advice = f"move {path} away to start anew, or run with the config that wrote it"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint must be readable, got {path}: {error}; {advice}") from error
    epochs = trainer.state.max_epochs
    try:
        Checkpoint.load_objects(dict(objects), saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint must fit this run, got {path}: {error}; {advice}") from error
    trainer.state.max_epochs = epochs
    logger.info(f"resumed from {path} after epoch {trainer.state.epoch}")


def run(
    trainer: Engine,
    evaluator: Engine | None,
    best: Sequence[Checkpoint],
    state: Mapping[str, Any],
    ckpt_dir: str | Path,
) -> None:
    """Train, from ``last.ckpt`` if there is one, writing it after every epoch.

    Args:
        trainer: runs.
        evaluator: whose metric decides what ``best`` keeps; None keeps the last epoch's.
        best: savers from ``checkpoint``.
        state: all that a resumed run needs, the trainer and the savers among it.
        ckpt_dir: folder of ``last.ckpt``.
    """
    path = Path(ckpt_dir) / "last.ckpt"
    scaler = getattr(trainer, "scaler_", None)
    state = {**state, "scaler": scaler} if scaler else state
    resume(path, state, trainer)
    if trainer.state.epoch >= trainer.state.max_epochs:  # ignite would start again at epoch 0
        logger.info(
            f"{path} is trained for {trainer.state.epoch} epochs; raise max_epochs for more"
        )
        return
    for saver in best:
        (evaluator or trainer).add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint(state, ckpt_dir, path.name))
    trainer.run()
    for saver in best:
        if not saver._saved:  # no epoch was validated
            saver.score_function = None
            saver(trainer)
    if idist.get_rank() == 0:
        names = ", ".join(str(Path(ckpt_dir) / saver.filename_pattern) for saver in best)
        logger.info(f"trained for {trainer.state.epoch} epochs; wrote {names}{_best(evaluator)}")


def _best(evaluator: Engine | None) -> str:
    """Which epoch was kept, if any was judged."""
    name = getattr(evaluator.state, "key_metric_name", None) if evaluator is not None else None
    if evaluator is None or name is None or evaluator.state.best_metric_epoch < 0:
        return " of the last epoch"
    found = evaluator.state.best_metric
    return f" of epoch {evaluator.state.best_metric_epoch}, {name} {found:.4f}"


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a whole trained network, strictly.

    Raises:
        ValueError: the file is missing, unreadable, of another backbone, or holds NaN or infinity.
    """
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise ValueError(f"weights must be at {path}, got nothing; train first") from error
    except Exception as error:
        raise ValueError(
            f"weights in {path} must fit the network of this config; merge the backbone overlay "
            f"they were trained with into config_file: {error}"
        ) from error
    if bad := [name for name, value in network.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(
            f"weights must be finite, got NaN or infinity in {bad[:3]} of {path}; train again with "
            "a lower learning_rate"
        )


def embedding_dims_of(path: str | Path) -> dict[str, int]:
    """Target spaces that a saved student has heads for, and their lengths."""
    if not Path(path).exists():
        raise ValueError(f"student weights must be at {path}, got nothing; train first")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    heads = [key for key in saved if key.startswith("heads.") and key.endswith(".weight")]
    return {key.split(".")[1]: saved[key].shape[0] for key in heads}


def evaluate(evaluator: Engine, control: Engine, path: str | Path) -> dict[str, dict[str, float]]:
    """Run an evaluator and its control, and write and log both tables of numbers.

    Args:
        evaluator: with the volumes.
        control: the same with every volume set to zero.
        path: JSON file to write: {"student": metrics, "volume_zero": metrics}.
    """
    tables = {}
    for name, engine in (("student", evaluator), ("volume_zero", control)):
        engine.run()
        tables[name] = {
            key: float(value)
            for key, value in engine.state.metrics.items()
            if not isinstance(value, Mapping)
        }
    if idist.get_rank() == 0:
        write_atomic(Path(path), lambda draft: draft.write_text(json.dumps(tables, indent=1)))
        logger.info(f"wrote {path}\n{summary(tables)}")
    return tables


def summary(tables: Mapping[str, Mapping[str, float]]) -> str:
    """Retrieval as text: a line for each target and scope."""
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
