import pytest
from ignite.engine import Engine
from torch import nn

from med3dinsight_ext.training.ema import EMA, ema_of


def test_the_average_starts_at_the_first_step_and_lags_behind() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = ema_of(network, 0.9)
    assert average is not None and ema_of(network, 0) is None
    engine = Engine(lambda *_: network.weight.data.add_(1))
    network.weight.data.fill_(4)  # as weights that were transferred after the copy was made
    EMA(average, network).attach(engine)
    engine.run([0, 0], max_epochs=1)
    assert average.module.weight.item() == pytest.approx(2 / 11 * 5 + 9 / 11 * 6)
    average.n_averaged.fill_(1000)
    before = average.module.weight.item()
    network.weight.data.fill_(7)
    average.update_parameters(network)
    assert average.module.weight.item() == pytest.approx(0.9 * before + 0.1 * 7)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1"):
        ema_of(network, 1)


def test_batches_that_share_a_step_are_averaged_once() -> None:
    network = nn.Linear(1, 1)
    average = ema_of(network, 0.9)
    assert average is not None
    engine = Engine(lambda *_: None)
    engine.accumulation_steps = 2  # as MONAI's trainer, which steps at the end of an epoch too
    EMA(average, network).attach(engine)
    engine.run([0] * 5, max_epochs=2)
    assert int(average.n_averaged) == 6
