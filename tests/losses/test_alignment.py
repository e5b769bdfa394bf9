import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from running import free_port
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from med3dinsight_ext.embeddings.targets import SliceTargets
from med3dinsight_ext.losses.alignment import (
    AlignmentLoss,
    Residual,
    cosine,
    info_nce,
    mahalanobis,
    masked_mse,
    partial_transport,
    regression,
    siglip,
)
from med3dinsight_ext.models.student import StudentOutput

PAIRED = {
    "cosine": cosine,
    "info_nce": info_nce,
    "siglip": lambda z, y: siglip(z, y, torch.tensor(2.0), torch.tensor(-3.0)),
    "partial_transport": partial_transport,
    "regression": regression,
}
KINDS = list(PAIRED)
DIMS = {"image": 6, "text": 5}


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(b: int = 2, s: int = 4, seed: int = 0) -> tuple[dict[str, Tensor], SliceTargets]:
    """Tokens of two spaces and targets; every slice is valid and has a text."""
    yes = torch.ones(b, s, dtype=torch.bool)
    random = torch.Generator().manual_seed(seed)
    target = SliceTargets(
        unit(b, s, 6, seed=seed + 1), unit(b, s, 5, seed=seed + 2), yes, yes.clone(),
        torch.randint(3, (b, s), generator=random), torch.rand(b, s, generator=random),
        torch.zeros(b, s, dtype=torch.long), torch.rand(b, 1, 4, 4, 4, generator=random),
    )  # fmt: skip
    tokens = {
        "image": torch.randn(b, s, 6, generator=random),
        "text": torch.randn(b, s, 5, generator=random),
    }
    return tokens, target


def output(tokens: dict[str, Tensor], volume: Tensor | None = None) -> StudentOutput:
    return StudentOutput(tokens, volume, None)


def test_info_nce_equals_two_cross_entropies_written_out() -> None:
    z, y = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for a in range(5):
        row = torch.stack([F.cosine_similarity(z[a], y[b], dim=0) for b in range(5)]) / 0.2
        column = torch.stack([F.cosine_similarity(z[b], y[a], dim=0) for b in range(5)]) / 0.2
        total += float(-row.log_softmax(0)[a] - column.log_softmax(0)[a]) / 10
    assert abs(float(info_nce(z, y, 0.2)) - total) < 1e-5


def test_siglip_equals_the_papers_sum_over_pairs() -> None:
    z, y, scale, bias = torch.randn(4, 6), torch.randn(4, 6), torch.tensor(1.3), torch.tensor(-2.0)
    total = 0.0
    for a in range(4):
        for b in range(4):
            logit = F.cosine_similarity(z[a], y[b], dim=0) * scale.exp() + bias
            total -= float(F.logsigmoid(logit if a == b else -logit)) / 4
    assert abs(float(siglip(z, y, scale, bias)) - total) < 1e-5


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
        cosine(torch.zeros(3, 4), torch.zeros(3, 5))


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
        lambda z, y: info_nce(z, y, 0.01),
        lambda z, y: partial_transport(z, y, 0.95, 0.005),
        lambda z, y: partial_transport(z, y, 0.8, 0.005, torch.eye(8)),
        lambda z, y: siglip(z, y, torch.tensor(5.0), torch.tensor(-10.0)),
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
    """Defect 8: with mass below one the pair that is dropped pulls harder, not less."""
    y = unit(10, 16)
    z = y.clone()
    z[0] = unit(1, 16, seed=9)[0]  # the noisy pair

    def pull(mass: float, epsilon: float) -> float:
        leaf = z.clone().requires_grad_()
        partial_transport(leaf, y, mass, epsilon).backward()
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


def test_the_total_is_the_weighted_sum_of_the_parts_it_shows() -> None:
    tokens, target = batch()
    loss = AlignmentLoss("cosine", image_weight=2, text_weight=0.5, reconstruction_weight=3)
    total = loss(output(tokens, target.volume + 1), target)
    parts = loss.latest
    assert torch.allclose(total, 2 * parts.image + 0.5 * parts.text + 3 * parts.reconstruction)
    assert torch.allclose(
        parts.image, cosine(tokens["image"].flatten(0, 1), target.image.flatten(0, 1))
    )
    assert (
        float(parts.reconstruction) == pytest.approx(1, abs=1e-6) and not parts.loss.requires_grad
    )


def test_padding_and_slices_without_text_take_no_part() -> None:
    tokens, target = batch()
    target.valid[0, 0] = False
    target.has_text[1, 1] = False
    loss = AlignmentLoss("info_nce")
    before = loss(output(tokens), target)
    tokens["image"][0, 0] += 9
    tokens["text"][0, 0] += 9
    tokens["text"][1, 1] += 9
    target.image[0, 0] += 9
    assert torch.equal(loss(output(tokens), target), before)
    tokens["image"][1, 1] += 9
    assert not torch.equal(loss(output(tokens), target), before)


def test_a_joint_space_serves_image_and_text() -> None:
    tokens, target = batch()
    target = target._replace(text=unit(2, 4, 6, seed=8))
    loss = AlignmentLoss("cosine")
    loss(output({"joint": tokens["image"]}), target)
    flat = tokens["image"].flatten(0, 1)
    assert torch.allclose(loss.latest.image, cosine(flat, target.image.flatten(0, 1)))
    assert torch.allclose(loss.latest.text, cosine(flat, target.text.flatten(0, 1)))


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


def test_regression_is_the_error_to_the_residuals_of_a_joint_space_too() -> None:
    tokens, target = batch(2, 8)
    target = target._replace(text=unit(2, 8, 6, seed=8))
    loss, residual = AlignmentLoss("regression", dims={"joint": 6}), Residual(6)
    loss(output({"joint": tokens["image"]}), target)
    rows = [value.flatten(0, 1) for value in (target.image, target.plane, target.position)]
    expected = F.mse_loss(tokens["image"].flatten(0, 1), residual(*rows))
    assert torch.allclose(loss.latest.image, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_captions_trains_on_images_alone(kind: str) -> None:
    tokens, target = batch()
    target.has_text.zero_()
    leaf = {name: value.requires_grad_() for name, value in tokens.items()}
    loss = AlignmentLoss(kind, dims=DIMS)
    loss(output(leaf), target).backward()
    assert float(loss.latest.text) == 0 and leaf["image"].grad.any() and not leaf["text"].grad.any()


def test_equal_targets_are_not_each_others_negatives() -> None:
    tokens, target = batch(1, 3)
    target.image[0, 1] = target.image[0, 0]
    loss = AlignmentLoss("info_nce", text_weight=0)
    loss(output(tokens), target)
    allowed = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    expected = info_nce(tokens["image"][0], target.image[0], 0.07, allowed)
    assert torch.allclose(loss.latest.image, expected)


def test_same_plane_negatives_ignore_other_planes_and_far_depths() -> None:
    tokens, target = batch(1, 3)
    target = target._replace(
        plane=torch.tensor([[2, 2, 1]]), position=torch.tensor([[0.1, 0.9, 0.1]])
    )
    for window, near in ((1.0, True), (0.5, False)):
        loss = AlignmentLoss("info_nce", text_weight=0, negatives="same_plane", depth_window=window)
        loss(output(tokens), target)
        allowed = torch.zeros(3, 3, dtype=torch.bool)
        allowed[0, 1] = allowed[1, 0] = near
        expected = info_nce(tokens["image"][0], target.image[0], 0.07, allowed)
        assert torch.allclose(loss.latest.image, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_inside_autocast(kind: str) -> None:
    tokens, target = batch()
    loss = AlignmentLoss(kind, epsilon=0.005, dims=DIMS)
    loss(output(tokens), target)  # statistics of regression's targets
    loss.eval()
    plain = loss(output(tokens), target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(output(tokens), target), plain)
        low = {name: value.bfloat16() for name, value in tokens.items()}
        value = loss(output(low), target)
    assert value.dtype == torch.float32 and value.isfinite()
    assert torch.allclose(value, plain, rtol=0.05, atol=0.05)


def test_learned_parts_get_a_gradient() -> None:
    tokens, target = batch()
    for loss in (
        AlignmentLoss("siglip"),
        AlignmentLoss("partial_transport", cost="mahalanobis", dims=DIMS),
    ):
        loss(output(tokens), target).backward()
        assert len(list(loss.parameters())) == 2
        assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of siglip, .* got 'clip'"):
        AlignmentLoss("clip")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        AlignmentLoss(temperature=0)
    with pytest.raises(ValueError, match="dims must be given for the Mahalanobis cost"):
        AlignmentLoss("partial_transport", cost="mahalanobis")
    with pytest.raises(
        ValueError, match="dims must be given for regression; set '.@store.embedding_dims'"
    ):
        AlignmentLoss("regression")
    with pytest.raises(ValueError, match="negatives must be one of all, same_plane"):
        AlignmentLoss(negatives="hard")


class Heads(nn.Module):
    """As much of a student as has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.decoder = nn.Linear(6, 6), nn.Linear(5, 5), nn.Conv3d(1, 1, 1)

    def forward(self, tokens: dict[str, Tensor], volume: Tensor, mask: Tensor) -> StudentOutput:
        heads = {"image": self.image(tokens["image"]), "text": self.text(tokens["text"])}
        return StudentOutput(heads, self.decoder(volume), mask)


def gradients(kind: str, rank: int, ranks: int) -> dict[str, Tensor]:
    tokens, target = batch(4, 3)
    target.valid[3, 2] = False  # ranks hold different numbers of pairs
    target.has_text[0, 1] = False
    mask = torch.zeros_like(target.volume, dtype=torch.bool)
    mask[:2, ..., :1] = mask[2:, ..., :3] = True  # and of hidden voxels
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    network, loss = Heads(), AlignmentLoss(kind, dims=DIMS)
    wrapped = DistributedDataParallel(network) if ranks > 1 else network
    share = SliceTargets(*(value[mine] for value in target))
    tokens = {name: value[mine] for name, value in tokens.items()}
    value = loss(wrapped(tokens, share.volume, mask[mine]), share)
    value.backward()
    found = {"loss": value.detach()}
    for name, p in [*network.named_parameters(), *loss.named_parameters()]:
        found[name] = p.grad
    return found


def one_rank(rank: int, ranks: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save({k: gradients(k, rank, ranks) for k in KINDS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, (2, free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in KINDS:
            for name, value in gradients(kind, 0, 1).items():
                assert torch.allclose(found[kind][name], value, atol=1e-5), (kind, name)
