"""A voxel's value is a known function of its world position, whatever was done to the grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Flip, Orientation, Rotate90, Spacing, SpatialCrop, SpatialPad

from med3dinsight_ext.data.clicks import to_grid
from med3dinsight_ext.data.laterality import Mirror, RandMirrord
from med3dinsight_ext.embeddings.targets import map_positions

Move = Callable[[MetaTensor, str], MetaTensor]
CODES = ("RAS", "LPS", "SRA", "PIR", "LAI", "ASL")


def orient(code: str) -> Move:
    return lambda volume, mode: Orientation(code, labels=None)(volume)


def space(spacing: tuple[float, ...]) -> Move:
    return lambda volume, mode: Spacing(spacing, mode=mode, padding_mode="zeros")(volume)


def crop(corner: tuple[float, ...], share: tuple[float, ...]) -> Move:
    """At least three voxels an axis, where there are as many."""

    def cut(volume: MetaTensor, mode: str) -> MetaTensor:
        size = [min(n, max(3, round(s * n))) for n, s in zip(volume.shape[1:], share, strict=True)]
        low = [int(c * (n - m)) for c, n, m in zip(corner, volume.shape[1:], size, strict=True)]
        high = [a + m for a, m in zip(low, size, strict=True)]
        return SpatialCrop(roi_start=low, roi_end=high)(volume)

    return cut


def pad(more: tuple[int, ...]) -> Move:
    return lambda volume, mode: SpatialPad(
        [n + m for n, m in zip(volume.shape[1:], more, strict=True)]
    )(volume)


def flip(axis: int) -> Move:
    return lambda volume, mode: Flip(axis)(volume)


def turn(axes: tuple[int, int]) -> Move:
    return lambda volume, mode: Rotate90(1, axes)(volume)


def triple(low: float, high: float) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.floats(low, high)] * 3)


MOVES = st.one_of(
    st.builds(orient, st.sampled_from(CODES)),
    st.builds(space, triple(0.8, 2.5)),
    st.builds(crop, triple(0, 1), triple(0.5, 1)),
    st.builds(pad, st.tuples(*[st.integers(0, 4)] * 3)),
    st.builds(flip, st.integers(0, 2)),
    st.builds(turn, st.sampled_from([(0, 1), (1, 2), (0, 2)])),
)
CHAINS = st.lists(MOVES, max_size=5)
SIZES = st.tuples(*[st.integers(4, 11)] * 3)


def world(affine: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """World position (3, x, y, z) of every voxel, in mm."""
    index = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).double()
    return (
        torch.einsum("ab,bxyz->axyz", affine[:3, :3].double(), index)
        + affine[:3, 3, None, None, None]
    )


def stored(size: tuple[int, ...], spacing: tuple[float, ...], code: str) -> MetaTensor:
    """Channels: world position in mm, and 1; zeros of a pad are recognised by the last."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-7.0, 11.0, 3.0])
    array = torch.cat((world(affine, size), torch.ones(1, *size, dtype=torch.float64)))
    volume = Orientation(code, labels=None)(MetaTensor(array, affine=affine))
    volume.meta |= {
        "original_affine": volume.affine.numpy().copy(),
        "spatial_shape": np.array(volume.shape[1:]),
    }
    return volume


def moved(volume: MetaTensor, chain: list[Move], mode: str) -> MetaTensor:
    for move in chain:
        volume = move(volume, mode)
    return volume


def misplaced(copy: MetaTensor) -> torch.Tensor:
    """Distance (n,) in mm of every voxel's value from its place, without those of a pad."""
    known = copy.as_tensor()[3] > 0.999
    return (copy.as_tensor()[:3] - world(copy.affine, copy.shape[1:]))[:, known].norm(dim=0)


@given(SIZES, triple(0.75, 3), st.sampled_from(CODES), CHAINS)
def test_volumes_keep_their_world_positions(
    size: tuple[int, ...], spacing: tuple[float, ...], code: str, chain: list[Move]
) -> None:
    copy = moved(stored(size, spacing, code), chain, "bilinear")
    assert (misplaced(copy) < 1e-3).all()


@given(SIZES, triple(0.75, 3), st.sampled_from(CODES), CHAINS)
def test_labels_are_those_of_the_nearest_voxel_of_every_step(
    size: tuple[int, ...], spacing: tuple[float, ...], code: str, chain: list[Move]
) -> None:
    copy, steps = stored(size, spacing, code), torch.tensor(spacing).norm() / 2
    for move in chain:
        copy = move(copy, "nearest")
        steps = steps + torch.as_tensor(copy.pixdim).norm() / 2
    assert (misplaced(copy) <= steps + 1e-3).all()


@given(SIZES, triple(0.75, 3), st.sampled_from(CODES), CHAINS, triple(0, 1))
def test_clicks_stay_on_their_world_position(
    size: tuple[int, ...],
    spacing: tuple[float, ...],
    code: str,
    chain: list[Move],
    where: tuple[float, ...],
) -> None:
    source = stored(size, spacing, code)
    click = [int(w * (n - 1)) for w, n in zip(where, source.shape[1:], strict=True)]
    copy = moved(source, chain, "bilinear")
    (point,) = to_grid(copy, [click], "organ")
    found = copy.affine[:3, :3].double() @ torch.tensor(point).double() + copy.affine[:3, 3]
    expected = source.as_tensor()[:3, click[0], click[1], click[2]]
    assert torch.allclose(found, expected, atol=1e-4)


@given(SIZES, triple(0.75, 3), st.sampled_from(CODES), CHAINS)
def test_slices_stay_on_their_plane(
    size: tuple[int, ...], spacing: tuple[float, ...], code: str, chain: list[Move]
) -> None:
    source = stored(size, spacing, code)
    copy = moved(source, chain, "bilinear")
    shape = torch.tensor(source.shape[1:])
    plane = torch.arange(3).repeat_interleave(shape)
    index = torch.cat([torch.arange(n) for n in shape])
    axis, position = map_positions(
        plane, (index + 0.5) / shape[plane], shape, source.affine, copy.affine, copy.shape[1:]
    )
    places = torch.rand(4, len(plane), generator=torch.Generator().manual_seed(0)).double() * 20
    places[axis, torch.arange(len(plane))] = (
        position.double() * torch.tensor(copy.shape[1:])[axis] - 0.5
    )  # any voxel of the copy's slice
    places[3] = 1
    back = source.affine.double().inverse() @ copy.affine.double() @ places
    assert torch.allclose(back[plane, torch.arange(len(plane))], index.double(), atol=1e-3)


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=3, unique=True), st.integers(0, 50))
def test_mirrored_labels_follow_the_image_and_swap_paired_classes(
    axes: list[int], seed: int
) -> None:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    label = torch.zeros(1, 4, 5, 6)
    label[:, :2], label[:, 2:] = 1, 2  # left and right halves
    label[:, :, :, 0] = 3  # a class of the middle
    image = MetaTensor(label.clone(), affine=affine)
    flips = RandMirrord(("image", "label"), "label", Mirror(tuple(axes), ((1, 2),), ""))
    flips.set_random_state(seed)
    found = flips({"image": image, "label": MetaTensor(label, affine=affine)})
    assert torch.equal(found["image"].affine, found["label"].affine)
    swapped = found["image"].as_tensor().clone()
    if found["image"].affine[0, 0] < 0:
        swapped[found["image"] == 1], swapped[found["image"] == 2] = 2, 1
    assert torch.equal(found["label"].as_tensor(), swapped)
    assert (found["label"][:, :2, ..., 1:-1] == 1).all()  # left stays on the left
