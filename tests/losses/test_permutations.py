"""The order of volumes and slices has no meaning: outputs follow it, losses ignore it."""

from __future__ import annotations

import torch
from fakes import PlainNet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.embeddings.targets import SliceTargets
from med3dinsight_ext.losses.alignment import KINDS, AlignmentLoss
from med3dinsight_ext.losses.reconstruction import masked_mse
from med3dinsight_ext.models.psat import PSAT, SlabPooling
from med3dinsight_ext.models.student import Student, StudentOutput

SIZE = (16, 8, 24)
BATCH, SLICES = st.integers(1, 4), st.integers(1, 5)
SEED = st.integers(0, 10_000)


def orders(b: int, s: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An order of the volumes, and another of each volume's slices (b, s)."""
    slices = torch.stack([torch.randperm(s, generator=generator) for _ in range(b)])
    return torch.randperm(b, generator=generator), slices


def permuted(x: Tensor, volumes: Tensor, slices: Tensor) -> Tensor:
    """(b, s, ...) with its volumes and their slices in another order."""
    return torch.stack([x[v][order] for v, order in zip(volumes, slices, strict=True)])


@given(
    BATCH, SLICES, SEED, st.sampled_from([PSAT, SlabPooling]), st.sampled_from(["mean", "first"])
)
def test_a_permutation_of_volumes_and_slices_permutes_the_tokens(
    b: int, s: int, seed: int, reader: type, readout: str
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    small = {"hidden": 8, "heads": 2, "ffn": 8, "layers": 1, "queries": 2, "readout": readout}
    net = reader(3, 4, **(small if reader is PSAT else {})).eval()
    features = torch.randn(b, 3, 2, 1, 3, generator=generator)
    plane = torch.randint(3, (b, s), generator=generator)
    position = torch.rand(b, s, generator=generator)
    order = orders(b, s, generator)
    tokens = net(features, plane, position)
    again = net(features[order[0]], permuted(plane, *order), permuted(position, *order))
    assert torch.allclose(again, permuted(tokens, *order), atol=1e-5)


@given(BATCH, SLICES, SEED)
def test_a_permutation_of_the_batch_permutes_the_students_output(b: int, s: int, seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = Student(
        PlainNet(),
        lambda in_channels: PSAT(in_channels, 4, hidden=8, heads=2, ffn=8, layers=1, queries=2),
        {"image": 3, "text": 2},
        SIZE,
        mask_ratio=0,
    )
    volume = torch.rand(b, 1, *SIZE, generator=generator)
    plane = torch.randint(3, (b, s), generator=generator)
    position = torch.rand(b, s, generator=generator)
    order = orders(b, s, generator)
    one = student(volume, plane, position)
    two = student(volume[order[0]], permuted(plane, *order), permuted(position, *order))
    assert one.reconstruction is not None and two.reconstruction is not None
    assert torch.allclose(two.reconstruction, one.reconstruction[order[0]], atol=1e-5)
    for name, tokens in one.tokens.items():
        assert torch.allclose(two.tokens[name], permuted(tokens, *order), atol=1e-5)


@given(
    st.sampled_from(KINDS),
    BATCH,
    st.integers(3, 5),
    SEED,
    st.sampled_from(["all", "same_plane"]),
    st.sampled_from(["cosine", "mahalanobis"]),
)
def test_losses_do_not_depend_on_the_order_of_volumes_and_slices(
    kind: str, b: int, s: int, seed: int, negatives: str, cost: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    size = (b, 1, 2, 3, 2)
    target = SliceTargets(
        F.normalize(torch.randn(b, s, 4, generator=g), dim=-1),
        F.normalize(torch.randn(b, s, 3, generator=g), dim=-1),
        torch.rand(b, s, generator=g) < 0.7,
        torch.arange(s).expand(b, s) < s - 1,
        torch.randint(3, (b, s), generator=g),
        torch.rand(b, s, generator=g),
        torch.zeros(b, s, dtype=torch.long),
        torch.rand(size, generator=g),
        torch.arange(b)[:, None].expand(b, s),
    )
    tokens = {"image": torch.randn(b, s, 4, generator=g), "text": torch.randn(b, s, 3, generator=g)}
    pred = StudentOutput(tokens, torch.rand(size, generator=g), torch.rand(size, generator=g) < 0.5)
    order = orders(b, s, g)
    columns = target._asdict()
    volume = columns.pop("volume")[order[0]]
    turned = SliceTargets(
        **{name: permuted(column, *order) for name, column in columns.items()}, volume=volume
    )
    moved = StudentOutput(
        {name: permuted(x, *order) for name, x in tokens.items()},
        pred.reconstruction[order[0]],
        pred.mask[order[0]],
    )
    loss = AlignmentLoss(
        kind,
        0.7,
        1.3,
        0.4,
        cost=cost,
        dims={"image": 4, "text": 3},
        negatives=negatives,
        depth_window=0.5,
    )
    loss.eval()
    assert torch.allclose(loss(pred, target), loss(moved, turned), rtol=1e-3, atol=1e-4)


@given(BATCH, SEED)
def test_the_masked_error_is_that_of_a_loop_over_the_hidden_voxels(b: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    guess, volume = torch.rand(2, b, 1, 2, 3, 2, generator=g)
    mask = torch.rand(b, 1, 2, 3, 2, generator=g) < 0.5
    errors = [
        (float(x) - float(y)) ** 2
        for x, y, hidden in zip(guess.flatten(), volume.flatten(), mask.flatten(), strict=True)
        if hidden
    ]
    expected = sum(errors) / max(1, len(errors))
    assert abs(float(masked_mse(guess, volume, mask)) - expected) < 1e-6
