"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.swa_utils import AveragedModel


class EMA:
    """Updates an exponential moving average of the weights after every step.

    ignite's ``EMAHandler`` copies the network before weights are transferred, warms up linearly
    only, and restarts its warm-up when a run is resumed; torch's ``AveragedModel`` does none of it.

    Args:
        average: from ``ema_of``; its first update copies the network.
        network: that is trained.
    """

    def __init__(self, average: AveragedModel, network: nn.Module) -> None:
        self.average = average
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Update after a step of the optimizer, which several batches may share."""
        length = engine.state.epoch_length or 1
        batch = (engine.state.iteration - 1) % length + 1
        if batch % getattr(engine, "accumulation_steps", 1) == 0 or batch == length:
            self.average.update_parameters(self.network)


def ema_of(network: nn.Module, decay: float) -> AveragedModel | None:
    """A moving average of a network's weights, or None if ``decay`` is 0.

    After n steps the past has the weight min(decay, (1 + n) / (10 + n)), so that a short run does
    not end as an average of its first steps.

    Args:
        network: to copy.
        decay: weight of the past at each step, in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}; 0 averages nothing")

    if not decay:
        return None

    @torch.no_grad()
    def average(past: list[torch.Tensor], now: list[torch.Tensor], steps: torch.Tensor) -> None:
        n = float(model.n_averaged)  # ``steps`` is a copy on the device, which would be waited for
        torch._foreach_lerp_(past, now, 1 - min(decay, (1 + n) / (10 + n)))

    model = AveragedModel(network, multi_avg_fn=average)
    return model
