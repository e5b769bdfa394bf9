"""Left and right: names, labels, flips."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.transforms import RandFlipd
from real_data import real_data

from med3dinsight_ext.data.laterality import (
    Mirror,
    RandMirrord,
    mirror,
    name_pairs,
    offsets,
    one_sided,
    side_words,
    swap,
    swap_labels,
)
from med3dinsight_ext.losses.deep_supervision import DeepSupervision


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["background", "Brainstem", "SpinalCord", "RightParotid", "LeftParotid"], [(4, 3)]),
        (["background", "kidney_left", "kidney_right"], [(1, 2)]),
        (["background", "left kidney", "right kidney", "liver"], [(1, 2)]),
        (["background", "Kidney_L", "Kidney_R"], [(1, 2)]),
        (["background", "Parotid L", "Parotid R", "Eye R", "Eye L"], [(1, 2), (4, 3)]),
        (["background", "Niere links", "Niere rechts"], [(1, 2)]),
        (["background", "rein_gauche", "rein_droit"], [(1, 2)]),
        (["background", "femur_lt", "femur_rt"], [(1, 2)]),
        (["background", "LeftLungUpper", "RightLungUpper", "LeftLungLower"], [(1, 2)]),
        (["background", "left ventricle", "myocardium", "right ventricle"], []),
        (["background", "heart_atrium_left", "heart_atrium_right"], []),
        (["background", "Left-Lateral-Ventricle", "Right-Lateral-Ventricle"], [(1, 2)]),
        (["background", "anterior", "posterior"], []),
        (["background", "L", "S"], []),
        (["background", "leftover", "rightful"], []),
        (["background", "kidney_left", "left kidney", "right kidney"], []),
        (["left", "right"], [(0, 1)]),
    ],
)
def test_names_that_differ_in_the_side_are_pairs(
    names: list[str], pairs: list[tuple[int, int]]
) -> None:
    assert name_pairs(names) == pairs


def test_the_chambers_of_the_heart_are_not_mirrored() -> None:
    names = ["background", "left ventricle", "myocardium", "right ventricle"]
    assert mirror(names).axes == () and "left ventricle" in mirror(names).reason
    assert mirror(names, pairs=[[1, 3]]).axes == (0,)


def test_a_number_of_the_command_line_is_a_name() -> None:
    assert mirror([1, 2], first=0).axes == (0,)  # type: ignore[list-item]


def test_a_name_with_both_sides_has_none() -> None:
    assert side_words("left and right lung")[0] == 0


def saved(folder: Path, name: str, centres: dict[int, int], affine: np.ndarray) -> str:
    label = np.zeros((20, 6, 8), np.uint8)
    for number, x in centres.items():
        label[x - 1 : x + 2, 2:4, 2:5] = number
    path = folder / name
    nib.save(nib.Nifti1Image(label, affine), path)
    return str(path)


@pytest.mark.parametrize("direction", [1, -1])
def test_offsets_are_those_of_the_patient_not_of_the_file(tmp_path: Path, direction: int) -> None:
    affine = np.diag([direction * 1.5, 2, 1, 1])
    path = saved(tmp_path, "a.nii.gz", {1: 4, 2: 15}, affine)
    found = offsets(path, 4)
    assert set(found) == {1, 2}
    assert found[1] == pytest.approx(direction * (4.5 / 20 - 0.5))
    assert found[2] == pytest.approx(direction * (15.5 / 20 - 0.5))


def test_a_class_on_one_side_is_found_and_one_that_changes_sides_is_not(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path, f"{i}.nii.gz", {1: 4, 2: (4, 15)[i % 2], 3: 10}, np.eye(4))
        for i in range(6)
    ]
    assert one_sided(paths, 4) == [1]


@pytest.mark.parametrize(("x", "sided"), [(8, [1]), (9, [])])  # 7.5 and 2.5 % from the middle
def test_a_class_near_the_middle_has_no_side(x: int, sided: list[int], tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"{i}.nii.gz", {1: x}, np.eye(4)) for i in range(2)]
    assert one_sided(paths, 2) == sided


def test_a_class_in_the_middle_is_on_neither_side(tmp_path: Path) -> None:
    middle = np.zeros((20, 6, 8, 1), np.uint8)  # a fourth axis of one is no axis
    middle[9:11, 2:4, 2:5] = 1
    nib.save(nib.Nifti1Image(middle, np.eye(4)), tmp_path / "middle.nii.gz")
    assert offsets(str(tmp_path / "middle.nii.gz"), 2) == {1: 0.0}
    for x in (4, 15):
        paths = [saved(tmp_path, f"{i}.nii.gz", {1: x}, np.eye(4)) for i in range(9)]
        assert one_sided(paths, 2) == [1]
        assert one_sided([*paths[:8], str(tmp_path / "middle.nii.gz")], 2) == []  # 8 of 9


def test_real_parotids_lie_on_their_sides() -> None:
    folder = real_data("headneck")
    names = ["background", "Brainstem", "SpinalCord", "RightParotid", "LeftParotid"]
    paths = sorted(str(path) for path in (folder / "labelsTr").glob("*.nii.gz"))
    assert one_sided(paths, 5) == [3, 4]
    assert offsets(paths[0], 5)[3] > 0 > offsets(paths[0], 5)[4]
    found = mirror(names, [{"label": path} for path in paths])
    assert found.axes == (0,) and found.pairs == ((4, 3),)


def test_one_sided_without_a_partner_is_not_flipped(tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"{i}.nii.gz", {1: 4}, np.eye(4)) for i in range(4)]
    found = mirror(["background", "liver"], [{"label": path} for path in paths])
    assert found.axes == () and "without a partner: liver; set mirror_pairs" in found.reason
    assert found.allowed([0, 1, 2]) == [1, 2]


def test_a_named_side_without_a_partner_is_not_flipped() -> None:
    assert mirror(["background", "left kidney"]).axes == ()


def test_a_forbidden_axis_of_tta_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = mirror(["background", "left kidney"])
    with caplog.at_level(logging.INFO):
        assert found.allowed([1]) == [1] and not caplog.messages
        assert found.allowed([0, 1]) == [1]
    assert caplog.messages == [f"tta_axes [0, 1] without 0: {found.reason}"]


@pytest.mark.parametrize(
    ("names", "axes", "pairs"),
    [
        (["left", "right"], (0,), ((0, 1),)),
        (["no nodule", "left nodule", "right nodule"], (0,), ((1, 2),)),
        (["normal", "left nodule"], (), ()),
        (["benign", "malignant"], (0,), ()),
    ],
)
def test_classes_of_volumes_may_be_sides(
    names: list[str], axes: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> None:
    found = mirror(names, first=0)
    assert found.axes == axes and found.pairs == pairs


def test_the_first_class_is_paired_in_classification_alone() -> None:
    assert mirror(["a", "b"], pairs=[[0, 1]], first=0).pairs == ((0, 1),)
    with pytest.raises(ValueError, match="from 1 to 1, got"):
        mirror(["a", "b"], pairs=[[0, 1]])


def test_central_classes_are_flipped() -> None:
    assert mirror(["background", "anterior"]).axes == (0,)


def test_axes_and_pairs_may_be_given() -> None:
    found = mirror(["background", "a", "b", "liver"], axes=[0, 2], pairs=[[1, 2]])
    assert found.axes == (0, 2) and found.pairs == ((1, 2),)


@pytest.mark.parametrize("pairs", [[[0, 1]], [[1, 1]], [[1, 2], [2, 3]], [[1]], [[1, 9]], "x", 3])
def test_bad_pairs_are_refused(pairs: object) -> None:
    with pytest.raises(ValueError, match=r"mirror_pairs must be auto or pairs"):
        mirror(["background", "a", "b", "c"], pairs=pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [[3], "x", 0, [-1], [0, 0]])
def test_bad_axes_are_refused(axes: object) -> None:
    with pytest.raises(ValueError, match="mirror_axes must be auto or some of"):
        mirror(["background", "a"], axes=axes)  # type: ignore[arg-type]


def test_swap_is_its_own_inverse() -> None:
    order = swap([(1, 3)], 5)
    assert order == [0, 3, 2, 1, 4] and [order[i] for i in order] == list(range(5))
    assert swap([(1, 2)], 4, first=1) == [0, 1, 3, 2]
    label = torch.randint(0, 4, (1, 3, 4, 5))
    twice = swap_labels(swap_labels(label, [(1, 3)]), [(1, 3)])
    assert torch.equal(twice, label)


def test_a_left_right_flip_moves_voxels_and_swaps_classes() -> None:
    image = MetaTensor(torch.rand(1, 4, 3, 5))
    label = MetaTensor(torch.zeros(1, 4, 3, 5))
    label[:, 0], label[:, 3] = 1, 2
    flip = RandMirrord(["image", "label"], "label", Mirror((0,), ((1, 2),), ""), prob=1.0)
    made = flip({"image": image, "label": label})
    assert torch.equal(made["image"].as_tensor(), image.as_tensor().flip(1))
    assert torch.equal(made["label"].as_tensor(), label.as_tensor())  # 1 is left again
    assert made["label"].applied_operations or made["image"].applied_operations


def test_a_left_right_flip_swaps_the_channels_of_paired_classes() -> None:
    label = MetaTensor(torch.rand(3, 4, 3, 5).softmax(0))
    flip = RandMirrord("label", "label", Mirror((0,), ((1, 2),), ""), prob=1.0)
    made = flip({"label": label})["label"]
    assert torch.equal(made.as_tensor(), label.as_tensor().flip(1)[[0, 2, 1]])


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_flip_keeps_world_positions(key: str) -> None:
    values = torch.zeros(1, 4, 3, 5)
    values[0, 1, 2, 3] = 1
    flip = RandMirrord(key, "label", Mirror((0,), ((1, 2),), ""), prob=1.0)
    made = flip({key: MetaTensor(values, affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))})[key]
    assert isinstance(made, MetaTensor) and made[0, 2, 2, 3] == (2 if key == "label" else 1)
    place = made.affine @ torch.tensor([2.0, 2, 3, 1], dtype=made.affine.dtype)
    assert place.tolist() == [2, 6, 12, 1]


def test_deep_supervision_is_the_same_for_the_mirrored_patch() -> None:
    pairs = ((1, 2),)
    coarse = torch.randint(0, 4, (1, 3, 2, 2)).float()
    label = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    levels = [torch.rand(1, 4, 12 // n, 8 // n, 8 // n) for n in (1, 2, 4)]
    mirrored = RandMirrord("label", "label", Mirror((0,), pairs, ""), prob=1.0)({"label": label})
    loss = DeepSupervision(DiceCELoss(to_onehot_y=True, softmax=True))
    flipped = [level.flip(2)[:, swap(pairs, 4)] for level in levels]
    assert torch.allclose(loss(flipped, mirrored["label"][None]), loss(levels, label[None]))


def test_other_axes_do_not_swap() -> None:
    label = MetaTensor(torch.randint(0, 3, (1, 4, 3, 5)).float())
    flip = RandMirrord("label", "label", Mirror((1,), ((1, 2),), ""), prob=1.0)
    assert torch.equal(flip({"label": label})["label"].as_tensor(), label.as_tensor().flip(2))


def test_a_class_number_swaps_with_the_volume() -> None:
    flip = RandMirrord(["image", "label"], "label", Mirror((0,), ((0, 1),), ""), prob=1.0)
    assert flip({"image": torch.rand(1, 4, 3, 5), "label": 1})["label"] == 0


def test_without_pairs_it_is_monais_flip() -> None:
    given = {"image": torch.rand(1, 4, 3, 5), "label": torch.rand(1, 4, 3, 5)}
    ours = RandMirrord(["image", "label"], "label", Mirror((0,), (), ""), prob=0.3)
    theirs = RandFlipd(["image", "label"], prob=0.3, spatial_axis=0)
    ours.set_random_state(3), theirs.set_random_state(3)
    for _ in range(20):
        a, b = ours(given), theirs(given)
        assert all(torch.equal(a[key], b[key].as_tensor()) for key in given)


def test_a_missing_key_is_an_error_unless_it_may_be_missing() -> None:
    image, mirrored = {"image": torch.rand(1, 4, 3, 5)}, Mirror((0,), (), "")
    with pytest.raises(KeyError, match="label"):
        RandMirrord(("image", "label"), "label", mirrored, 1.0)(image)
    flip = RandMirrord(("image", "label"), "label", mirrored, 1.0, allow_missing_keys=True)
    assert torch.equal(flip(image)["image"], image["image"].flip(1))


def test_flips_are_drawn_from_the_seed() -> None:
    def drawn(seed: int) -> list[bool]:
        flip = RandMirrord("image", "label", Mirror((0,), (), "")).set_random_state(seed)
        image = torch.rand(1, 4, 3, 5)
        return [not torch.equal(flip({"image": image})["image"], image) for _ in range(40)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert 8 < sum(drawn(0)) < 32
