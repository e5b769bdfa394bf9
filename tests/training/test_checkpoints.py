import json
from pathlib import Path
from typing import IO

import pytest
import torch
from ignite.engine import Engine, Events
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from med3dinsight_ext.training.checkpoints import (
    check_names,
    checkpoint,
    embedding_dims_of,
    load_weights,
    resume,
)
from med3dinsight_ext.training.position import Position


def test_a_kill_while_saving_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Linear(2, 1)
    saver = checkpoint({"model": network}, tmp_path, "model.pt")
    engine = Engine(lambda *_: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, saver)
    engine.run([0], max_epochs=1)
    before = (tmp_path / "model.pt").read_bytes()

    def die(content: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        engine.run([0], max_epochs=2)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_lone_network_is_saved_flat(tmp_path: Path) -> None:
    network = nn.Linear(2, 1)
    checkpoint({"model": network}, tmp_path, "model.pt")(Engine(lambda *_: None))
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"weight", "bias"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer = Engine(lambda *_: None)
    torch.save({"net": nn.Linear(3, 1).state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint must fit this run"):
        resume(tmp_path / "last.ckpt", {"net": nn.Linear(2, 1)}, trainer)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint must be readable"):
        resume(tmp_path / "last.ckpt", {"net": nn.Linear(2, 1)}, trainer)


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("code in a pickle ran",)


@pytest.mark.parametrize("value", ["other.ckpt", ("a", 1), {"trainer": "a"}, {"trainer": [1]}])
def test_what_a_checkpoint_holds_is_no_path_and_any_fault_names_the_file(
    value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Engine(lambda engine, batch: None)
    torch.save({"trainer": trainer.state_dict()}, "other.ckpt")
    torch.save(value, "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint must .* got last.ckpt: .*; move last.ckpt"):
        resume("last.ckpt", {"trainer": trainer}, trainer)


def test_a_pickle_with_code_is_never_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"net": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint must be readable"):
        resume(tmp_path / "last.ckpt", {"net": nn.Linear(2, 1)}, Engine(lambda *_: None))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("model.pt", "nan"), ("student.pt", "inf")])
def test_weights_that_diverged_are_refused(tmp_path: Path, name: str, value: str) -> None:
    network = nn.BatchNorm1d(2)
    torch.save(network.state_dict(), tmp_path / name)
    load_weights(network, tmp_path / name)
    broken = {**network.state_dict(), "running_var": torch.tensor([0.0, float(value)])}
    torch.save(broken, tmp_path / name)
    with pytest.raises(
        ValueError, match=f"NaN or infinity in .'running_var'. of .*{name}; train again"
    ):
        load_weights(network, tmp_path / name)


def test_only_a_rise_of_the_metric_is_saved(tmp_path: Path) -> None:
    network, saved = nn.Linear(1, 1), []
    engine = Engine(lambda *_: None)
    saver = checkpoint({"model": network}, tmp_path / "new", "model.pt", "score")
    for score in (0.5, 0.4, 0.7):
        engine.state.metrics = {"score": score}
        engine.state.epoch += 1
        nn.init.constant_(network.weight, score)
        saver(engine)
        weights = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
        saved.append(round(float(weights["weight"]), 2))
    assert saved == [0.5, 0.5, 0.7]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pt"]


def test_a_resumed_trainer_keeps_its_own_number_of_epochs(tmp_path: Path) -> None:
    first, second = Engine(lambda *_: None), Engine(lambda *_: None)
    saver = checkpoint({"trainer": first}, tmp_path, "last.ckpt")
    first.add_event_handler(Events.EPOCH_COMPLETED, saver)
    first.run([0, 1], max_epochs=2)
    second.state.max_epochs = 5
    resume(tmp_path / "none.ckpt", {"trainer": second}, second)
    assert second.state.epoch == 0
    resume(tmp_path / "last.ckpt", {"trainer": second}, second)
    assert (second.state.epoch, second.state.max_epochs) == (2, 5)


def test_a_run_that_is_made_longer_ends_at_the_lowest_rate(tmp_path: Path) -> None:
    def run(epochs: int) -> list[float]:
        """The rates of the epochs."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = WarmupCosineSchedule(optimizer, 1, epochs, warmup_multiplier=0.1)
        trainer = Engine(lambda *_: optimizer.step())
        trainer.state.max_epochs = epochs
        state = {"trainer": trainer, "optimizer": optimizer, "schedule": schedule}
        resume(tmp_path / "last.ckpt", state, trainer)
        rates = []
        trainer.add_event_handler(
            Events.EPOCH_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"])
        )
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint(state, tmp_path, "last.ckpt"))
        trainer.run([0])
        return rates

    assert run(4)[-1] < 0.3
    longer = run(8)
    (tmp_path / "last.ckpt").unlink()
    assert longer == pytest.approx(run(8)[4:])


@pytest.mark.parametrize("minutes", [False, True])
def test_epochs_of_another_length_keep_their_place_in_the_schedule(
    minutes: bool, tmp_path: Path
) -> None:
    def run(batches: int, epochs: int, stop: int) -> list[float]:
        """The rates of the epochs' first steps, which are 1 of 20 epochs for warm-up."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = WarmupCosineSchedule(optimizer, batches, epochs * batches)
        trainer = Engine(lambda *_: optimizer.step())
        trainer.data_loader = list(range(batches))  # type: ignore[attr-defined]
        trainer.state.max_epochs = epochs
        position = Position(trainer)
        state = {"trainer": trainer, "schedule": schedule, "position": position}
        resume(tmp_path / "last.ckpt", state | {"optimizer": optimizer}, trainer)
        if trainer.state.epoch_length is not None:
            position.go_on()
        rates = []
        at = Events.ITERATION_STARTED
        trainer.add_event_handler(at, lambda: rates.append(optimizer.param_groups[0]["lr"]))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
        end = Events.ITERATION_COMPLETED(once=stop * batches - minutes)
        save = checkpoint(state | {"optimizer": optimizer}, tmp_path, "last.ckpt")
        trainer.add_event_handler(end, save)
        trainer.add_event_handler(end, trainer.terminate)
        trainer.run(trainer.data_loader, max_epochs=epochs)
        return rates[::batches]

    run(4, 20, 10)
    rest = run(2, 20, 20)
    (tmp_path / "last.ckpt").unlink()
    whole = run(2, 20, 20)
    assert rest == pytest.approx(whole[9 if minutes else 10 :])
    assert rest[-1] < 0.02 and rest == sorted(rest, reverse=True)


def test_weights_that_are_missing_or_of_another_network_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights must be at .*gone.pt, got nothing; train first"):
        load_weights(nn.Linear(2, 1), tmp_path / "gone.pt")
    torch.save(nn.Linear(3, 1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="weights in .* must fit the network of this config"):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")
    source, target = nn.Linear(2, 1), nn.Linear(2, 1)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    load_weights(target, tmp_path / "model.pt")
    assert torch.equal(source.weight, target.weight)


def test_the_heads_of_a_saved_student_give_its_spaces(tmp_path: Path) -> None:
    heads = nn.ModuleDict({"image": nn.Linear(3, 5), "text": nn.Linear(3, 4)})
    student = nn.ModuleDict({"heads": heads, "psat": nn.Linear(2, 9)})
    torch.save(student.state_dict(), tmp_path / "student.pt")
    assert embedding_dims_of(tmp_path / "student.pt") == {"image": 5, "text": 4}
    with pytest.raises(ValueError, match="student weights must be at .*, got nothing; train first"):
        embedding_dims_of(tmp_path / "gone.pt")


def test_a_student_that_is_broken_or_runs_code_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"heads.image.weight": Evil()}, tmp_path / "student.pt")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"student weights .*student\.pt.*take those that the"):
            embedding_dims_of(tmp_path / "student.pt")
        with pytest.raises(ValueError, match="weights in .* must fit the network of this config"):
            load_weights(nn.Linear(1, 1), tmp_path / "student.pt")
        (tmp_path / "student.pt").write_bytes(b"half")
    assert "ran" not in capsys.readouterr().out


def test_a_folder_may_hold_weights_already_and_resuming_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer = Engine(lambda *_: None)
    for _ in range(2):
        saver = checkpoint({"trainer": trainer, "net": nn.Linear(1, 1)}, tmp_path, "last.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run([0], max_epochs=3)
    checkpoint({"net": nn.Linear(1, 1)}, tmp_path, "other.pt")(trainer)
    again = Engine(lambda *_: None)
    resume(tmp_path / "last.pt", {"trainer": again, "net": nn.Linear(1, 1)}, again)
    assert f"resumed from {tmp_path / 'last.pt'} after epoch 3" in caplog.text


@pytest.mark.parametrize("names", [["malignant", "benign"], ["negative", "positive"]])
def test_a_network_has_the_classes_of_its_training(names: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    check_names("class_names", names, weights)  # no record
    record = {"config": {"class_names": ["benign", "malignant"]}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    check_names("class_names", ["benign", "malignant"], weights)
    with pytest.raises(ValueError, match="--class_names \"\\['benign', 'malignant'\\]\"$"):
        check_names("class_names", names, weights)
