from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint


def test_a_nan_loss_stops_the_run_by_name() -> None:
    trainer = Engine(lambda *_: {"loss": torch.tensor(float("nan"))})
    engine.StopOnNan().attach(trainer)
    with pytest.raises(ValueError, match="loss must be finite, got nan in epoch 1 at step 1"):
        trainer.run([{"image": torch.zeros(1)}])


class Batch(nn.Module):
    """Weights, a buffer, and what the loss learns."""

    def __init__(self, **broken: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        for name, value in broken.items():
            self.norm.state_dict()[name].fill_(value)


@pytest.mark.parametrize(
    ("network", "loss", "name"),
    [
        (Batch(bias=float("nan")), Batch(), "norm.bias"),
        (Batch(running_var=float("inf")), Batch(), "norm.running_var"),
        (Batch(), Batch(weight=float("nan")), "norm.weight"),
    ],
)
def test_an_epoch_that_ends_with_broken_weights_is_not_saved(
    network: nn.Module, loss: nn.Module, name: str, tmp_path: Path
) -> None:
    trainer = Engine(lambda *_: {"loss": torch.zeros(1)})
    trainer.network, trainer.loss_function = network, loss
    engine.StopOnNan().attach(trainer)
    saver = checkpoint({"model": network}, tmp_path, "student.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    with pytest.raises(ValueError, match=f"weights must be finite, .*{name}.* after epoch 1"):
        trainer.run([{"image": torch.zeros(1)}])
    assert not list(tmp_path.iterdir())
