from __future__ import annotations

import doctest
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from real_data import real_data

from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.slicing import choose, cut, depth, plane_number, usable, window
from med3dinsight_ext.data.volumes import read_volume


def ball(shape: tuple[int, int, int] = (20, 24, 28), radius: float = 6.0) -> torch.Tensor:
    """(1, x, y, z): a bright, textured ball on black."""
    axes = (torch.arange(n) - n / 2 + 0.5 for n in shape)
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    return ((distance < radius) * (2 + torch.sin(distance)))[None]


@pytest.mark.parametrize(("name", "number"), [("sagittal", 0), ("Coronal", 1), ("2", 2), (2, 2)])
def test_a_plane_has_a_name_and_a_number(name: str | int, number: int) -> None:
    assert plane_number(name) == number


@pytest.mark.parametrize("name", ["transverse", 3, -1, "", True])
def test_an_unknown_plane_is_refused(name: str | int) -> None:
    with pytest.raises(ValueError, match="plane must be one of sagittal, coronal, axial"):
        plane_number(name)


def test_depth_is_named_in_fifths() -> None:
    assert [depth(2, p) for p in (0.0, 0.3, 0.5, 1.0)] == ["lowest", "lower", "middle", "uppermost"]
    assert depth(0, 0.9) == "far right" and depth(1, 0.1) == "far posterior"


def test_ct_windows_put_their_centre_at_half_and_clip_at_the_edges() -> None:
    hu = torch.tensor([-160.0, 40.0, 240.0, -600.0, 400.0, 3000.0]).reshape(1, 1, 2, 3)
    soft, lung, bone = window(hu, "CT").flatten(1)
    assert soft.tolist() == [0, 0.5, 1, 0, 1, 1]
    assert lung[3] == 0.5 and bone[4] == 0.5 and bone[5] == 1


@pytest.mark.parametrize("modality", ["MR", "PET"])
def test_mr_and_pet_windows_ignore_scale_and_offset(modality: str) -> None:
    volume = ball()
    torch.testing.assert_close(window(volume * 1e4 - 7, modality), window(volume, modality))


def test_one_hot_voxel_does_not_decide_the_contrast() -> None:
    hot = ball()
    hot[0, 10, 12, 14] = 1e6
    assert (window(hot, "MR") - window(ball(), "MR")).abs().mean() < 0.01


def test_a_small_object_on_a_large_background_keeps_its_contrast() -> None:
    shown = window(ball((60, 61, 62), radius=5), "PET")  # a 0.2 % share, below any percentile
    assert shown.max() == 1 and shown[shown > 0].std() > 0.1


def test_percentiles_of_the_subsample_are_close_to_the_exact_ones() -> None:
    volume = torch.rand(1, 70, 80, 90, generator=torch.Generator().manual_seed(0))
    exact = (volume - 0.005) / (0.995 + 0.005 * 0.005 - 0.005)
    assert (window(volume, "MR") - exact.clamp(0, 1)).abs().max() < 0.01


def test_the_range_is_that_of_the_percentiles() -> None:
    volume = torch.arange(1000.0).view(1, 10, 10, 10)
    shown = window(volume, "MR").flatten()
    low, high = 0.005 * 999, 5 + 0.995 * 994  # of all; of those above
    expected = ((volume.flatten() - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(shown, expected)


def test_about_fifty_thousand_evenly_spaced_voxels_give_the_percentiles() -> None:
    volume = torch.full((1, 120, 110, 102), 1e6)  # 27 x 50,000
    volume[:, ::3, ::3, ::3] = torch.linspace(0, 1, 40 * 37 * 34).view(40, 37, 34)
    volume[:, ::9, ::9, ::9] = 0
    assert 0.2 < window(volume, "MR")[0, 60, 54, 51] < 0.8
    volume[:, ::3, ::3, ::3] = 0
    assert window(volume, "MR").unique().tolist() == [0, 1]


@pytest.mark.parametrize("modality", ["MR", "PET"])
def test_a_constant_volume_has_no_window(modality: str) -> None:
    with pytest.raises(ValueError, match="volume must vary, got 3 everywhere"):
        window(torch.full((1, 4, 5, 6), 3.0), modality)


@pytest.mark.parametrize("modality", ["auto", "US", "ct"])
def test_an_unknown_modality_is_refused(modality: str) -> None:
    with pytest.raises(ValueError, match=f"modality must be one of CT, MR, PET, got '{modality}'"):
        window(ball(), modality)


def test_a_window_needs_one_channel() -> None:
    with pytest.raises(ValueError, match=r"volume must be \(1, x, y, z\), got \(2, 3, 4, 5\)"):
        window(torch.rand(2, 3, 4, 5), "MR")


def test_choosing_is_seeded() -> None:
    first, again, other = (choose(ball(), 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])


def test_chosen_positions_are_slice_centres() -> None:
    plane, position = choose(ball(), 5, 0)
    index = position * torch.tensor([20, 24, 28])[plane] - 0.5
    torch.testing.assert_close(index, index.round(), atol=1e-4, rtol=0)


def test_every_stratum_of_the_extent_gives_one_slice() -> None:
    volume = torch.rand(1, 20, 24, 28)
    for seed in range(10):
        plane, position = choose(volume, 4, seed)
        assert plane.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert (position.reshape(3, 4) * 4).long().tolist() == [[0, 1, 2, 3]] * 3


def test_all_slices_of_a_stratum_get_their_turn() -> None:
    volume = torch.rand(1, 8, 8, 8)
    drawn = {p for seed in range(60) for p in choose(volume, 2, seed)[1].tolist()}
    assert len(drawn) == 8


def test_empty_slices_are_not_chosen() -> None:
    plane, position = choose(ball(), 100, 0)  # the ball spans 6 voxels each way of the centre
    index = (position * torch.tensor([20, 24, 28])[plane]).long()
    offset = index + 0.5 - torch.tensor([10, 12, 14])[plane]
    assert offset.abs().max() < 6 and plane.unique().tolist() == [0, 1, 2]


def test_faint_noise_in_the_background_does_not_make_a_slice_worth_choosing() -> None:
    noise = 0.05 * torch.rand(1, 20, 24, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(ball() + noise, 100, 0)[1], choose(ball(), 100, 0)[1])


@pytest.mark.parametrize(("voxels", "chosen"), [(10, True), (20, True), (9, False), (1, False)])
def test_a_slice_needs_a_tenth_of_the_tissue_of_the_fullest(voxels: int, chosen: bool) -> None:
    for axis in range(3):
        volume = torch.zeros(3, 10, 20)
        volume[0, :, :10] = 1.0  # 100 voxels of tissue
        volume[1].view(-1)[:voxels] = 1.0
        turned = volume.movedim(0, axis)[None]
        assert usable(turned)[axis].tolist() == [True, chosen, False]


@pytest.mark.parametrize(("value", "chosen"), [(0.11, True), (0.09, False)])
def test_tissue_is_brighter_than_a_tenth_of_the_bright_voxels(value: float, chosen: bool) -> None:
    volume = torch.zeros(1, 3, 10, 20)
    volume[0, 0, :, :10] = 1.0
    volume[0, 1, :, :10] = value
    assert usable(volume)[0].tolist() == [True, chosen, False]


@pytest.mark.parametrize("seed", range(8))
def test_usable_slices_equal_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    volume = random.integers(0, 4, (6, 7, 8)) * (random.random((6, 7, 8)) < 0.3) * 10.0 - 7
    volume[random.integers(6)], volume[:, random.integers(7)] = -7, -6
    bright = volume[volume >= volume.mean()].mean()
    tissue = volume > -7 + 0.1 * (bright + 7)
    found = usable(torch.from_numpy(volume)[None])
    assert len(found) == 3
    for axis, filled in enumerate(found):
        counts = [tissue.take(i, axis).sum() for i in range(volume.shape[axis])]
        for i, count in enumerate(counts):
            varied = volume.take(i, axis).min() < volume.take(i, axis).max()
            assert filled[i] == (varied and count >= 0.1 * max(counts)), (axis, i)


def test_a_tenth_of_the_tissue_of_the_fullest_slice_is_enough_and_less_is_not() -> None:
    volume = torch.zeros(1, 4, 4, 5)
    volume[0, 0].view(-1)[:10] = 10.0
    volume[0, 1].view(-1)[0] = 10.0
    assert usable(volume)[0].tolist() == [True, True, False, False]
    volume[0, 0].view(-1)[10] = 10.0
    assert usable(volume)[0].tolist() == [True, False, False, False]


def test_tissue_is_brighter_than_a_tenth_of_the_way_to_the_bright_voxels() -> None:
    volume = torch.zeros(1, 3, 2, 2)
    volume[0, 0] = torch.tensor([[10.0, 10.0], [10.0, 0.0]])
    volume[0, 1] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # exactly a tenth
    volume[0, 2] = torch.tensor([[1.5, 0.0], [0.0, 0.0]])
    assert usable(volume)[0].tolist() == [True, False, True]


def test_a_voxel_at_the_mean_counts_as_bright() -> None:
    volume = torch.zeros(1, 4, 2, 2)
    volume[0, 0], volume[0, 1] = torch.tensor([[8.0, 8.0], [7.5, 0.0]]), 2.0
    volume[0, 2] = torch.tensor([[0.5, 0.0], [0.0, 0.0]])  # the mean is 2, that of the bright 4.5
    assert usable(volume)[0].tolist() == [True, False, True, False]


def test_one_slice_a_plane_may_be_asked_for() -> None:
    assert choose(torch.rand(1, 5, 6, 7), 1, 0)[0].tolist() == [0, 1, 2]


def test_slices_without_contrast_are_not_chosen() -> None:
    volume = torch.rand(1, 6, 7, 8)
    volume[..., 3] = 1.0
    assert 3.5 / 8 not in choose(volume, 9, 0)[1][choose(volume, 9, 0)[0] == 2].tolist()


def test_a_short_axis_gives_all_it_has() -> None:
    plane, position = choose(torch.rand(1, 20, 24, 2), 5, 0)
    assert position[plane == 2].tolist() == [0.25, 0.75]


def test_a_volume_without_a_usable_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="volume must have a slice with contrast, got 2 to 2"):
        choose(torch.full((1, 4, 5, 6), 2.0), 3, 0)


def test_at_least_one_slice_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="per_plane must be at least 1, got 0"):
        choose(ball(), 0, 0)


@pytest.mark.parametrize(
    ("plane", "top_left", "top_right", "bottom_left"),
    [
        (0, "anterior superior", "posterior superior", "anterior inferior"),
        (1, "right superior", "left superior", "right inferior"),
        (2, "right anterior", "left anterior", "right posterior"),
    ],
)
def test_slices_are_shown_as_radiologists_see_them(
    plane: int, top_left: str, top_right: str, bottom_left: str
) -> None:
    # In RAS the last index of each axis is the patient's right, front and top.
    ends = {
        "right": (0, -1),
        "left": (0, 0),
        "anterior": (1, -1),
        "posterior": (1, 0),
        "superior": (2, -1),
        "inferior": (2, 0),
    }
    for place, pixel in ((top_left, (0, 0)), (top_right, (0, -1)), (bottom_left, (-1, 0))):
        volume, voxel = torch.zeros(1, 5, 5, 5), [2, 2, 2]
        for axis, end in (ends[word] for word in place.split()):
            voxel[axis] = end
        volume[0, voxel[0], voxel[1], voxel[2]] = 1
        shown = cut(volume, (1, 1, 1), plane, torch.tensor([0.5]), 5)[0, 0]
        assert shown[pixel] == 1 and shown.sum() == 1, place


def test_a_slice_without_resizing_is_the_array_itself() -> None:
    volume = torch.rand(2, 6, 7, 9)
    shown = cut(volume, (1, 1, 1), 2, torch.tensor([4.5 / 9]), 7)
    reference = volume[1, ..., 4].numpy().T[::-1, ::-1]
    np.testing.assert_allclose(shown[0, 1, :, :6], reference, atol=1e-6)


@pytest.mark.parametrize(("plane", "height", "width"), [(0, 60, 28), (1, 60, 20), (2, 60, 43)])
def test_slices_keep_their_physical_aspect(plane: int, height: int, width: int) -> None:
    volume = torch.ones(1, 10, 7, 10)  # 10 x 14 x 30 mm
    shown = cut(volume, (1.0, 2.0, 3.0), plane, torch.tensor([0.5]), 60)[0, 0]
    rows, columns = shown.any(1), shown.any(0)
    assert shown.shape == (60, 60)
    assert (int(rows.sum()), int(columns.sum())) == (height, width)
    margin = columns.nonzero().flatten()
    assert abs(int(margin[0]) - (59 - int(margin[-1]))) <= 1  # centred


def test_a_very_thin_slice_keeps_one_row() -> None:
    shown = cut(torch.ones(1, 50, 2, 3), (1.0, 0.5, 1.0), 2, torch.tensor([0.5]), 10)[0, 0]
    assert shown.shape == (10, 10) and shown.any(1).sum() == 1 and shown.any(0).all()


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_many_slices_at_once_equal_one_by_one(plane: int) -> None:
    volume, position = torch.rand(3, 11, 12, 13), torch.tensor([0.9, 0.1, 0.1, 0.5])
    together = cut(volume, (1, 1.5, 2), plane, position, 16)
    single = [cut(volume, (1, 1.5, 2), plane, p[None], 16) for p in position]
    torch.testing.assert_close(together, torch.cat(single))


@pytest.mark.parametrize("position", [0.0, 1.0])
def test_the_ends_of_the_extent_are_the_outer_slices(position: float) -> None:
    volume = torch.arange(4.0).expand(1, 4, 4, 4)
    assert cut(volume, (1, 1, 1), 2, torch.tensor([position]), 4).unique() == 3 * position


def test_fine_texture_is_averaged_when_a_slice_shrinks() -> None:
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shown = cut(noise, (1, 1, 1), 0, torch.tensor([0.5]), 16)
    assert shown.std() < 0.25  # reading every fourth pixel and its neighbour leaves 0.5


def test_cutting_does_not_leave_the_range_of_the_volume() -> None:
    for n in range(13, 20):  # rounding takes a plain interpolation above 1 for some sizes
        shown = cut(torch.ones(1, n, n + 5, 2), (1, 1.5, 1), 2, torch.tensor([0.5]), 24)
        assert shown.min() >= 0 and shown.max() <= 1


def test_a_meta_tensor_gives_plain_slices() -> None:
    volume = MetaTensor(ball())
    plane, position = choose(volume, 2, 0)
    shown = cut(volume, (1, 1, 1), 0, position[plane == 0], 8)
    assert {type(t) for t in (shown, position, window(volume, "MR"))} == {torch.Tensor}


@pytest.mark.parametrize("position", [[-0.1, 0.5], [0.5, 1.1], [float("nan")], []])
def test_a_position_outside_the_volume_is_refused(position: list[float]) -> None:
    with pytest.raises(ValueError, match=r"position must hold fractions in \[0, 1\]"):
        cut(ball(), (1, 1, 1), 0, torch.tensor(position), 8)


@pytest.mark.parametrize(
    "spacing", [(1, 0, 1), (1, -1, 1), (1, float("nan"), 1), (1, float("inf"), 1), (1, 1)]
)
def test_a_spacing_that_is_no_length_is_refused(spacing: tuple) -> None:
    with pytest.raises(ValueError, match="spacing must be three positive mm"):
        cut(ball(), spacing, 0, torch.tensor([0.5]), 8)


def test_the_cerebellum_lies_low_and_at_the_back_of_a_sagittal_slice() -> None:
    spec = find_spec("nilearn")
    if spec is None:
        pytest.skip("nilearn, whose wheel holds the template, is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
    image = nib.load(folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None]
    shown = cut(window(volume, "MR"), (1, 1, 1), 0, torch.tensor([0.45]), 96)[0, 0]
    rows = shown.any(1).nonzero().flatten()
    low = shown[int(rows[-1]) - 15 : int(rows[-1])]
    assert low[:, 48:].sum() > 3 * low[:, :48].sum()  # face and neck are not in the template


@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
def test_real_volumes_of_each_modality_fill_their_window(modality: str) -> None:
    for patient in ("STS_001", "STS_002", "STS_005"):
        volume = read_volume(str(real_data("sarcoma") / patient / f"{modality}.nii.gz"))
        shown = window(volume, modality[:2] if modality != "PET" else "PET")
        assert 0 <= shown.min() and shown.max() <= 1 and shown.std() > 0.05
        assert len(choose(shown, 4, 0)[0]) == 12


def test_wildly_scaled_real_mr_volumes_end_up_alike() -> None:
    files = sorted((real_data("hippocampus") / "imagesTr").glob("*.nii.gz"))[::10]
    volumes = [read_volume(str(file)) for file in files]
    assert max(v.max() for v in volumes) > 10 * min(v.max() for v in volumes)
    assert all(0.2 < window(volume, "MR").mean() < 0.7 for volume in volumes)


def test_the_examples_of_the_docstrings_hold() -> None:
    result = doctest.testmod(slicing)
    assert result.attempted and not result.failed
