from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, CopyItemsd, RandScaleIntensityd
from torch import Tensor, nn

from med3dinsight_ext.training.ema import ema_of
from med3dinsight_ext.training.mean_teacher import MeanTeacher, RandUnlabelled, ramp_up


class Doubled(nn.Module):
    """Two classes by one weight; in training a list of two resolutions, or a stack of them."""

    def __init__(self, output: str = "one") -> None:
        super().__init__()
        self.layer, self.drop, self.output = nn.Conv3d(1, 2, 1), nn.Dropout(0.5), output

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.layer(x))
        if not self.training or self.output == "one":
            return y
        return [y, y[..., ::2]] if self.output == "list" else torch.stack([y, 0 * y], 1)


def state_of(network: nn.Module, step: int, patches: dict[str, Tensor]) -> Any:
    state = SimpleNamespace(
        iteration=step,
        epoch_length=5,
        max_epochs=4,
        batch=patches,
        device="cpu",
        output={"loss": torch.ones(())},
    )
    return SimpleNamespace(state=state, network=network)


@pytest.mark.parametrize("output", ["one", "list", "stack"])
def test_the_loss_grows_by_the_distance_to_the_means_prediction(output: str) -> None:
    torch.manual_seed(0)
    network = Doubled(output)
    average = ema_of(network, 0.9)
    assert average is not None
    average.update_parameters(network)
    network.layer.weight.data += 0.3
    network.drop.p = 0.0
    patches = {key: torch.randn(2, 1, 4, 4, 4) for key in ("unlabelled", "unlabelled_clean")}
    engine = state_of(network, 6, patches)
    MeanTeacher(average, 2.0, 0.5)(engine)
    target = average.module.layer(patches["unlabelled_clean"]).softmax(1)  # without dropout
    found = network.layer(patches["unlabelled"]).softmax(1)
    expected = 1 + 2 * np.exp(-5 * 0.5**2) * ((found - target) ** 2).mean().item()
    assert float(engine.state.output["loss"]) == pytest.approx(expected, rel=1e-5)
    engine.state.output["loss"].backward()
    assert network.layer.weight.grad is not None and average.module.layer.weight.grad is None


def test_the_ramp_ends_at_one_and_the_first_step_has_no_mean() -> None:
    assert [round(ramp_up(x), 4) for x in (0, 0.5, 1, 3)] == [0.0067, 0.2865, 1, 1]
    network = Doubled()
    average = ema_of(network, 0.9)
    patches = dict.fromkeys(("unlabelled", "unlabelled_clean"), torch.randn(1, 1, 2, 2, 2))
    losses = []
    for step in (1, 2, 3):  # two batches share the first step of the optimizer
        if step == 3:
            average.update_parameters(network)
            network.layer.weight.data += 1
        engine = state_of(network, step, patches)
        MeanTeacher(average, 1.0, 0)(engine)
        losses.append(float(engine.state.output["loss"].detach()))
    assert losses[0] == losses[1] == 1 < losses[2]


def test_it_acts_on_the_step_of_monais_trainer() -> None:
    torch.manual_seed(0)
    item = {"image": torch.zeros(1, 2, 2, 2), "label": torch.zeros(2, 2, 2, 2)}
    patches = {key: torch.randn(1, 2, 2, 2) for key in ("unlabelled", "unlabelled_clean")}
    loader = DataLoader(Dataset([item | patches] * 2), num_workers=0)
    network, moved = Doubled(), []
    average = ema_of(network, 0.9)
    trainer = SupervisedTrainer(
        "cpu", 1, loader, network, torch.optim.SGD(network.parameters(), 1.0),
        lambda pred, label: 0 * pred.sum(),
        train_handlers=[MeanTeacher(average, 1.0, 0)],
    )  # fmt: skip

    def note(_: Engine) -> None:
        average.update_parameters(network)
        moved.append(network.layer.weight.detach().clone())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    assert not torch.equal(moved[0], moved[1])


def patches(volumes: int = 5) -> RandUnlabelled:
    steps = [CopyItemsd("image", names="clean"), RandScaleIntensityd("image", 0.5, 1.0)]
    items = [{"image": torch.full((1, 1, 1, 1), float(n + 1))} for n in range(volumes)]
    return RandUnlabelled(Dataset(items, Compose(steps)))


def test_every_unlabelled_volume_has_its_turn_and_seeds_repeat_it() -> None:
    add, runs = patches(), []
    for seed in (0, 0, 1):
        add.set_random_state(seed)
        drawn = [add({"image": "own"}) for _ in range(30)]
        assert all(row["image"] == "own" for row in drawn)
        rows = [(float(row["unlabelled"]), float(row["unlabelled_clean"])) for row in drawn]
        runs.append(rows)
    assert {clean for _, clean in runs[0]} == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert all(noisy != clean for noisy, clean in runs[0])
    assert runs[0] == runs[1] != runs[2]


def test_what_cannot_teach_is_an_error() -> None:
    average = ema_of(Doubled(), 0.9)
    for weight, rampup in ((-1, 0), (1, -1), (1, 2)):
        with pytest.raises(ValueError, match="consistency_weight must be >= 0 and rampup in"):
            MeanTeacher(average, weight, rampup)
    with pytest.raises(ValueError, match="ema_decay must be above 0 for a mean teacher, got 0"):
        MeanTeacher(None, 1, 0)
