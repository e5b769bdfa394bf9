import torch
from ignite.engine import Engine

from med3dinsight_ext.training.seeding import EpochSeed


class Loader(list):
    """As much of a DataLoader as EpochSeed looks at."""

    dataset = sampler = None


def draws(start: int, epochs: int, seed: int = 3) -> list[float]:
    drawn: list[float] = []
    engine = Engine(lambda *_: drawn.append(torch.rand(1).item()))
    EpochSeed(seed, Loader()).attach(engine)
    engine.state.epoch_length, engine.state.max_epochs = 2, None
    engine.load_state_dict({"epoch_length": 2, "max_epochs": epochs, "iteration": 2 * start})
    engine.run([0, 1], max_epochs=epochs, epoch_length=2)
    return drawn


def test_an_epochs_draws_depend_on_its_number_alone() -> None:
    whole = draws(0, 4)
    assert draws(2, 4) == whole[4:]
    assert draws(0, 4, seed=4) != whole
    assert len(set(whole)) == 8
