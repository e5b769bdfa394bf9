"""What a run of the engine keeps, resumes, logs and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader
from running import trains_in
from torch import nn

from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint
from med3dinsight_ext.training.record import read_record


class Scores(Metric):
    """Gives one number of a list after another."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = iter(values)
        super().__init__(lambda output: output)

    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> float:
        return next(self.values)


class Run:
    """A training whose only weight counts its steps, two an epoch.

    Args:
        folder: of the weights.
        epochs: to train.
        scores: of the validations; None has no validation.
        validates: whether the validation is run.
    """

    def __init__(
        self,
        folder: Path,
        epochs: int,
        scores: Sequence[float] | None = None,
        validates: bool = True,
    ) -> None:
        self.folder = folder
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        item = {"image": torch.ones(1), "label": torch.zeros(1)}
        loader = DataLoader(Dataset([item, item]), batch_size=1)
        self.trainer = SupervisedTrainer(
            "cpu",
            epochs,
            loader,
            self.network,
            torch.optim.SGD(self.network.parameters(), 1.0),
            lambda out, _: -out.mean(),
        )
        self.evaluator = None
        if scores is not None:
            metric = {"score": Scores(scores)}
            self.evaluator = SupervisedEvaluator("cpu", loader, self.network, key_val_metric=metric)
            if validates:
                engine.Validation(1, self.evaluator).attach(self.trainer)
        name = None if scores is None else "score"
        self.best = checkpoint({"model": self.network}, folder, "model.pt", name)
        self.state = {"trainer": self.trainer, "network": self.network, "best": self.best}

    def __call__(self, **more: Any) -> None:
        engine.run(self.trainer, self.evaluator, [self.best], self.state | more, self.folder)

    @property
    def kept(self) -> int:
        """Steps of the weights that were written."""
        return round(float(torch.load(self.folder / "model.pt", weights_only=True)["weight"]))


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def test_the_best_epoch_is_kept_recorded_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, 3, [0.5, 0.9, 0.4])
    run()
    assert run.kept == 4 and run.trainer.state.epoch == 3
    said = f"trained for 3 epochs; wrote {tmp_path / 'model.pt'} of epoch 2, score 0.9000"
    assert said in caplog.text
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["epochs"], record["best_epoch"], record["best_metric"]) == (3, 2, ["score", 0.9])
    assert record["data"]["validation"]["cases"] == 2


@pytest.mark.parametrize("scores", [None, [0.5]])
def test_the_last_epoch_is_kept_where_none_is_validated(
    scores: list[float] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, 3, scores, validates=False)
    run()
    assert run.kept == 6 and "model.pt of the last epoch" in caplog.text
    record = read_record(tmp_path / "model.pt")
    assert record is not None and list(record["weights_sha256"]) == ["model.pt"]


def test_a_run_goes_on_where_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path, 2, [0.5, 0.9])()
    assert "resumed" not in caplog.text
    again = Run(tmp_path, 4, [0.6, 0.7])
    again()
    assert "resumed from" in caplog.text and again.trainer.state.iteration == 8
    assert again.kept == 4  # the best so far is that of the first part
    assert float(again.network.weight) == 8
    before = (tmp_path / "last.ckpt").read_bytes()
    Run(tmp_path, 4, [0.99])()
    assert f"{tmp_path / 'last.ckpt'} is trained for 4 epochs; raise max_epochs" in caplog.text
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_the_epoch_that_was_kept_before_is_named_after_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path, 2, [0.5, 0.9])()
    caplog.clear()
    Run(tmp_path, 4, [0.3, 0.4])()
    assert f"trained for 4 epochs; wrote {tmp_path / 'model.pt'} of epoch 2, score" in caplog.text


def test_other_validation_cases_choose_the_best_epoch_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path, 2)()  # without any: the last epoch is kept
    again = Run(tmp_path, 4, [0.6, 0.5])
    again()
    assert again.kept == 6 and "of epoch 3, score 0.6000" in caplog.text
    assert caplog.text.count("validation is by other cases than before") == 1
    for name, epochs, score, kept in (("a", 5, 0.1, 10), ("a", 6, 0.05, 10), ("b", 7, 0.02, 14)):
        monkeypatch.setattr(engine, "image_names", lambda items, name=name: {f"/x/{name}.nii"})
        run = Run(tmp_path, epochs, [score])
        run()
        assert run.kept == kept


@pytest.mark.parametrize("incremental", [False, True])
def test_a_second_training_in_a_folder_changes_nothing_there(
    incremental: bool, tmp_path: Path
) -> None:
    Run(tmp_path, 1)()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run = Run(tmp_path, 2)
    words = (run.trainer, None, [run.best], run.state, tmp_path)
    loader = CheckpointLoader(str(tmp_path / "model.pt"), {"network": run.network})
    handlers = [loader] if incremental else []
    with trains_in(tmp_path):
        with pytest.raises(ValueError, match=f"one training at a time, got {tmp_path}, where"):
            engine.run(*words, handlers=handlers)
        (tmp_path / ".running").unlink()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    engine.run(*words, handlers=handlers)
    assert run.trainer.state.epoch == 2


def test_the_scaler_of_mixed_precision_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0, growth_interval=1)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", scaler)  # doubles with each step
    scales = []
    for epochs in (1, 2):
        run = Run(tmp_path, epochs)
        run.trainer.amp = True
        run()
        scales.append(run.trainer.scaler.get_scale())
    assert scales == [8, 32]
    (tmp_path / "last.ckpt").unlink()
    plain = Run(tmp_path, 1)
    plain()
    again = Run(tmp_path, 2)
    again.trainer.amp = True  # a checkpoint of a training without it
    again()
    assert again.trainer.scaler.get_scale() == 8


def test_a_training_without_a_batch_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.trainer.state.epoch_length = 0
    with pytest.raises(ValueError, match="must have a batch, got none.* lower batch_size"):
        run()
    assert not list(tmp_path.glob("*.pt"))


def test_a_loader_among_the_handlers_makes_it_incremental(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(engine.incremental, "run", lambda *words: given.extend(words))
    run = Run(tmp_path, 2, [0.5, 0.6])
    loader = CheckpointLoader("a.pt", {"network": run.network})
    words = (run.trainer, run.evaluator, [run.best], run.state, tmp_path)
    engine.run(*words, handlers=[object(), loader])
    assert given == [run.trainer, run.evaluator, [run.best], run.state, [loader], tmp_path]
    assert run.trainer.state.iteration == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_evaluation_runs_both_and_the_first_rank_writes(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    engines = []
    for value in (0.75, 0.25):

        class Table(Engine):
            """MONAI's evaluators run without arguments."""

            def run(self) -> None:  # type: ignore[override]
                super().run([0])

        made = Table(lambda *_: None)
        made.data_loader = SimpleNamespace(dataset=SimpleNamespace(data=[{"image": "a.nii"}]))
        found = {"all_r1": value, "all_r1_low": 0.1, "all_r1_high": 0.9, "all_r1_chance": 0.05}
        metrics = {**found, "table": {"not": "a number"}}
        made.add_event_handler(Events.COMPLETED, lambda e, m=metrics: e.state.metrics.update(m))
        engines.append(made)
    tables = engine.evaluate(*engines, tmp_path / "new" / "retrieval.json", tmp_path / "model.pt")
    assert {name: table["all_r1"] for name, table in tables.items()} == {
        "student": 0.75,
        "volume_zero": 0.25,
    }
    assert "table" not in tables["student"]
    path = tmp_path / "new" / "retrieval.json"
    assert path.exists() == (rank == 0) == ("0.750" in caplog.text)
    about = {"weights_sha256": None, "cases_from": None}
    assert rank or json.loads(path.read_text()) == {**tables, **about}
