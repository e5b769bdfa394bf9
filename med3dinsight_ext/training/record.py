"""What a training ran with: models/run.json, tied by hashes to the weights beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import Tensor

from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.training.provenance import (
    UNLABELLED,
    cases,
    machine,
    running_parser,
    running_values,
    settings,
    start_weights,
)
from med3dinsight_ext.training.weights import read_weights

log = logging.getLogger(__name__)
FILE = "run.json"
PARTS = ("training", "validation", UNLABELLED)  # of the data
EARLIER = "data_before_resuming"  # other cases than at the end
ROUND = ("epochs", "best_epoch", "seconds", "data")  # of an earlier round of incremental training


def state_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over the names, types, shapes and bytes of a state dict's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_hash(path: str | Path | None) -> str | None:
    """``state_hash`` of a weights file; None where there is none."""
    return state_hash(read_weights(path)) if path and Path(path).is_file() else None


def read_record(weights: str | Path) -> dict[str, Any] | None:
    """The record of the training that wrote a weights file; None if there is no run.json beside it.

    Args:
        weights: model.pt, under whatever name; student.pt beside it is compared too.

    Raises:
        ValueError: run.json is no record, or is that of other weights.
    """
    weights = Path(weights)
    path = weights.with_name(FILE)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        hashes = dict(record["weights_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be the record of a training, got {error!r}; delete it, and what ran is "
            "not recorded"
        ) from error
    for name in hashes or {"model.pt": None}:
        file = weights if name == "model.pt" else weights.with_name(name)
        if file.is_file() and state_hash(read_weights(file)) != hashes.get(name):
            raise ValueError(
                f"{path} must be the record of {file}, got other weights; take both from one "
                "training, or resume a training that was cut off"
            )
    return record


def check_text_teacher(teacher: Any, weights: str | Path) -> Any:
    """The teacher, if a training recorded no other text encoder.

    Args:
        teacher: that encodes prompts, or None.
        weights: of the training, with its record beside them.

    Raises:
        ValueError: the student was trained towards the texts of another encoder.
    """
    known = _read(Path(weights).with_name(FILE)).get("teacher")
    if teacher is not None and known and not known.endswith(f"|{teacher.text.name}"):
        raise ValueError(
            f"teacher must encode texts as that of the training, got {teacher.text.name} for "
            f"{weights} with {known}; add the overlay of its teacher to config_file"
        )
    return teacher


class RunRecord:
    """Keeps run.json up to date: after every epoch, with the hashes of the weights.

    While the folder holds weights of another training, their record stays; it is replaced together
    with them. A resumed training goes on with its own record. Only rank 0 writes. The cases are
    hashed in a thread: other ranks would run into a timeout while they wait.

    Args:
        folder: of the weights.
        names: of the weights files.
        loaders: "training" and, if there is one, "validation" to a data loader.
        device: that the network is on.
        optimizer: whose learning rate is recorded; None if nothing was optimised.
        epoch: 0, or that after which the training is resumed.
        start: weights file that an incremental training goes on from.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        loaders: Mapping[str, Any],
        device: Any,
        optimizer: Any = None,
        epoch: int = 0,
        start: str | Path | None = None,
    ) -> None:
        self.content: dict[str, Any] = {}
        if idist.get_rank() > 0:
            return
        self.path = Path(folder) / FILE
        self.files = [Path(folder) / name for name in names]
        self._begin = perf_counter()
        self._seen = _stats(self.files)
        hashes = _hashes(self.files)
        earlier = _read(self.path) if epoch else {}
        if earlier.get("weights_sha256") != hashes:
            earlier.update(best_epoch=None, best_metric=None)
        before = record_of(start) if start is not None else {}
        self._earlier_data = dict(earlier.get("data") or {})
        self._before = float(earlier.get("seconds") or 0)
        others = [*earlier.get(EARLIER, ()), self._earlier_data]
        parser = running_parser()
        evaluated = running_values()
        listed = loaders, evaluated, Path(folder)
        self._hashed = ThreadPoolExecutor(1).submit(cases, *listed, hashed=True)
        found = start_weights(evaluated.get("transfer"))
        self.content = {
            "epochs": epoch,
            "best_epoch": earlier.get("best_epoch"),
            "best_metric": earlier.get("best_metric"),
            "resumed_after": [*earlier.get("resumed_after", ()), *([epoch] if epoch else ())],
            "rounds": earlier.get("rounds", []) if start is None else _rounds(before),
            "started": earlier.get("started") or f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            "seconds": self._before,
            "teacher": getattr(evaluated.get("teacher"), "fingerprint", None),
            "pretrained": earlier.get("pretrained") or before.get("pretrained") or found,
            "learning_rate": getattr(optimizer, "defaults", {}).get("lr"),
            "batch_size": getattr(loaders["training"], "batch_size", None),
            "data": cases(*listed, hashed=False),
            EARLIER: [data for data in others if _hashes_of(data)],
            **machine(device),
            **settings(parser, evaluated),
            "weights_sha256": hashes if epoch else {},
        }
        self._own = bool(epoch) or not hashes
        if self._own:
            self.write()

    def update(self, epoch: int, metric: tuple[str, float] | None = None) -> None:
        """Write the record after an epoch.

        Args:
            epoch: that has been trained.
            metric: name and value of its key metric.
        """
        if idist.get_rank() > 0:
            return
        if (stats := _stats(self.files)) != self._seen:
            self._seen, self._own = stats, True
            value = metric if metric and math.isfinite(metric[1]) else None
            self.content["best_epoch"], self.content["best_metric"] = epoch, value
            self.content["weights_sha256"] = _hashes(self.files)
        self.content["epochs"] = epoch
        self.content["seconds"] = round(self._before + perf_counter() - self._begin, 3)
        if self._own:
            self.write()

    def finish(self) -> None:
        """Write the record once the cases are hashed."""
        if idist.get_rank() == 0:
            self._check_cases(self._hashed.result())
            self.update(self.content["epochs"])

    def _check_cases(self, data: Mapping[str, Any]) -> None:
        """Warn if a resumed training went on with other cases or labels."""
        for name in data.keys() & self._earlier_data.keys() & set(PARTS):
            before, now = self._earlier_data[name], data[name]
            if before.get("sha256") not in (None, now["sha256"]):
                log.warning(
                    f"{name} cases are others than before the training was resumed: "
                    f"{now['cases']} after {before['cases']}, or of other content"
                )

    def write(self) -> None:
        if self._hashed.done():
            data = self.content["data"] = self._hashed.result()
            others = {_hashes_of(row): row for row in self.content[EARLIER]}
            others.pop(_hashes_of(data), None)
            self.content[EARLIER] = list(others.values())
        text = json.dumps(self.content, indent=1, ensure_ascii=False, default=str) + "\n"
        write_atomic(self.path, lambda draft: draft.write_text(text, "utf-8"))


def recorded(
    trainer: Engine,
    evaluator: Engine | None,
    savers: Sequence[Checkpoint],
    folder: str | Path,
    start: str | Path | None = None,
) -> RunRecord:
    """The record of a training that is about to begin, updated after each of its epochs.

    Args:
        trainer: MONAI's, with the epoch that it is resumed after. The savers are attached already.
        evaluator: whose key metric belongs to a saved epoch.
        savers: of the weights files.
        folder: of the weights.
        start: as in ``RunRecord``.
    """
    loaders = {"training": trainer.data_loader}
    if evaluator is not None:
        loaders["validation"] = evaluator.data_loader
    if unlabelled := running_values().get("train::unlabelled_dataset"):
        loaders[UNLABELLED] = SimpleNamespace(dataset=unlabelled)
    names = [saver.filename_pattern for saver in savers]
    record = RunRecord(
        folder, names, loaders, trainer.state.device, trainer.optimizer, trainer.state.epoch, start
    )

    def update() -> None:
        metric = None
        if evaluator is not None and evaluator.state.epoch == trainer.state.epoch:
            name = evaluator.state.key_metric_name
            metric = (name, float(evaluator.state.metrics[name])) if name else None
        record.update(trainer.state.epoch, metric)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, update)
    trainer.add_event_handler(Events.COMPLETED, record.finish)
    return record


def _hashes_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Hashes of the cases; none of a training that ended before they were made."""
    parts = (data.get(name) or {} for name in PARTS)
    return tuple(filter(None, (part.get("sha256") for part in parts)))


def record_fit(folder: str | Path, loader: Any, device: Any) -> None:
    """Record a head that was fitted without epochs, after model.pt was written; on rank 0."""
    record = RunRecord(folder, ["model.pt"], {"training": loader}, device)
    record._hashed.result()
    record.content.update(seconds=None, weights_sha256=_hashes(record.files))
    record.write()


def _stats(files: Iterable[Path]) -> list[tuple[int, int]]:
    """What changes when a file is replaced."""
    return [(s.st_ino, s.st_mtime_ns) for s in (os.stat(f) for f in files if f.is_file())]


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    saved = {f.name: torch.load(f, "cpu", weights_only=True) for f in files if f.is_file()}
    return {name: state_hash(state) for name, state in saved.items()}


def _read(path: Path) -> dict[str, Any]:
    """A record that is there and can be read, else nothing: it must not stop a training."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def config_trained_with(home: Path) -> dict[str, Any] | None:
    """Config of the training in a folder, with every override; None in one as it was published.

    Args:
        home: of a training, which may be the folder of the bundle itself.

    Raises:
        ValueError: its record cannot be read.
    """
    path = home / "models" / FILE
    record = read_json(path, "record") if path.is_file() else {}
    published = (home / "configs" / "inference.json").is_file() and "command" not in record
    return None if published else record.get("config")


def record_of(weights: str | Path) -> dict[str, Any]:
    """The record of a weights file; empty if there is none or it is that of others."""
    try:
        return read_record(weights) or {}
    except ValueError:
        return {}


def _rounds(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trainings behind the weights that an incremental one starts from, oldest first."""
    return [*before.get("rounds", ()), {key: before.get(key) for key in ROUND}]
