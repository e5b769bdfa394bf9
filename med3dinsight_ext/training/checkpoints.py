"""Checkpoints: written in one step, read without running code, loaded strictly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.handlers import Checkpoint, DiskSaver
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from med3dinsight_ext.io.reading import read_json, readable
from med3dinsight_ext.training.weights import not_finite, write_torch

logger = logging.getLogger(__name__)
# Not in all checkpoints:
POSITION, SCALER, SETTINGS, VALIDATED = OPTIONAL = "position", "scaler", "settings", "validated"


class KeepingDiskSaver(DiskSaver):
    """Replaces a file by ``write_torch``; ignite's ``DiskSaver`` deletes the old one first."""

    def __init__(self, dirname: str | Path) -> None:
        super().__init__(str(dirname), create_dir=True, require_empty=False)

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        if idist.get_rank() == self.save_on_rank:
            write_torch(Path(self.dirname) / filename, checkpoint)

    def remove(self, filename: str) -> None:
        """Nothing: the next save has the same name."""


def checkpoint(
    to_save: Mapping[str, Any], dirname: str | Path, filename: str, metric: str | None = None
) -> Checkpoint:
    """An ignite ``Checkpoint`` that keeps one file under a fixed name.

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
    """Load a run's last checkpoint into ``objects``, if there is one, and log it.

    Args:
        path: written by ``checkpoint`` with the same ``objects``.
        objects: name to object, the trainer among them.
        trainer: keeps its own ``max_epochs``. A schedule of rates keeps its own length, too, so
            that a run that is made longer, or has epochs of another length, ends at its lowest.

    Raises:
        ValueError: the file is of another run's shape, or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return
    advice = f"move {path} away to start anew, or run with the config that wrote it"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):  # ignite would read the file that a text names
            raise TypeError(f"a {type(saved).__name__}, no dict")
    except Exception as error:
        raise ValueError(f"checkpoint must be readable, got {path}: {error}; {advice}") from error
    epochs = trainer.state.max_epochs
    lengths = {
        schedule: {name: vars(schedule)[name] for name in ("warmup_steps", "t_total")}
        for schedule in objects.values()
        if isinstance(schedule, WarmupCosineSchedule)
    }
    try:
        wanted = {k: v for k, v in objects.items() if k not in OPTIONAL or k in saved}
        Checkpoint.load_objects(wanted, saved)
    except Exception as error:  # each object has its own
        raise ValueError(f"checkpoint must fit this run, got {path}: {error}; {advice}") from error
    trainer.state.max_epochs = epochs
    was, now = trainer.state.epoch_length, len(getattr(trainer, "data_loader", None) or ())
    for schedule, length in lengths.items():
        vars(schedule).update(length)
        by_steps = schedule.last_epoch == trainer.state.iteration and schedule.t_total > epochs
        if by_steps and now not in (0, was):  # as ``Position.go_on`` counts steps then
            schedule.last_epoch = trainer.state.epoch * now
        for group, rate, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(schedule.last_epoch)
    logger.info(f"resumed from {path} after epoch {trainer.state.epoch}")


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
    if bad := not_finite(network.state_dict()):
        raise ValueError(
            f"weights must be finite, got NaN or infinity in {bad[:3]} of {path}; train again with "
            "a lower learning_rate"
        )


def check_names(key: str, names: Sequence[str], weights: str | Path) -> None:
    """Stop if a network was trained for other classes, or for these in another order.

    Args:
        key: of the config that has the names.
        names: of the classes, in the order of the network's output.
        weights: of the training, with its run.json beside them.

    Raises:
        ValueError: run.json has other names.
    """
    path = Path(weights).with_name("run.json")
    record = read_json(path, "record") if path.is_file() else {}
    trained = (record.get("config") or {}).get(key)
    if isinstance(trained, list) and list(trained) != list(names):
        raise ValueError(
            f"{key} must be as in the training of {weights}, {trained}, got {list(names)}; "
            f'give --{key} "{trained}"'
        )


def embedding_dims_of(path: str | Path) -> dict[str, int]:
    """Embedding dimension of each head of a saved student, by the head's name."""
    if not Path(path).exists():
        raise ValueError(f"student weights must be at {path}, got nothing; train first")
    with readable("student weights", path, "take those that the training wrote"):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        heads = [key for key in saved if key.startswith("heads.") and key.endswith(".weight")]
        return {key.split(".")[1]: saved[key].shape[0] for key in heads}
