import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from torch import nn

from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint


def test_a_nan_loss_stops_the_run_by_name() -> None:
    trainer = Engine(lambda *_: {"loss": torch.tensor(float("nan"))})
    engine.StopOnNan().attach(trainer)
    with pytest.raises(ValueError, match="loss must be finite, got nan in epoch 1 at step 1"):
        trainer.run([{"image": torch.zeros(1)}])


@pytest.mark.parametrize(("bad", "seen"), [(2, 3), (5, 6), (7, 7)])
def test_losses_are_read_every_few_steps_and_before_an_epoch_is_saved(
    bad: int, seen: int, tmp_path: Path
) -> None:
    loss = {bad: torch.tensor(float("inf"))}
    trainer = Engine(lambda engine, _: {"loss": loss.get(engine.state.iteration, torch.zeros(1))})
    trainer.network, trainer.loss_function = Batch(), None
    engine.StopOnNan(interval=3).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, checkpoint({"model": trainer.network}, tmp_path, "student.pt")
    )
    with pytest.raises(ValueError, match=f"got inf in epoch 1 at step {bad} on this batch"):
        trainer.run([{"image": torch.zeros(1)}] * 7)
    assert trainer.state.iteration == seen
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(
        ValueError, match=f"weights must be finite, .*{name}.* after step 1, in epoch 1"
    ):
        trainer.run([{"image": torch.zeros(1)}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"),
    [(1, 3, [1, 2, 3]), (2, 4, [2, 4]), (2, 5, [2, 4, 5]), (5, 3, [3]), (3, 1, [1])],
)
def test_every_interval_and_the_last_epoch_are_validated(
    interval: int, epochs: int, expected: list[int]
) -> None:
    found = []
    evaluator = SupervisedEvaluator("cpu", [{"image": torch.zeros(1, 1)}], nn.Identity())
    evaluator.add_event_handler(Events.STARTED, lambda engine: found.append(engine.state.epoch))
    trainer = Engine(lambda *_: None)
    engine.Validation(interval, evaluator).attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert [epoch + 1 for epoch in found] == expected


def test_objects_that_are_none_are_left_out() -> None:
    assert engine.present(a=0, b=None, c="x") == {"a": 0, "c": "x"}


def test_the_summary_has_a_line_for_each_target_and_rank() -> None:
    row = {
        "image_all_r1": 0.5,
        "image_all_r1_low": 0.4,
        "image_all_r1_high": 0.6,
        "image_all_r1_chance": 0.125,
        "image_all_queries": 9.0,
    }
    tables = {"student": row, "volume_zero": {**row, "image_all_r1": 0.25}}
    _, *lines = engine.summary(tables).splitlines()
    assert [line.split() for line in lines] == [
        ["image_all", "1", "0.500", "0.400", "to", "0.600", "0.250", "0.125"]
    ]


@pytest.mark.parametrize("cause", [ValueError("image must be there"), KeyError("bug")])
def test_wrong_input_ends_with_one_line_and_a_bug_with_its_traceback(
    cause: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    engine.cause_last()
    failed = RuntimeError("Failed")
    failed.__cause__ = cause
    shown = {}
    for name in ("", "1"):
        monkeypatch.setenv("MED3D_TRACEBACK", name)
        for error in (failed, cause):
            sys.excepthook(type(error), error, None)
            shown[name, error] = capsys.readouterr().err
    line = f"\n{type(cause).__name__}: {cause}\n"
    assert "The above exception was the direct cause" in shown["1", failed]
    assert shown["1", failed].endswith(f"RuntimeError: Failed\n{line}")  # the cause again
    assert shown["1", cause] == line.lstrip()
    if isinstance(cause, ValueError):
        hint = "\n(MED3D_TRACEBACK=1 shows the traceback)"
        assert shown["", failed] == shown["", cause] == hint + line
    else:
        assert shown["", failed] == shown["1", failed] and shown["", failed].endswith(line)
