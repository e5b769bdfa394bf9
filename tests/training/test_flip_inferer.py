"""Test-time flips."""

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from med3dinsight_ext.training.tta import FlipInferer


@pytest.mark.parametrize("axes", [(), (0,), (0, 2), (0, 1, 2)])
def test_flips_are_undone_and_averaged(axes: tuple[int, ...]) -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(float(x[0, 0].numel())).view(x.shape)

    def inferer(x: torch.Tensor, net: nn.Module) -> torch.Tensor:
        return net(x)

    volume = torch.rand(1, 1, 3, 4, 5)
    weight = network(torch.ones_like(volume))
    for axis in axes:
        weight = (weight + weight.flip(axis + 2)) / 2
    assert torch.allclose(FlipInferer(inferer, axes)(volume, network), volume * weight, atol=1e-5)


def plain(x: torch.Tensor, network: Any) -> torch.Tensor:
    return network(x)


def by_side(x: torch.Tensor) -> torch.Tensor:
    """Logits (b, 3, x, y, z): background, bright on the left, bright on the right."""
    left = torch.zeros_like(x)
    left[:, :, : x.shape[2] // 2] = 1
    return torch.cat([1 - x, x * left, x * (1 - left)], 1)


def test_left_and_right_swap_back_in_the_mirror_image() -> None:
    volume = torch.rand(2, 1, 6, 3, 4)
    found = FlipInferer(plain, (0, 1), ((1, 2),))(volume, by_side)
    assert torch.allclose(found, by_side(volume), atol=1e-6)
    assert not torch.allclose(FlipInferer(plain, (0, 1))(volume, by_side), by_side(volume))


def test_scores_of_a_pair_of_classes_swap() -> None:
    def sides(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 2)
        return torch.stack([left.mean((1, 2, 3, 4)), right.mean((1, 2, 3, 4))], 1)

    volume = torch.rand(2, 1, 6, 3, 4)
    assert torch.allclose(FlipInferer(plain, (0,), ((0, 1),))(volume, sides), sides(volume))


def test_clicks_on_a_pair_of_classes_swap_in_the_mirror_image() -> None:
    seen = []

    def guided(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[:, 1:]

    volume = torch.zeros(1, 4, 6, 3, 4)
    volume[0, 2, 1, 1, 1] = 1  # a click on class 1, left
    found = FlipInferer(plain, (0,), ((1, 2),))(volume, guided)
    assert torch.equal(found, volume[:, 1:])
    assert seen[1].nonzero().tolist() == [[0, 3, 4, 1, 1]]  # class 2, right


@pytest.mark.parametrize("axes", [(), (0,)])
def test_a_prediction_of_nan_is_an_error_that_names_the_file(axes: tuple[int, ...]) -> None:
    volume = MetaTensor(torch.rand(1, 1, 3, 4, 5), meta={"filename_or_obj": ["a.nii.gz"]})
    with pytest.raises(ValueError, match=r"must be finite, .* of \['a.nii.gz'\]; run with --amp"):
        FlipInferer(plain, axes)(volume, lambda x: x / 0)
