"""A run that is killed anywhere and resumed ends as one that is left alone."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint
from med3dinsight_ext.training.seeding import EpochSeed

EPOCHS, STEPS = 4, 3


class Killed(BaseException):
    """Ends a run without any handler of errors."""


def train(folder: Path, kill_at: int | None = None) -> dict[str, Tensor]:
    """The weights that a run writes; it resumes from ``last.ckpt``, if the folder has one."""
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    items = [{"image": torch.full((2,), float(i)), "label": torch.ones(1)} for i in range(STEPS)]
    loader = DataLoader(Dataset(items), shuffle=True)
    trainer = SupervisedTrainer("cpu", EPOCHS, loader, network, optimizer, nn.MSELoss())

    def kill(running: Engine) -> None:
        if running.state.iteration == kill_at:
            raise Killed

    trainer.add_event_handler(Events.ITERATION_STARTED, kill)
    EpochSeed(3, loader).attach(trainer)
    best = checkpoint({"model": network}, folder, "model.pt")
    state = {"network": network, "optimizer": optimizer, "trainer": trainer, "best": best}
    engine.run(trainer, None, [best], state, folder)
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
