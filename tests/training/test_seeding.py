import ignite.distributed as idist
import pytest
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


@pytest.mark.parametrize("rank", [0, 2])
def test_transforms_get_a_seed_of_the_rank_and_the_sampler_the_epoch(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, int] = {}

    class Random:
        transform = property(lambda self: self)

        def set_random_state(self, seed: int) -> None:
            got["seed"] = seed

        def set_epoch(self, epoch: int) -> None:
            got["epoch"] = epoch

    loader = Loader()
    loader.dataset = loader.sampler = Random()  # type: ignore[assignment]
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    engine = Engine(lambda *_: None)
    engine.state.epoch = 5
    EpochSeed(3, loader)(engine)
    assert got == {"seed": 3 + 5 * 1_000_003 + rank * 7919, "epoch": 5}
    drawn = torch.rand(1)
    engine.state.epoch = 2**32  # seeds stay in the range of 32 bits
    EpochSeed(3, loader)(engine)
    assert got["seed"] == (3 + 2**32 * 1_000_003 + rank * 7919) % 2**32
    generator = torch.Generator().manual_seed(3 + 5 * 1_000_003 + rank * 7919)
    assert drawn == torch.rand(1, generator=generator)
