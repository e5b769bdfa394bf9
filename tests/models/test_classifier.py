import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.networks.nets import DenseNet, SegResNet, UNet, ViT
from running import free_port
from torch import nn

from med3dinsight_ext.models.classifier import (
    Classifier,
    LinearProbeInit,
    fit_head,
    grad_cam,
    pooled_features,
)
from med3dinsight_ext.models.probes import KNNHead, fit_linear, knn_probe, select_l2

SIZE = (32, 16, 24)


class Net(nn.Module):
    """An encoder and a decoder that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 6, 4, 4)
        self.up = nn.ConvTranspose3d(6, 1, 4, 4)
        self.decoded = 0
        self.up.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.decoded += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def test_scores_are_a_linear_layer_on_pooled_features() -> None:
    classifier = Classifier(Net(), 3, SIZE).eval()
    volume = torch.rand(2, 1, *SIZE)
    grid = classifier.network.down(volume)
    features = torch.cat([grid.mean((2, 3, 4)), grid.amax((2, 3, 4))], 1)
    expected = features @ classifier.head.weight.T + classifier.head.bias
    assert torch.allclose(classifier(volume), expected, atol=1e-6)


def test_the_decoder_is_not_run_and_gets_no_gradient() -> None:
    net = Net()
    classifier = Classifier(net, 2, SIZE)
    net.decoded = 0
    classifier(torch.rand(1, 1, *SIZE)).sum().backward()
    assert net.decoded == 0 and net.up.weight.grad is None and net.down.weight.grad is not None


class Shared(nn.Module):
    """Uses one activation everywhere, as EfficientNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck = nn.Conv3d(1, 6, 4, 4), nn.Conv3d(6, 8, 2, 2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.neck(self.act(self.stem(x)))).mean((2, 3, 4))


def test_a_layer_that_runs_twice_is_read_the_last_time() -> None:
    net = Shared()
    classifier = Classifier(net, 2, SIZE).eval()
    volume = torch.rand(1, 1, *SIZE)
    assert classifier.features.layer == "act"
    assert torch.allclose(classifier.pooled(volume)[:, :8], net(volume))


def test_the_networks_names_are_kept() -> None:
    net = UNet(3, 1, 1, (4, 8), (2,))
    state = Classifier(net, 2, SIZE).state_dict()
    assert {f"network.{name}" for name in net.state_dict()} < state.keys()


@pytest.mark.parametrize(
    "network",
    [
        SegResNet(3, 8, 1, 1),
        DenseNet(3, 1, 2, 4, 4, (2, 2)),
        ViT(1, SIZE, (8, 8, 8), 24, 24, 2, 4),
    ],
    ids=lambda n: type(n).__name__,
)
def test_any_network_classifies_and_has_activation_maps(network: nn.Module) -> None:
    torch.manual_seed(0)
    classifier = Classifier(network, 3, SIZE).eval()
    volume = torch.rand(1, 1, *SIZE)
    assert classifier(volume).shape == (1, 3)
    cam = grad_cam(classifier)
    heats = [cam(volume, number) for number in range(3)]
    assert all(heat.shape == volume.shape and heat.min() >= 0 for heat in heats)
    assert max(heat.max() for heat in heats) == pytest.approx(
        1
    )  # at least one class has activations


def test_grad_cam_is_bright_where_the_class_is() -> None:
    net = Net()
    nn.init.constant_(net.down.weight, 1.0)
    nn.init.zeros_(net.down.bias)
    classifier = Classifier(net, 2, SIZE).eval()
    nn.init.constant_(classifier.head.weight[0], -1.0)
    nn.init.constant_(classifier.head.weight[1], 1.0)
    volume = torch.zeros(1, 1, *SIZE)
    volume[..., 24:28, 4:8, 8:12] = 1
    heat = grad_cam(classifier)(volume, 1)
    inside = heat[..., 24:28, 4:8, 8:12].mean()
    assert inside > 0.5 and heat[..., :16, :, :].max() < 0.05


def test_a_networks_own_head_is_used_as_it_is() -> None:
    network = DenseNet(3, 1, 3, 4, 4, (2, 2)).eval()
    classifier = Classifier(network, 3, SIZE, head="own").eval()
    volume = torch.rand(2, 1, *SIZE)
    assert torch.equal(classifier(volume), network(volume)) and grad_cam(classifier) is None
    with pytest.raises(ValueError, match=r"unless the network returns \(b, 2\).* from DenseNet"):
        Classifier(network, 2, SIZE, head="own")
    with pytest.raises(ValueError, match="head must be one of"):
        Classifier(network, 2, SIZE, head="owm")


def loader(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(count):
        volume = torch.rand(2, 1, *SIZE, generator=generator) + torch.tensor([0.0, i % 2]).view(
            2, 1, 1, 1, 1
        )
        batches.append({"image": volume, "label": torch.tensor([0, i % 2])})
    return batches


def test_a_pooled_head_is_the_logistic_regression_on_frozen_features() -> None:
    classifier = Classifier(Net(), 2, SIZE)
    before = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    fit_head(classifier, loader(6), torch.device("cpu"), search=True)
    features, labels, _ = pooled_features(classifier, loader(6), torch.device("cpu"))
    expected = fit_linear(features, labels, select_l2(features, labels))(features)
    scores = torch.cat([classifier.eval()(batch["image"]) for batch in loader(6)])
    assert torch.allclose(scores, expected, atol=1e-4)
    assert all(torch.equal(v, classifier.network.state_dict()[k]) for k, v in before.items())


def test_the_penalty_is_chosen_with_a_patients_cases_in_one_fold(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    classifier, batches = Classifier(Net(), 2, SIZE), loader(6)
    for batch in batches:
        batch["patient"] = [f"p{int(label)}" for label in batch["label"]]
    features, labels, patients = pooled_features(classifier, batches, torch.device("cpu"))
    assert patients == [f"p{int(label)}" for label in labels]
    fit_head(classifier, batches, torch.device("cpu"), search=True)
    expected = fit_linear(features, labels)(features)  # one patient a class: nothing to choose by
    c = 2 / features.shape[1]  # of two classes
    assert caplog.messages[-1].endswith(f"with {features.shape[1]} features and C = {c:.2g}")
    scores = torch.cat([classifier.eval()(batch["image"]) for batch in batches])
    assert torch.allclose(scores, expected, atol=1e-4)
    batches[0]["patient"] = ["", "NA"]
    assert len(set(pooled_features(classifier, batches, torch.device("cpu"))[2])) == 4


def test_fine_tuning_starts_from_the_probe_and_a_resumed_one_does_not() -> None:
    classifier = Classifier(Net(), 2, SIZE)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    trainer = Engine(lambda engine, batch: None)
    LinearProbeInit(classifier, loader(6), torch.device("cpu")).attach(trainer)
    trainer.load_state_dict({"epoch": 1, "max_epochs": 2, "epoch_length": 1})
    trainer.run([0])
    assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in before.items())
    trainer.load_state_dict({"iteration": 1, "max_epochs": 2, "epoch_length": 2})  # in epoch 1
    trainer.run([0, 0])
    assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in before.items())
    trainer.state.epoch = trainer.state.iteration = 0
    trainer.run([0], max_epochs=1)
    expected = fit_linear(*pooled_features(classifier, loader(6), torch.device("cpu"))[:2])
    assert torch.equal(classifier.head.weight, expected.weight)
    assert not torch.equal(classifier.head.weight, before["head.weight"])


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classifier = Classifier(Net(), 2, SIZE)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    fit_head(classifier, loader(5)[rank::2], torch.device("cpu"))
    torch.save(classifier.head.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_cases_and_get_one_head(tmp_path: Path) -> None:
    mp.spawn(one_rank, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    torch.manual_seed(0)
    classifier = Classifier(Net(), 2, SIZE)
    fit_head(classifier, loader(5), torch.device("cpu"))
    for name, value in classifier.head.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value, atol=1e-5)


def test_a_head_of_neighbours_carries_its_cases_in_the_weights() -> None:
    classifier = Classifier(Net(), 3, SIZE, head="neighbours")
    assert classifier(torch.rand(1, 1, *SIZE)).shape == (1, 3)  # before there are any
    fit_head(classifier, loader(6), torch.device("cpu"))
    other = Classifier(Net(), 3, SIZE, head="neighbours").eval()
    other.load_state_dict(classifier.state_dict())
    assert isinstance(other.head, KNNHead) and len(other.head.labels) == 12
    volume = loader(2)[1]["image"]
    vote = other(volume).softmax(1)
    features, labels, _ = pooled_features(other, loader(6), torch.device("cpu"))
    assert torch.allclose(vote[:, :2], knn_probe(features, labels, other.pooled(volume)), atol=1e-4)
    assert vote[:, 2].max() < 1e-6


def test_features_that_are_not_finite_name_the_case() -> None:
    network = Net()
    torch.nn.init.constant_(network.down.bias, float("nan"))
    batch = loader(1)[0]
    batch["image"] = MetaTensor(batch["image"], meta={"filename_or_obj": ["a.nii", "b.nii"]})
    with pytest.raises(ValueError, match=r"features must be finite, .* from \['a.nii', 'b.nii'\]"):
        pooled_features(Classifier(network, 2, SIZE), [batch], torch.device("cpu"))
