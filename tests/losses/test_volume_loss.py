from __future__ import annotations

import pytest
import torch

from med3dinsight_ext.losses.volume import VolumeLoss


def test_it_is_the_mean_smooth_l1_and_keeps_its_value() -> None:
    loss = VolumeLoss()
    pred = torch.tensor([[0.0, 3.0], [1.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    value = loss(pred, torch.tensor([[0.5, 0.0], [1.0, 1.0]]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((0.5**2 / 2 + 2.5) / 4)
    assert loss.latest.total == value and not loss.latest.total.requires_grad
