import pytest
import torch
from ignite.engine import Engine
from torch import nn

from med3dinsight_ext.training import engine


def test_a_nan_loss_stops_the_run_by_name() -> None:
    trainer = Engine(lambda *_: {"loss": torch.tensor(float("nan"))})
    engine.StopOnNan().attach(trainer)
    with pytest.raises(ValueError, match="loss must be finite, got nan in epoch 1 at step 1"):
        trainer.run([{"image": torch.zeros(1)}])


def test_a_weight_that_is_not_finite_stops_the_run_by_name() -> None:
    trainer = Engine(lambda *_: None)
    trainer.network = nn.Linear(2, 1)
    trainer.state.epoch = 4
    engine.StopOnNan().check_weights(trainer)
    with torch.no_grad():
        trainer.network.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"infinity in 1 of them \(bias\) after epoch 4"):
        engine.StopOnNan().check_weights(trainer)


def test_objects_that_are_none_are_left_out() -> None:
    assert engine.present(a=0, b=None, c="x") == {"a": 0, "c": "x"}


def test_the_summary_has_a_line_for_each_target_and_rank() -> None:
    row = {"image_all_r1": 0.5, "image_all_r1_low": 0.4, "image_all_r1_high": 0.6,
           "image_all_r1_chance": 0.125, "image_all_queries": 9.0}  # fmt: skip
    tables = {"student": row, "volume_zero": {**row, "image_all_r1": 0.25}}
    _, *lines = engine.summary(tables).splitlines()
    assert [line.split() for line in lines] == [
        ["image_all", "1", "0.500", "0.400", "to", "0.600", "0.250", "0.125"]
    ]
