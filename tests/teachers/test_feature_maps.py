import pytest
import torch
from fakes import FakeTexts
from torch import nn

from med3dinsight_ext.teachers.dense import as_map, encode_grids, find_layers
from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.shrink = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(self.expand(x))


class SmallCnn(ImageTower):
    size, mean, std, fingerprint = 32, (0.0,) * 3, (1.0,) * 3, "small-cnn"

    def load(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 4, 4), Block(), Block(), Block())

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).flatten(1)


def test_layers_of_a_cnn_are_its_stages() -> None:
    assert find_layers(SmallCnn()) == ["0", "1", "2"]  # strides 4, 8, 16


def test_layers_of_the_bundled_tower_are_its_stages() -> None:
    layers = find_layers(EfficientNetLite0(64))
    assert layers == ["_blocks.2", "_blocks.4", "_blocks.10"]


def test_grids_are_the_layers_outputs() -> None:
    teacher = Teacher(SmallCnn(), FakeTexts(), batch_size=2)
    slices = torch.rand(5, 1, 32, 32)
    found = encode_grids(teacher, slices, ["0", "2"])
    expected = teacher.image.model[0](slices.expand(-1, 3, -1, -1))
    assert torch.allclose(found["0"], expected, atol=1e-6) and found["2"].shape == (5, 4, 2, 2)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_become_a_map(prefix: int) -> None:
    tokens = torch.arange(prefix, prefix + 9).float()
    value = as_map((torch.cat((torch.zeros(prefix), tokens))[None, :, None].expand(2, -1, 3),))
    assert value is not None and value.shape == (2, 3, 3, 3)
    assert torch.equal(value[0, 0].flatten(), tokens)


def test_unknown_and_flat_layers_are_named() -> None:
    teacher = Teacher(SmallCnn(), FakeTexts())
    with pytest.raises(ValueError, match=r"layers must name modules of Sequential, got \['9'\]"):
        encode_grids(teacher, torch.rand(1, 1, 32, 32), ["9"])
    flat = Teacher(Mixed(), FakeTexts())
    with pytest.raises(ValueError, match=r"layers must give maps .* \['2'\] give none"):
        encode_grids(flat, torch.rand(1, 1, 32, 32), ["0", "2"])


class Mixed(SmallCnn):
    def load(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(256, 4))


class Flat(SmallCnn):
    def load(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))


def test_a_tower_without_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher must have a layer with a feature map, got none"):
        find_layers(Flat())
