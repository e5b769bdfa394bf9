"""Training of a classifier's head alone, on frozen features and without epochs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from med3dinsight_ext.io.folder_lock import only_training
from med3dinsight_ext.models.classifier import Classifier, fit_head
from med3dinsight_ext.models.probes import KNNHead
from med3dinsight_ext.training.record import record_fit
from med3dinsight_ext.training.weights import write_torch

logger = logging.getLogger(__name__)
HEADS = {"linear": nn.Linear, "knn": KNNHead}


def run(
    classifier: Classifier,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    mode: str,
    ckpt_dir: str | Path,
) -> None:
    """Fit the head by `fit_head`, and write the classifier's weights and their record.

    No other process may train in ``ckpt_dir`` at the same time (``only_training``).

    Args:
        classifier: with the head of ``mode``.
        loader: as in `fit_head`.
        device: to run on.
        mode: "linear" for logistic regression, "knn" for a vote of the nearest training cases.
        ckpt_dir: folder of model.pt and run.json.

    Raises:
        ValueError: ``mode`` is another one, or does not fit the classifier's head; or the folder is
            that of a fine-tuned network.
    """
    if (last := Path(ckpt_dir) / "last.ckpt").exists():
        raise ValueError(
            f"ckpt_dir must hold no fine-tuned network, which a head would replace, got {last}; "
            "give another bundle_root"
        )
    if mode not in HEADS or not isinstance(classifier.head, HEADS[mode]):
        raise ValueError(
            f"mode must be finetune, linear (head pooled) or knn (head neighbours), got {mode!r} "
            f"with the head {type(classifier.head).__name__}; leave head at its default"
        )
    with only_training(ckpt_dir):
        fit_head(classifier, loader, device, search=True)
        if idist.get_rank() == 0:
            path = Path(ckpt_dir) / "model.pt"
            write_torch(path, classifier.state_dict())
            logger.info(f"wrote {path}")
            record_fit(ckpt_dir, loader, device)
