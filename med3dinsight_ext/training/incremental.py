"""Trainings that an annotation server starts: a few epochs each time, on the labels so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.handlers import CheckpointLoader
from monai.transforms import MapTransform

from med3dinsight_ext.data.labels import TOLERANCE
from med3dinsight_ext.training import engine

logger = logging.getLogger(__name__)


def run(
    trainer: Engine,
    evaluator: Engine | None,
    best: Sequence[Checkpoint],
    state: Mapping[str, Any],
    ckpt_dir: str | Path,
    handlers: Sequence[Any],
) -> None:
    """``engine.run``, except where one of the handlers loads weights, as MONAI Label adds one.

    Such a round starts anew from these weights: ``last.ckpt`` belongs to another run and is neither
    read nor written. The weights must fit as a whole, and an epoch replaces them only if it is
    better than they are on the validation cases, if there are any.

    Args:
        trainer: runs.
        evaluator: whose metric decides what ``best`` keeps; None keeps the last epoch's.
        best: savers from ``engine.checkpoint``.
        state: with "network" and, if there is one, its moving "average".
        ckpt_dir: folder of ``last.ckpt``.
        handlers: of the trainer.
    """
    loaders = [handler for handler in handlers if isinstance(handler, CheckpointLoader)]
    if not loaders:
        engine.run(trainer, evaluator, best, state, ckpt_dir)
        return
    for loader in loaders:  # leniently: it would skip what does not fit, and say that it did not
        engine.load_weights(state["network"], loader.load_path)
    for saver in best:
        (evaluator or trainer).add_event_handler(Events.EPOCH_COMPLETED, saver)
    if evaluator is not None:
        if "average" in state:
            state["average"].module.load_state_dict(state["network"].state_dict())
        evaluator.run(1)
        start = evaluator.state.metrics[evaluator.state.key_metric_name]
        evaluator.state.epoch = evaluator.state.best_metric_epoch = 0
    trainer.run()
    if evaluator is None:
        logger.info(f"trained for {trainer.state.epoch} epochs; wrote the last one")
    else:
        found, epoch = evaluator.state.best_metric, evaluator.state.best_metric_epoch
        kept = f"kept epoch {epoch}, now {found:.4f}" if epoch else "no epoch was better"
        logger.info(f"{evaluator.state.key_metric_name} was {start:.4f} before training; {kept}")


class CheckLabeld(MapTransform):
    """Stops if a label does not lie on its image's grid or holds a value without a name.

    Servers hand over labels that ``labels.check_parts`` has never seen.

    Args:
        keys: labels (1, x, y, z), as loaded.
        image: key of the image (1, x, y, z), as loaded.
        names: of the classes; the label value is the index.
    """

    def __init__(self, keys: str | list[str], image: str, names: Sequence[str]) -> None:
        super().__init__(keys)
        self.image = image
        self.names = list(names)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        image = data[self.image]
        for key in self.keys:
            label = data[key]

            def fault(rule: str, value: object, advice: str, label: Any = label) -> ValueError:
                place = f"{label.meta['filename_or_obj']} of {image.meta['filename_or_obj']}"
                return ValueError(f"label must {rule}, got {value} in {place}; {advice}")

            size, own = tuple(image.shape[1:]), tuple(label.shape[1:])
            if size != own:
                raise fault(f"have its image's shape {size}", own, "draw it on this image's grid")
            corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(size) - 1)
            ours, theirs = (
                nib.affines.apply_affine(x.affine.numpy(), corners) for x in (image, label)
            )
            beside = np.linalg.norm(ours - theirs, axis=1).max() / float(image.pixdim.min())
            if not beside <= TOLERANCE:
                raise fault(
                    "lie where its image lies",
                    f"an affine that puts it up to {beside:.1f} voxels beside it",
                    "resample it, or copy the image's affine if only the header is wrong",
                )
            values = torch.unique(label.as_tensor()).tolist()
            if unknown := [value for value in values if value not in range(len(self.names))]:
                raise fault(
                    f"hold 0 to {len(self.names) - 1} ({', '.join(self.names)})",
                    f"the value {', '.join(f'{value:g}' for value in unknown[:5])}",
                    "name every value in label_names, or map the file's values",
                )
        return data
