import pytest
import torch
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
