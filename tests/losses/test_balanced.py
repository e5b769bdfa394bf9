"""The weighted cross-entropy of classification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from med3dinsight_ext.data.datalists import class_weights
from med3dinsight_ext.losses.balanced import WeightedCrossEntropy


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_classes_have_equal_shares_in_the_gradient_whatever_the_batch(batch: int) -> None:
    labels = torch.tensor([0] * 36 + [1] * 4)
    weight = class_weights([{"label": int(label)} for label in labels], 2)
    loss = WeightedCrossEntropy(weight)
    scores = torch.zeros(40, 2, requires_grad=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for part in order.split(batch):
        (loss(scores[part], labels[part]) * len(part) / 40).backward()
    assert scores.grad is not None
    rare, common = (float(scores.grad[labels == number].abs().sum()) for number in (1, 0))
    assert rare == pytest.approx(common, rel=1e-5)


def test_without_weights_it_is_the_cross_entropy() -> None:
    scores, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = nn.CrossEntropyLoss()(scores, labels)
    assert torch.allclose(WeightedCrossEntropy()(scores, labels), expected)
