import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import SegResNet, UNet

from med3dinsight_ext.data.laterality import Mirror
from med3dinsight_ext.models.features import encoder_parameters
from med3dinsight_ext.training import finetuning
from med3dinsight_ext.training.finetuning import FreezeEncoder, parameter_groups

SIZE = (32, 32, 32)


def test_learning_rates_rise_through_the_encoder() -> None:
    network = SegResNet(3, 8, 1, 1)
    encoder = encoder_parameters(network, SIZE)
    groups = parameter_groups(network, encoder, 0.1, 0.01)
    rates = [group["lr"] for group in groups]
    assert rates[0] == pytest.approx(0.001) and rates[-1] == 0.1
    assert rates == sorted(set(rates))  # each layer faster than the one before
    assert groups[0]["params"][0] is network.convInit.conv.weight
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in network.parameters())
    assert len(parameter_groups(network, encoder, 0.1)) == 1
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0"):
        parameter_groups(network, encoder, 0.1, 0)


@pytest.mark.parametrize(("epochs", "moves"), [(0, [1, 1, 1]), (2, [0, 0, 1]), (-1, [0, 0, 0])])
def test_a_frozen_encoder_stays_for_its_epochs(epochs: int, moves: list[int]) -> None:
    network = UNet(3, 1, 1, (4, 8, 8), (2, 2), num_res_units=1, norm="INSTANCE")
    encoder = encoder_parameters(network, SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)

    def step(*_: object) -> None:
        optimizer.zero_grad()
        network(torch.rand(1, 1, 8, 8, 8)).square().mean().backward()
        optimizer.step()

    engine = Engine(step)
    FreezeEncoder(network, encoder, epochs).attach(engine)
    moved = []
    for epoch in range(3):
        engine.state.epoch = epoch
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        engine.run([0], max_epochs=epoch + 1)
        changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
        moved.append(int(encoder[0] in changed))
        assert changed - set(encoder)
    assert moved == moves


def test_cases_are_counted_once_and_soft_labels_apart(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    soft = [{"image": f"u{n}", "label": "soft"} for n in range(3)]
    values = {"unlabelled_items": soft}
    monkeypatch.setattr(finetuning, "running_values", lambda: values)
    mirror = Mirror((0,), (), "no class lies on one side")
    finetuning.log_start([{"image": "a"}] * 3 + soft, [{"image": "b"}], mirror)
    assert "2 labelled cases: 1 for training beside 3 with soft labels, 1 for val" in caplog.text
    values.clear()
    finetuning.log_start([{"image": "a"}, {"image": "c"}], [], mirror)
    assert "2 labelled cases: 2 for training, 0 for validation, so the last" in caplog.text
