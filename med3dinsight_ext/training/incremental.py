"""Incremental training: a few epochs from given weights, kept only if they are better."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.handlers import CheckpointLoader

from med3dinsight_ext.training.checkpoints import load_weights
from med3dinsight_ext.training.record import recorded

logger = logging.getLogger(__name__)


def run(
    trainer: Engine,
    evaluator: Engine | None,
    best: Sequence[Checkpoint],
    state: Mapping[str, Any],
    loaders: Sequence[CheckpointLoader],
    ckpt_dir: str | Path,
) -> None:
    """Train from the weights that ``loaders`` name, which must fit the network as a whole.

    ``last.ckpt`` belongs to another run and is neither read nor written. An epoch replaces the
    weights only if its key metric is better than theirs; without validation cases the last epoch
    does.

    Args:
        trainer: runs.
        evaluator: whose key metric decides what ``best`` keeps; None keeps the last epoch's.
        best: savers from ``checkpoints.checkpoint``.
        state: with "network" and, if there is one, its moving "average".
        loaders: handlers of the trainer.
        ckpt_dir: folder of the record, which stays that of the given weights until an epoch
            replaces them. Its ``start_metric`` is that of the given weights on the same cases.
    """
    for loader in loaders:  # by itself, a loader skips what does not fit
        load_weights(state["network"], loader.load_path)
    for saver in best:
        (evaluator or trainer).add_event_handler(Events.EPOCH_COMPLETED, saver)
    if evaluator is None:
        recorded(trainer, None, best, ckpt_dir, loaders[-1].load_path)
        trainer.run()
        logger.info(f"trained for {trainer.state.epoch} epochs; wrote the last one")
        return
    if "average" in state:
        state["average"].module.load_state_dict(state["network"].state_dict())
    evaluator.run(1)
    name = evaluator.state.key_metric_name
    start = evaluator.state.metrics[name]
    evaluator.state.epoch = evaluator.state.best_metric_epoch = 0
    record = recorded(trainer, evaluator, best, ckpt_dir, loaders[-1].load_path)
    record.content["start_metric"] = (name, float(start))
    trainer.run()
    found, epoch = evaluator.state.best_metric, evaluator.state.best_metric_epoch
    kept = f"kept epoch {epoch}, now {found:.4f}" if epoch else "no epoch was better"
    logger.info(f"{name} was {start:.4f} before training; {kept}")
