"""Fine-tuning of a pre-trained encoder: frozen epochs, layer-wise learning rates, log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from med3dinsight_ext.data.laterality import Mirror
from med3dinsight_ext.training.provenance import image_names, running_values

logger = logging.getLogger(__name__)


def log_start(train: Sequence[Any], val: Sequence[Any], mirror: Mirror) -> None:
    """Log the number of labelled cases and how volumes are mirrored."""
    if idist.get_rank() == 0:
        kept = "" if val else ", so the last epoch is kept"
        soft = image_names(running_values().get("unlabelled_items") or ())
        images = image_names(train)  # a case may be repeated
        labelled, taught = len(images - soft), len(images & soft)
        cases = f"{labelled + len(val)} labelled cases: {labelled} for training"
        cases += f" beside {taught} with soft labels" if taught else ""
        logger.info(f"{cases}, {len(val)} for validation{kept}; {mirror.reason}")


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


def parameter_groups(
    network: nn.Module, encoder: Sequence[str], learning_rate: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Optimiser groups with a learning rate that rises through the encoder (layer-wise decay).

    Args:
        network: all its parameters are in the groups.
        encoder: names of the encoder's parameters, in the order in which they act.
        learning_rate: of everything behind the encoder.
        layer_decay: learning rate of the first encoder layer as a share of ``learning_rate``, in
            (0, 1]; those between rise geometrically (Howard and Ruder, 2018, arXiv:1801.06146).
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay must be in (0, 1], got {layer_decay}; 1 trains all layers alike, "
            "freeze_epochs keeps the encoder fixed"
        )
    parameters = dict(network.named_parameters())
    if layer_decay == 1:
        return [{"params": list(parameters.values()), "lr": learning_rate}]
    layers: dict[str, list[nn.Parameter]] = {}
    for name in encoder:
        layers.setdefault(name.rpartition(".")[0], []).append(parameters.pop(name))
    groups = [
        {"params": layer, "lr": learning_rate * layer_decay ** (1 - i / len(layers))}
        for i, layer in enumerate(layers.values())
    ]
    rest = list(parameters.values())
    return [*groups, *([{"params": rest, "lr": learning_rate}] if rest else [])]
