"""A run that is killed anywhere and resumed ends as one that is left alone."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandScaleIntensityd
from running import Killed
from torch import Tensor, nn

from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint
from med3dinsight_ext.training.seeding import EpochSeed

EPOCHS, STEPS = 4, 3


class Noise(nn.Module):
    """Draws from numpy's own random state, as some transforms and losses do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.random())


def train(
    folder: Path,
    kill_at: int | None = None,
    minutes: float | None = None,
    trained: list[int] | None = None,
    accumulation: int = 1,
    workers: int = 0,
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """The weights that a run writes; it resumes from ``last.ckpt``, if the folder has one."""
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), Noise(), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    items = [{"image": torch.full((2,), float(i)), "label": torch.ones(1)} for i in range(steps)]
    data = Dataset(items, Compose([RandScaleIntensityd("image", 0.5, 0.5)]))
    loader = DataLoader(data, shuffle=True, num_workers=workers)
    trainer = SupervisedTrainer(
        "cpu", EPOCHS, loader, network, optimizer, nn.MSELoss(), accumulation_steps=accumulation
    )

    def kill(running: Engine) -> None:
        if running.state.iteration == kill_at:
            raise Killed
        if trained is not None:
            trained.append(running.state.iteration)

    trainer.add_event_handler(Events.ITERATION_STARTED, kill)
    EpochSeed(3, loader).attach(trainer)
    best = checkpoint({"model": network}, folder, "model.pt")
    state = {"network": network, "optimizer": optimizer, "trainer": trainer, "best": best}
    with patch.object(engine, "CHECK_STEPS", 1):
        engine.run(trainer, None, [best], state, folder, minutes=minutes)
    return torch.load(folder / "model.pt", weights_only=True)


@given(st.lists(st.integers(1, EPOCHS * STEPS), max_size=3))
def test_a_run_killed_at_any_step_and_resumed_writes_the_same_weights(kills: list[int]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        expected = train(Path(one))
        for kill in kills:
            with contextlib.suppress(Killed):
                train(Path(other), kill)
        found = train(Path(other))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@given(st.sets(st.integers(1, EPOCHS * STEPS), max_size=4))
def test_with_checkpoints_by_minutes_no_step_is_trained_twice(kills: set[int]) -> None:
    steps: list[int] = []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        expected = train(Path(one))
        for kill in sorted(kills):
            with contextlib.suppress(Killed):
                train(Path(other), kill, minutes=1e-9, trained=steps)
        found = train(Path(other), minutes=1e-9, trained=steps)
    assert steps == list(range(1, EPOCHS * STEPS + 1))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "workers"), [(2, 0), (1, 2), (2, 2)])
def test_workers_and_accumulated_gradients_resume_within_an_epoch(
    accumulation: int, workers: int, tmp_path: Path
) -> None:
    given = {"accumulation": accumulation, "workers": workers, "steps": 5}
    expected = train(tmp_path / "whole", **given)
    for kill in (4, 9, 13):
        with pytest.raises(Killed):
            train(tmp_path / "killed", kill, minutes=1e-9, **given)
    found = train(tmp_path / "killed", minutes=1e-9, **given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_epoch_begins_anew_if_its_length_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, 6, minutes=1e-9)
    steps: list[int] = []
    train(tmp_path, trained=steps, steps=5)
    assert steps == list(range(6, 21))  # the second epoch of five steps and those after it
    assert "an epoch has 5 steps, 3 when last.ckpt was written: epoch 2 begins anew" in caplog.text


def test_weights_that_are_not_finite_are_not_saved_within_an_epoch(tmp_path: Path) -> None:
    with (
        patch.object(Noise, "forward", lambda self, x: x * float("nan")),
        pytest.raises(ValueError, match="weights must be finite, got NaN .* after step 1, in epoc"),
    ):
        train(tmp_path, minutes=1e-9)
    assert not (tmp_path / "last.ckpt").exists()


def test_the_minutes_of_a_checkpoint_are_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_minutes must be above 0, got 0; null saves"):
        train(tmp_path, minutes=0)


def test_nothing_is_saved_before_the_minutes_have_passed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, STEPS, minutes=10)
    assert not (tmp_path / "last.ckpt").exists()
