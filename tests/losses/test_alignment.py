import math
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
from med3dinsight_ext.losses.alignment import KINDS, AlignmentLoss, gather
from med3dinsight_ext.losses.cosine import cosine_loss
from med3dinsight_ext.losses.info_nce import info_nce_loss
from med3dinsight_ext.losses.regression import Residual
from med3dinsight_ext.models.student import StudentOutput

DIMS = {"image": 6, "text": 5}


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(b: int = 2, s: int = 4, seed: int = 0) -> tuple[dict[str, Tensor], SliceTargets]:
    """Tokens of two spaces and targets; every slice is valid and has a text."""
    yes = torch.ones(b, s, dtype=torch.bool)
    random = torch.Generator().manual_seed(seed)
    target = SliceTargets(
        unit(b, s, 6, seed=seed + 1),
        unit(b, s, 5, seed=seed + 2),
        yes,
        yes.clone(),
        torch.randint(3, (b, s), generator=random),
        torch.rand(b, s, generator=random),
        torch.zeros(b, s, dtype=torch.long),
        torch.rand(b, 1, 4, 4, 4, generator=random),
        torch.zeros(b, s, dtype=torch.long),
    )
    tokens = {
        "image": torch.randn(b, s, 6, generator=random),
        "text": torch.randn(b, s, 5, generator=random),
    }
    return tokens, target


def output(tokens: dict[str, Tensor], volume: Tensor | None = None) -> StudentOutput:
    return StudentOutput(tokens, volume, None)


def test_the_total_is_the_weighted_sum_of_the_parts_it_shows() -> None:
    tokens, target = batch()
    loss = AlignmentLoss("cosine", image_weight=2, text_weight=0.5, reconstruction_weight=3)
    total = loss(output(tokens, target.volume + 1), target)
    parts = loss.latest
    assert torch.allclose(total, 2 * parts.image + 0.5 * parts.text + 3 * parts.reconstruction)
    assert torch.allclose(
        parts.image, cosine_loss(tokens["image"].flatten(0, 1), target.image.flatten(0, 1))
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
    assert torch.allclose(loss.latest.image, cosine_loss(flat, target.image.flatten(0, 1)))
    assert torch.allclose(loss.latest.text, cosine_loss(flat, target.text.flatten(0, 1)))


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
    expected = info_nce_loss(tokens["image"][0], target.image[0], 0.07, allowed)
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
        expected = info_nce_loss(tokens["image"][0], target.image[0], 0.07, allowed)
        assert torch.allclose(loss.latest.image, expected)


def test_nearly_equal_targets_and_slices_on_the_edge_of_the_window_are_negatives() -> None:
    tokens, target = batch(1, 3)
    target = target._replace(
        position=torch.tensor([[0.25, 0.75, 1.0]]), plane=torch.zeros(1, 3).long()
    )
    target.image[0, 0], target.image[0, 1] = torch.zeros(6), torch.zeros(6)
    target.image[0, 0, 0] = target.image[0, 1, 0] = 1
    target.image[0, 1, 1] = math.sqrt(3e-5)  # the cosine is 1 - 1.5e-5
    loss = AlignmentLoss("info_nce", text_weight=0, negatives="same_plane", depth_window=0.5)
    loss(output(tokens), target)
    allowed = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    expected = info_nce_loss(tokens["image"][0], target.image[0], 0.07, allowed)
    assert torch.allclose(loss.latest.image, expected)


def test_two_slices_or_captions_are_enough_and_one_has_no_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens, target = batch(1, 4)
    loss = AlignmentLoss("cosine")
    for count in (1, 2):
        target.has_text[:] = torch.arange(4) < count
        loss(output(tokens), target)
        assert (loss.latest.text > 0) == (count == 2)
    assert not caplog.messages
    for count in (1, 0):
        target.valid[:] = torch.arange(4) < count
        own = {name: values.clone().requires_grad_() for name, values in tokens.items()}
        loss(output(own), target).backward()
        assert loss.latest.image == loss.latest.text == 0
        assert all(values.grad is not None and not values.grad.any() for values in own.values())
    (warning,) = caplog.messages
    assert warning.startswith("1 of a step's 4 slices are in its crops")


def test_a_batch_of_one_slice_is_an_error() -> None:
    tokens, target = batch(1, 1)
    with pytest.raises(ValueError, match="pairs must be at least two, got 1"):
        AlignmentLoss("cosine")(output(tokens), target)


@pytest.mark.parametrize("hidden", [0, 1, 3])
def test_the_reconstruction_is_the_mean_over_the_hidden_voxels(hidden: int) -> None:
    tokens, target = batch()
    mask = torch.zeros_like(target.volume, dtype=torch.bool)
    mask.view(-1)[:hidden] = True
    loss = AlignmentLoss("cosine", image_weight=0, text_weight=0)
    total = loss(StudentOutput(tokens, target.volume + 3, mask), target)
    assert float(total) == pytest.approx(9 if hidden else 0, rel=1e-5)
    assert loss.latest.image == loss.latest.text == 0


def test_a_part_of_no_weight_is_not_computed() -> None:
    tokens, target = batch()
    loss = AlignmentLoss("cosine", reconstruction_weight=0)
    assert loss(output(tokens, torch.zeros(1)), target).isfinite()  # of another shape
    assert loss.latest.reconstruction == 0


def test_defaults_are_those_of_the_docs() -> None:
    loss = AlignmentLoss()
    assert loss.weights == (1, 1, 1) and loss.depth_window == 1
    assert (loss.temperature, loss.mass, loss.epsilon) == (0.07, 0.95, 0.1)
    for start in loss.logits.values():
        assert torch.allclose(start, torch.tensor([math.log(1 / 0.07), 0.0]))
    assert AlignmentLoss(temperature=0.5).logits["text"][0].item() == pytest.approx(math.log(2))
    assert (
        AlignmentLoss("partial_transport", cost="mahalanobis", dims=DIMS)
        .roots["text"]
        .eq(torch.eye(5))
        .all()
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_all_processes_carry_the_gradient_of_their_own(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        for number, part in enumerate(parts):
            part.copy_(own + 10 * (number - rank))

    values = torch.rand(2, 3).requires_grad_()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert gather(values) is values
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    found = gather(values)
    expected = torch.cat([values + 10 * (number - rank) for number in range(3)])
    assert torch.allclose(found, expected) and not gather(values.detach()).requires_grad
    weight = torch.arange(18.0).view(6, 3)
    (found * weight).sum().backward()
    assert torch.allclose(values.grad, 3 * weight[2 * rank : 2 * rank + 2])


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


@pytest.mark.parametrize("n", [2, 16, 96, 300])
@pytest.mark.parametrize("negatives", ["all", "same_plane"])
def test_an_untrained_student_starts_at_siglips_balance(n: int, negatives: str) -> None:
    """Its tokens are orthogonal to every target: pairs and negatives pull the bias alike."""
    _, target = batch(1, n)
    plane = torch.arange(n)[None] % (1 if n == 2 else 2)
    image = F.normalize(torch.randn(1, n, 8), dim=-1)
    image = torch.cat((image, torch.zeros_like(image)), -1)
    target = target._replace(image=image, plane=plane, position=torch.zeros(1, n))
    loss = AlignmentLoss("siglip", text_weight=0, negatives=negatives)
    loss(output({"image": image.roll(8, -1)}), target).backward()
    count = n - 1 if negatives == "all" or n == 2 else n // 2 - 1
    expected = math.log(1 + count) + count * math.log(1 + 1 / count)  # of σ = 1 / (count + 1)
    assert float(loss.latest.image) == pytest.approx(expected, rel=1e-4)
    gradient = loss.logits["image"].grad
    assert gradient is not None and abs(float(gradient[1])) < 1e-4


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
    """The parts of a student that have a gradient."""

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
