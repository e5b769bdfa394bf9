"""Losses and metrics of a training in one of ignite's experiment loggers."""

from __future__ import annotations

from collections.abc import Callable

from ignite.engine import Engine, Events
from ignite.handlers.base_logger import BaseLogger
from torch.optim import Optimizer

from med3dinsight_ext.training.engine import CHECK_STEPS
from med3dinsight_ext.training.history import scalar_metrics


class Tracking:
    """Logs the loss and learning rate every 20 steps, and the metrics of each validation.

    The logger is closed when the training ends; steps are those of the trainer.

    Args:
        logger: makes the logger, for instance ``ignite.handlers.WandBLogger``.
        optimizer: whose learning rate is logged.
        validator: evaluator whose metrics are logged, if there is one.
    """

    def __init__(
        self,
        logger: Callable[[], BaseLogger],
        optimizer: Optimizer,
        validator: Engine | None = None,
    ) -> None:
        self.logger, self.optimizer, self.validator = logger, optimizer, validator

    def attach(self, engine: Engine) -> None:
        logger = self.logger()
        often = Events.ITERATION_COMPLETED(event_filter=lambda _, n: n % CHECK_STEPS == 1)
        logger.attach_output_handler(
            engine, often, "train", output_transform=lambda output: {"loss": output["loss"].item()}
        )
        logger.attach_opt_params_handler(engine, often, self.optimizer, "lr")
        if (validator := self.validator) is not None:
            logger.attach_output_handler(
                validator,
                Events.EPOCH_COMPLETED,
                "validation",
                output_transform=lambda _: scalar_metrics(validator),
                global_step_transform=lambda *_: engine.state.iteration,
            )
        engine.add_event_handler(Events.COMPLETED, lambda _: logger.close())
