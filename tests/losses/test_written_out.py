"""Each loss equals its formula written out in loops, also where pairs are not allowed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_alignment import batch, output
from test_pairwise_losses import KINDS, PAIRED, unit
from test_transport import oracle
from torch import Tensor

from med3dinsight_ext.losses import pairs
from med3dinsight_ext.losses.alignment import AlignmentLoss
from med3dinsight_ext.losses.cosine import cosine_loss
from med3dinsight_ext.losses.info_nce import info_nce_loss
from med3dinsight_ext.losses.partial_transport import DELTA, mahalanobis, partial_transport_loss
from med3dinsight_ext.losses.reconstruction import masked_mse
from med3dinsight_ext.losses.regression import Residual
from med3dinsight_ext.losses.siglip import prior_bias, siglip_loss

SEED, COUNT = st.integers(0, 10_000), st.integers(2, 6)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and which pairs are allowed (not symmetric)."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, 5, generator=g, dtype=torch.float64)
    return student, teacher, torch.rand(n, n, generator=g) < 0.6


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@given(COUNT, SEED)
def test_cosine(n: int, seed: int) -> None:
    student, teacher, _ = draw(n, seed)
    expected = sum(1 - cosine(student[i], teacher[i]) for i in range(n)) / n
    assert float(cosine_loss(student, teacher)) == pytest.approx(expected, abs=1e-6)


@given(COUNT, SEED)
def test_info_nce_counts_allowed_negatives(n: int, seed: int) -> None:
    student, teacher, allowed = draw(n, seed)
    table = [[math.exp(cosine(a, b) / 0.07) for b in teacher] for a in student]
    total = 0.0
    for i in range(n):
        row = sum(table[i][j] for j in range(n) if allowed[i, j] or i == j)
        column = sum(table[j][i] for j in range(n) if allowed[j, i] or i == j)
        total -= math.log(table[i][i] / row) + math.log(table[i][i] / column)
    found = info_nce_loss(student, teacher, allowed=allowed)
    assert float(found) == pytest.approx(total / n / 2, rel=1e-5, abs=1e-8)


@given(COUNT, SEED)
def test_siglip_counts_allowed_negatives(n: int, seed: int) -> None:
    student, teacher, allowed = draw(n, seed)
    total = 0.0
    for i in range(n):
        for j in range(n):
            logit = cosine(student[i], teacher[j]) * math.exp(1.3) - 2
            if allowed[i, j] or i == j:
                total += math.log(1 + math.exp(-logit if i == j else logit))
    found = siglip_loss(student, teacher, torch.tensor(1.3), torch.tensor(-2.0), allowed)
    assert float(found) == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "info_nce"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_give_the_loss_and_gradient_of_all(
    kind: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, allowed = draw(7, 0)
    given = allowed if masked else None
    found = []
    for block in (49, 21):  # entries: all 7 rows; 3, 3 and 1 of them
        monkeypatch.setattr(pairs, "BLOCK", block)
        inputs = [x.clone().requires_grad_() for x in (student, teacher, torch.tensor([1.3, -2.0]))]
        z, y, (scale, bias) = inputs
        if kind == "siglip":
            loss = siglip_loss(z, y, scale, bias, given)
        else:
            loss = info_nce_loss(z, y, 0.5, given)
        loss.backward()
        found.append([loss, *(x.grad for x in inputs if x.grad is not None)])
    assert len(found[0]) == len(found[1]) == (4 if kind == "siglip" else 3)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found, strict=True))


def test_a_large_loss_keeps_one_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK", 64 * 512)
    student, teacher = torch.randn(2, 512, 8)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        info_nce_loss(student.requires_grad_(), teacher)
    assert sum(kept) < 64 * 512


def test_the_bias_of_siglip_is_zero_where_there_is_less_than_one_negative() -> None:
    few = torch.eye(5, dtype=torch.bool)
    assert prior_bias(few) == 0
    few[0, 1] = few[1, 0] = True
    assert prior_bias(few) == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), SEED, st.booleans())
def test_transport_is_the_log_of_the_plans_diagonal(n: int, seed: int, learned: bool) -> None:
    student, teacher, allowed = draw(n, seed)
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()
    cost = torch.zeros(1, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            cost[0, i, j] = (1 - cosine(student[i], teacher[j])) / 2
            if learned:
                gap = student[i] / student[i].norm() - teacher[j] / teacher[j].norm()
                cost[0, i, j] = (gap @ (root.mT @ root + DELTA * torch.eye(5)) @ gap).sqrt()
    cost = cost / cost.max() if learned else cost
    cost[0][~(allowed | torch.eye(n).bool())] = 1
    expected = -oracle(cost, 0.9, 0.2)[0].diagonal().log().mean()
    found = partial_transport_loss(student, teacher, 0.9, 0.2, root if learned else None, allowed)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_transport_is_soft_by_default() -> None:
    student, teacher, _ = draw(4, 3)
    found = partial_transport_loss(student, teacher)
    assert torch.equal(found, partial_transport_loss(student, teacher, 0.95, 0.1))


def test_mahalanobis_of_near_vectors() -> None:
    near = torch.zeros(2, 3, dtype=torch.float64)
    near[1, 0] = 0.25
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    table = mahalanobis(near, near, nothing)
    assert table[0, 1] == pytest.approx(math.sqrt(1e-4 / 16 + 1e-8), rel=1e-9)
    assert table[0, 0] == pytest.approx(1e-4, rel=1e-9)  # so that its gradient is finite
    long = 1000 * unit(20, 8)  # float32 takes the difference of two large squares
    assert mahalanobis(long, long, torch.eye(8)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_named_in_their_order(kind: str) -> None:
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3, 5\)"):
        PAIRED[kind](torch.zeros(3, 4), torch.zeros(3, 5))


def test_hidden_voxels_may_be_none_or_one() -> None:
    volume, mask = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    assert masked_mse(volume + 3, volume, mask) == 0
    mask[0, 0, 1, 0, 1] = True
    assert masked_mse(volume + 3, volume, mask) == 9


def test_residuals_of_what_was_not_seen_are_finite() -> None:
    residual, plane = Residual(2), torch.tensor([0, 2])
    assert residual.total.shape == (24, 2) and residual.count.shape == (24,)
    teacher, place = torch.tensor([[0.5, -1.0], [0.25, 2.0]]), torch.tensor([0.1, 1.0])
    found = residual.eval()(teacher, plane, place)
    assert torch.allclose(found, teacher / 1e-6)  # no mean and no deviation yet
    assert not residual.train()(teacher, plane, place).any()  # each is the mean of its own place
    other = residual.eval()(teacher, plane, torch.tensor([0.9, 0.9]))  # one place is new
    assert torch.allclose(other[0], teacher[0] / 1e-6) and not other[1].any()


def test_a_target_without_a_head_takes_no_part() -> None:
    tokens, target = batch()
    image = tokens["image"].requires_grad_()
    loss = AlignmentLoss("cosine", text_weight=5)
    total = loss(output({"image": image}), target)
    assert float(loss.latest.text) == 0 and torch.equal(total.detach(), loss.latest.image)
