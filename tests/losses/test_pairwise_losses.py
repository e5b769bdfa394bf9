from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from med3dinsight_ext.losses.alignment import AlignmentLoss
from med3dinsight_ext.losses.cosine import cosine_loss
from med3dinsight_ext.losses.info_nce import info_nce_loss
from med3dinsight_ext.losses.partial_transport import mahalanobis, partial_transport_loss
from med3dinsight_ext.losses.reconstruction import masked_mse
from med3dinsight_ext.losses.regression import Residual, regression_loss
from med3dinsight_ext.losses.siglip import siglip_loss

PAIRED = {
    "cosine": cosine_loss,
    "info_nce": info_nce_loss,
    "siglip": lambda z, y: siglip_loss(z, y, torch.tensor(2.0), torch.tensor(-3.0)),
    "partial_transport": partial_transport_loss,
    "regression": regression_loss,
}
KINDS = list(PAIRED)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_equals_two_cross_entropies_written_out() -> None:
    z, y = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for a in range(5):
        row = torch.stack([F.cosine_similarity(z[a], y[b], dim=0) for b in range(5)]) / 0.2
        column = torch.stack([F.cosine_similarity(z[b], y[a], dim=0) for b in range(5)]) / 0.2
        total += float(-row.log_softmax(0)[a] - column.log_softmax(0)[a]) / 10
    assert abs(float(info_nce_loss(z, y, 0.2)) - total) < 1e-5


def test_siglip_equals_the_papers_sum_over_pairs() -> None:
    z, y, scale, bias = torch.randn(4, 6), torch.randn(4, 6), torch.tensor(1.3), torch.tensor(-2.0)
    total = 0.0
    for a in range(4):
        for b in range(4):
            logit = F.cosine_similarity(z[a], y[b], dim=0) * scale.exp() + bias
            total -= float(F.logsigmoid(logit if a == b else -logit)) / 4
    assert abs(float(siglip_loss(z, y, scale, bias)) - total) < 1e-5


def test_mahalanobis_uses_the_whole_matrix() -> None:
    """Defect 5: the public code reads only the diagonal of an indefinite M."""
    z, y, root = torch.randn(4, 3), torch.randn(5, 3), torch.randn(3, 3)
    m = root.mT @ root + 1e-2 * torch.eye(3)
    naive = torch.stack([torch.stack([((a - b) @ m @ (a - b)).sqrt() for b in y]) for a in z])
    assert torch.allclose(mahalanobis(z, y, root, 1e-2), naive, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_matching_pairs_cost_less_than_shuffled_ones(kind: str) -> None:
    y = unit(8, 16)
    assert PAIRED[kind](y, y) < PAIRED[kind](y.roll(1, 0), y)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_pairs_changes_nothing(kind: str) -> None:
    z, y, order = torch.randn(6, 8), torch.randn(6, 8), torch.randperm(6)
    assert torch.allclose(PAIRED[kind](z[order], y[order]), PAIRED[kind](z, y), atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "regression"])
def test_lengths_of_vectors_do_not_matter(kind: str) -> None:
    z, y = torch.randn(6, 8), torch.randn(6, 8)
    assert torch.allclose(PAIRED[kind](5 * z, y), PAIRED[kind](z, 0.3 * y), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_an_error(kind: str, n: int) -> None:
    """Defect 6: a batch of one has a constant loss and trains on nothing."""
    with pytest.raises(ValueError, match=f"pairs must be at least two, got {n}; raise slices"):
        PAIRED[kind](torch.zeros(n, 4), torch.zeros(n, 4))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"share one shape \(n, d\), got \(3, 4\) and \(3, 5\)"):
        cosine_loss(torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_descent_step_lowers_the_loss(kind: str) -> None:
    y = unit(6, 8, seed=1)
    z = unit(6, 8, seed=2).requires_grad_()
    loss = PAIRED[kind](z, y)
    (gradient,) = torch.autograd.grad(loss, z)
    assert PAIRED[kind](z - 1e-3 * gradient / gradient.norm(), y) < loss


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: info_nce_loss(z, y, 0.01),
        lambda z, y: partial_transport_loss(z, y, 0.95, 0.005),
        lambda z, y: partial_transport_loss(z, y, 0.8, 0.005, torch.eye(8)),
        lambda z, y: siglip_loss(z, y, torch.tensor(5.0), torch.tensor(-10.0)),
    ],
    ids=["info_nce at 0.01", "transport at 0.005", "Mahalanobis at 0.005", "siglip at 150"],
)
@pytest.mark.parametrize("start", ["equal", "random", "opposite"])
def test_values_and_gradients_are_finite_at_extremes(loss: Any, start: str) -> None:
    """Defect 7: sqrt(0), underflow of the kernel."""
    y = unit(12, 8)
    z = {"equal": y.clone(), "random": unit(12, 8, seed=5), "opposite": -y}[start].requires_grad_()
    value = loss(z, y)
    value.backward()
    assert value.isfinite() and z.grad is not None and z.grad.isfinite().all()


def test_leaving_a_wrong_pair_out_is_punished_and_epsilon_is_soft_by_default() -> None:
    """Defect 8: with mass below one the pair that is dropped has a larger gradient, not less."""
    y = unit(10, 16)
    z = y.clone()
    z[0] = unit(1, 16, seed=9)[0]  # the noisy pair

    def pull(mass: float, epsilon: float) -> float:
        leaf = z.clone().requires_grad_()
        partial_transport_loss(leaf, y, mass, epsilon).backward()
        assert leaf.grad is not None
        return float(leaf.grad[0].norm())

    assert pull(0.8, 0.03) > pull(0.95, 0.03)
    assert AlignmentLoss("partial_transport").epsilon == 0.1


def test_masked_mse_counts_hidden_voxels_only() -> None:
    volume, guess = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    mask = torch.zeros_like(volume, dtype=torch.bool)
    mask[0, 0, 0] = True
    guess[mask] = 3
    assert float(masked_mse(guess, volume, mask)) == 9
    assert float(masked_mse(guess, volume)) == 5


def test_a_reconstruction_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape of the volume \(2, 1, 4, 4, 4\), got \(2, 3, 4"):
        masked_mse(torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4))


def test_residuals_hold_nothing_of_plane_and_depth() -> None:
    residual, random = Residual(5, bins=4), torch.Generator().manual_seed(0)
    told = torch.randn(3, 4, 5, generator=random)
    for _ in range(40):
        plane = torch.randint(3, (64,), generator=random)
        position = torch.rand(64, generator=random)
        position[0] = 1.0
        own = torch.tensor([1.0, 0.1, 2.0, 1.0, 1.0]) * torch.randn(64, 5, generator=random)
        target = 3 + 10 * told[plane, (position * 4).long().clamp(max=3)] + own
        found = residual(target, plane, position)
    expected = own / own.std(0)
    assert (found - expected).square().mean() < 0.05
    state = {k: v.clone() for k, v in residual.state_dict().items()}
    assert torch.equal(residual.eval()(target, plane, position), found)  # looks, counts nothing in
    assert all(torch.equal(v, residual.state_dict()[k]) for k, v in state.items())
