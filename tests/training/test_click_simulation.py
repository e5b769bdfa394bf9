"""Clicks that training simulates in a network's current errors."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from monai.networks.nets import UNet
from running import run, settings
from torch import Tensor, nn

from med3dinsight_ext.training import click_simulation
from med3dinsight_ext.training.click_simulation import SimulatedClicks, corrective_clicks
from med3dinsight_ext.training.engine import plain_batch

NAMES = ["background", "foreground"]


class Recorder(UNet):
    """A small network that keeps the guidance of every training step."""

    seen: list[Tensor] = []

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(3, in_channels, out_channels, (4, 8), (2,), norm="INSTANCE")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            Recorder.seen.append(x[:, 1:].clone())
        return super().forward(x)


def test_the_worst_error_is_clicked_where_it_is_deepest() -> None:
    label = np.zeros((20, 12, 10), int)
    label[2:9, 2:9, 2:9] = 2
    prediction = label.copy()
    prediction[2:9, 2:9, 2:7] = 1  # 7 x 7 x 5 wrong
    prediction[14:18, 2:6, 2:6] = 1  # 4 x 4 x 4 wrong: background there
    assert corrective_clicks(prediction, label) == [(2, (5, 5, 4))]
    first, (number, voxel) = corrective_clicks(prediction, label, count=3)
    assert first == (2, (5, 5, 4))
    assert number == 0 and voxel in set(np.ndindex(18, 6, 6)) - set(np.ndindex(14, 6, 6))
    assert corrective_clicks(label, label) == []


def test_a_drawn_click_is_in_an_error_and_has_its_true_class() -> None:
    random = np.random.RandomState(0)
    label, prediction = random.randint(0, 3, (2, 7, 6, 5))
    drawn = [click for _ in range(50) for click in corrective_clicks(prediction, label, random, 2)]
    assert len(set(drawn)) > 20 and {number for number, _ in drawn} == {0, 1, 2}
    assert all(label[v] == number != prediction[v] for number, v in drawn)


def test_drawn_clicks_are_in_other_errors_and_reach_the_border() -> None:
    label, random = np.zeros((24, 12, 12), int), np.random.RandomState(0)
    prediction = label.copy()
    prediction[1:10, 1:10, 1:10], prediction[14:23, 1:10, 1:10] = 1, 2
    pairs = [corrective_clicks(prediction, label, random, 2) for _ in range(60)]
    assert all({int(v[0] > 12) for _, v in pair} == {0, 1} for pair in pairs)
    depth = [min(v[1] - 1, 9 - v[1], v[2] - 1, 9 - v[2]) for pair in pairs for _, v in pair]
    assert min(depth) == 0 and np.mean(depth) > 1.2  # of a uniform draw 1.2


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 6)


def trained(root: Path, volumes: Path, **changes: Any) -> list[Tensor]:
    """Channels (b, 2 * labels, x, y, z) after the image of every step of a training."""
    backbone = {
        "_target_": "test_click_simulation.Recorder",
        "out_channels": "@out_channels",
        "in_channels": "@click_channels",
    }
    given = settings("seg-finetune", root, volumes, backbone=backbone, **changes)
    Recorder.seen.clear()
    run("seg-finetune", ["train.json", "click.yaml"], **given)
    return list(Recorder.seen)


def test_training_clicks_on_some_items_and_leaves_others_alone(
    tmp_path: Path, volumes: Path
) -> None:
    channels = torch.cat(trained(tmp_path, volumes, max_epochs=4, val_fraction=0))
    guidance, answer = channels.chunk(2, 1)
    used = guidance.flatten(1).amax(1)
    assert len(used) == 24 and set(used.tolist()) == {0.0, 1.0}
    assert 0.1 < (used == 0).float().mean() < 0.6
    assert (guidance == 1).sum((0, 2, 3, 4)).min() > 0  # on both labels
    assert torch.equal(answer.sum(1).flatten(1).amax(1), used)  # the answer that was corrected
    assert torch.equal(answer.sum(1).flatten(1).amin(1), used)
    assert {p.name for p in (tmp_path / "models").iterdir()} == {
        "model.pt",
        "last.ckpt",
        "run.json",
    }


class Engine:
    """What ``SimulatedClicks`` uses of a trainer; the network segments what its input says."""

    amp, amp_kwargs, non_blocking, to_kwargs = False, {}, False, {}
    inferer, prepare_batch = SimpleInferer(), staticmethod(plain_batch)

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.state = SimpleNamespace(device=torch.device("cpu"))

    @staticmethod
    def _iteration(engine: "Engine", batch: dict[str, Any]) -> dict[str, Any]:
        return batch


class Obedient(nn.Module):
    """Foreground is where volume and guidance are high; counts how often it segments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([0.01 + 0 * x[:, :1], x[:, :1] * x[:, 2:3]], 1)


def test_every_round_clicks_on_what_is_still_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []
    label = torch.zeros(1, 1, 30, 10, 10)
    for n in range(5):
        label[:, :, 6 * n : 6 * n + 3, 3:6, 3:6] = 1
    draw = click_simulation.draw_click
    monkeypatch.setattr(
        click_simulation, "draw_click", lambda c, at, r, *_: (drawn.append(at), draw(c, at, r))
    )
    counts, rounds = set(), set()
    for seed in range(40):
        np.random.seed(seed)
        drawn.clear()
        network = Obedient()
        clicks = SimulatedClicks(NAMES, 4, 3, 0.0, radius=4.0)
        batch = clicks(Engine(network), {"image": label, "label": label})
        assert len({at[0] // 6 for at in drawn}) == len(drawn)  # none in a corrected ball
        assert batch["image"].shape[1] == 5
        counts.add(len(drawn))
        rounds.add(network.calls)
    assert counts == {1, 2, 3, 4} and rounds == {1, 2, 3}  # though five places are wrong


def test_eight_clicks_in_three_rounds_are_the_default() -> None:
    assert vars(SimulatedClicks(NAMES)) == vars(
        SimulatedClicks(NAMES, 8, 3, 0.3, 3.0, True, "disc")
    )  # fmt: skip


def test_steps_hardly_ever_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        click_simulation, "corrective_clicks",
        lambda prediction, label, random, count: drawn.append(random.random_sample()) or [],
    )  # fmt: skip
    clicks, item = SimulatedClicks(NAMES, 1, 1, 0.0), {"image": torch.ones(1, 1, 4, 4, 4)}
    np.random.seed(0)
    for _ in range(200):
        clicks(Engine(Obedient()), item | {"label": item["image"]})
    assert len(set(drawn)) == 200


def test_the_earlier_answer_can_be_left_out() -> None:
    clicks = SimulatedClicks(NAMES, earlier_answer=False)
    item = {"image": torch.rand(1, 1, 8, 8, 8), "label": torch.ones(1, 1, 8, 8, 8)}
    assert clicks(Engine(Obedient()), item)["image"].shape[1] == 3


def test_soft_labels_are_no_truth_to_click_on() -> None:
    item = {"image": torch.rand(1, 1, 8, 8, 8), "label": torch.ones(1, 2, 8, 8, 8)}
    with pytest.raises(ValueError, match="class numbers .* use click.yaml without unlabelled.yaml"):
        SimulatedClicks(NAMES)(Engine(Obedient()), item)


@pytest.mark.parametrize(("share", "used"), [(1.0, {0.0}), (0.0, {1.0})])
def test_the_share_without_clicks_is_what_was_asked(
    share: float, used: set[float], tmp_path: Path, volumes: Path
) -> None:
    channels = torch.cat(trained(tmp_path, volumes, automatic_share=share, val_fraction=0))
    assert set(channels.flatten(1).amax(1).tolist()) == used


def test_a_run_that_is_repeated_clicks_alike(tmp_path: Path, volumes: Path) -> None:
    runs = [trained(tmp_path / name, volumes, max_epochs=2) for name in "ab"]
    assert runs[0] and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][-1])


def test_one_channel_weights_arrive_and_learn_to_listen(tmp_path: Path, volumes: Path) -> None:
    torch.save(Recorder(1, 2).state_dict(), tmp_path / "one.pt")
    root = tmp_path / "click"
    trained(root, volumes, pretrained=str(tmp_path / "one.pt"), automatic_share=0.0)
    report = json.loads((root / "eval" / "transfer.json").read_text())
    assert set(report["extended"].values()) == {"4 extra input channels start at zero"}
    assert report["encoder_share"] == 1 and not report["skipped"]
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    assert all(state[name][:, 1:].abs().min() > 0 for name in report["extended"])


def test_a_click_network_is_evaluated_without_clicks(tmp_path: Path, volumes: Path) -> None:
    trained(tmp_path, volumes)
    backbone = {"_target_": "test_click_simulation.Recorder", "in_channels": 5, "out_channels": 2}
    given = settings("seg-finetune", tmp_path, volumes, backbone=backbone)
    run("seg-finetune", ["train.json", "evaluate.json", "click.yaml"], **given)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["cases"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_clicks": 0}, "max_clicks must be at least 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be at least 1, got 0"),
        ({"automatic_share": 1.5}, r"automatic_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_bad_dial_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedClicks(NAMES, **changes)
