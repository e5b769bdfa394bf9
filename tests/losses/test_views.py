import math

import pytest
import torch
import torch.nn.functional as F

from med3dinsight_ext.losses.views import ViewLoss


@pytest.mark.parametrize("last", [[1, 5], [0, 3]], ids=["all differ", "one is there twice"])
def test_the_loss_of_views_equals_a_loop_over_them(last: list[int]) -> None:
    torch.manual_seed(0)
    projected, slices = torch.randn(4, 2, 6), torch.tensor([[0, 3], [0, 4], [1, 3], last])
    one, two = F.normalize(projected, dim=2).unbind(1)
    terms = []
    for n in range(4):
        others = [m for m in range(4) if m == n or not torch.equal(slices[m], slices[n])]
        for a, b in ((one, two), (two, one)):
            scores = {m: math.exp(float(a[n] @ b[m]) / 0.2) for m in others}
            terms.append(-math.log(scores[n] / sum(scores.values())))
    found = ViewLoss(0.2)(projected, slices)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert torch.equal(found, ViewLoss(0.2)(projected, slices.view(2, 2, 2)))


def test_a_temperature_is_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ViewLoss(0)
