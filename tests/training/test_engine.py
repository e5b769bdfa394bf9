import pytest
import torch
from ignite.engine import Engine

from med3dinsight_ext.training import engine


def test_a_nan_loss_stops_the_run_by_name() -> None:
    trainer = Engine(lambda *_: {"loss": torch.tensor(float("nan"))})
    engine.StopOnNan().attach(trainer)
    with pytest.raises(ValueError, match="loss must be finite, got nan in epoch 1 at step 1"):
        trainer.run([{"image": torch.zeros(1)}])
