import pytest
import torch
from torch import nn

from med3dinsight_ext.losses.deep_supervision import DeepSupervision


def test_deep_supervision_takes_every_form_of_levels() -> None:
    loss = DeepSupervision(nn.MSELoss())
    target = torch.rand(2, 1, 4, 4, 4)
    levels = torch.rand(2, 3, 1, 4, 4, 4)  # DynUNet's
    expected = sum(0.5**i * (levels[:, i] - target).square().mean() for i in range(3))
    assert loss(levels, target) == pytest.approx(expected.item(), abs=1e-6)
    assert loss(list(levels.unbind(1)), target) == pytest.approx(expected.item(), abs=1e-6)
    assert loss(levels[:, 0], target) == pytest.approx(
        (levels[:, 0] - target).square().mean().item(), abs=1e-6
    )
    coarse = torch.rand(2, 1, 2, 2, 2)
    assert loss([levels[:, 0], coarse], target) > loss(levels[:, 0], target)
