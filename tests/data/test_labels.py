from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dinsight_ext.data.labels import (
    ReadCased,
    check_label,
    check_labels,
    label_values,
    read_case,
)
from med3dinsight_ext.data.laterality import offsets

NAMES = ["background", "left", "right"]


def case(folder: Path, name: str, values: tuple[int, ...] = (0, 1, 2), **changes: Any) -> dict:
    """An image and a label that fits it, unless told otherwise."""
    folder.mkdir(exist_ok=True)
    shape = (6, 7, 5)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    label = np.resize(np.array(values), changes.get("shape", shape)).astype(np.float32)
    place = affine.copy()
    place[0, 3] += changes.get("shift", 0.0)
    item = {"image": str(folder / f"{name}.nii"), "label": str(folder / f"{name}_seg.nii")}
    nib.save(nib.Nifti1Image(image, affine), item["image"])
    nib.save(nib.Nifti1Image(label, place), item["label"])
    return item


def test_sound_parts_come_back_as_they_are(tmp_path: Path) -> None:
    train = [case(tmp_path, "a"), case(tmp_path, "b", (0,))]  # a case may be all background
    val = [case(tmp_path, "c", (0, 2), shift=0.9)]  # 0.45 voxels: rounding of a header
    assert check_labels([train, val], NAMES) == [train, val]
    assert check_labels([[], val], NAMES) == [[], val]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (6, 7, 4)}, r"have its image's shape \(6, 7, 5\), got \(6, 7, 4\)"),
        ({"shift": 5.0}, r"lie where its image lies, got an affine that puts it up to 2\.5 voxels"),
        ({"values": (0, 1, 7)}, r"hold 0 to 2 \(background, left, right\), got the value 7"),
        ({"values": (0, 1, 0.5)}, r"got the value 0\.5"),
    ],
    ids=["shape", "affine", "value", "fraction"],
)
def test_a_bad_label_is_named_with_its_image(changes: dict, message: str, tmp_path: Path) -> None:
    good, bad = case(tmp_path, "a"), case(tmp_path, "bad", **changes)
    with pytest.raises(ValueError, match=rf"(?s)1 bad of 2.*{message}.*bad_seg\.nii of .*bad\.nii"):
        check_labels([[good, bad], []], NAMES)
    assert check_labels([[good, bad], []], NAMES, skip_bad=True) == [[good], []]


@pytest.mark.parametrize("row", [[np.nan, 0, 0, 0], [0, 4e-41, 0, 0]], ids=["nan", "flat"])
def test_a_broken_affine_is_named_though_the_spacing_would_replace_it(
    row: list[float], tmp_path: Path
) -> None:
    item = case(tmp_path, "a")
    label: Any = nib.load(item["label"])
    label.header["qform_code"], label.header["srow_x"] = 0, row
    with open(item["label"], "r+b") as file:
        label.header.write_to(file)
    with pytest.raises(ValueError, match=r"lie where its image lies.*a_seg\.nii of"):
        read_case(item, NAMES)
    with pytest.raises(ValueError, match=r"label must be readable, got .*a_seg\.nii"):
        offsets(item["label"], 3)


def test_missing_and_broken_labels_are_named_all_at_once(tmp_path: Path) -> None:
    items = [case(tmp_path, name) for name in "abcd"]
    del items[0]["label"]
    Path(items[1]["label"]).unlink()
    Path(items[2]["label"]).write_bytes(b"no nifti")
    with pytest.raises(ValueError) as caught:
        check_labels([items, []], NAMES)
    text = str(caught.value)
    assert "3 bad of 4" in text and "label must be a file, got None in" in text
    assert "b_seg.nii" in text and "label must be readable, got" in text


def test_a_bad_image_is_found_too(tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    nib.save(nib.Nifti1Image(np.full((6, 7, 5), np.nan, np.float32), np.eye(4)), item["image"])
    with pytest.raises(ValueError, match="volume must be finite, got 210 NaN"):
        check_labels([[item], []], NAMES)


@pytest.mark.parametrize(
    ("values", "message"), [((0,), "got only background in 1"), ((0, 2), "got none for left in 1")]
)
def test_a_class_that_training_never_shows_is_an_error(
    values: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"show each class of label_names in training, {message}"):
        check_labels([[case(tmp_path, "a", values)], [case(tmp_path, "b")]], NAMES)


def test_a_validation_of_empty_cases_is_an_error(tmp_path: Path) -> None:
    train, empty = [case(tmp_path, "a")], [case(tmp_path, "b", (0,)), case(tmp_path, "c", (0,))]
    with pytest.raises(ValueError, match="in validation, got only background in 2 cases; give"):
        check_labels([train, empty], NAMES)
    held = [*empty, case(tmp_path, "d", (0, 2))]
    assert check_labels([train, held], NAMES) == [train, held]
    assert check_labels([[], empty], NAMES) == [[], empty]  # an evaluation


def test_one_name_is_no_segmentation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_names must name the background and a class"):
        check_labels([[case(tmp_path, "a", (0,))], []], ["background"])


def test_a_case_is_read_in_ras(tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    for path in (item["image"], item["label"]):
        stored = nib.load(path)
        flip = np.diag([-1.0, 1, 1, 1])
        array = stored.get_fdata(dtype=np.float32)[::-1].copy()
        nib.save(nib.Nifti1Image(array, flip), path)
    data = ReadCased(["image", "label"], NAMES)({**item, "id": 3})
    assert data["id"] == 3 and data["image"].shape == data["label"].shape == (1, 6, 7, 5)
    assert torch.equal(data["image"].affine, data["label"].affine)
    assert data["label"].affine[0, 0] == 1
    stored = nib.load(item["label"]).get_fdata()[::-1]  # type: ignore[attr-defined]
    assert np.array_equal(data["label"].numpy()[0], stored)


@pytest.mark.parametrize("array", [[2, 2, 0, 0, 1, 2], [3], [0.5, 0.5], [0, np.nan]])
def test_label_values_are_those_of_a_sort(array: list) -> None:
    np.testing.assert_array_equal(label_values(np.array(array)), np.unique(array))


def test_half_a_voxel_beside_is_allowed_and_measured_along_the_smallest_spacing(
    tmp_path: Path,
) -> None:
    items = [case(tmp_path, "a", shift=1.0)]  # spacing 2 x 2 x 3 mm
    assert check_labels([items, []], NAMES) == [items, []]
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    moved = affine.copy()
    moved[0, 3] = 1.0  # a voxel along x, a quarter of one along z
    with pytest.raises(ValueError, match="puts it up to 1.0 voxels beside it"):
        check_label(((4, 5, 6), affine), ((4, 5, 6), moved), 1.0, [0, 1], NAMES, "a")


def test_two_classes_are_enough(tmp_path: Path) -> None:
    items = [case(tmp_path, "a", (0, 1))]
    assert check_labels([items, []], ["background", "organ"]) == [items, []]


def test_a_last_axis_of_one_counts_as_none(tmp_path: Path) -> None:
    items = [case(tmp_path, "a", shape=(6, 7, 5, 1))]
    assert check_labels([items, []], NAMES) == [items, []]
    with pytest.raises(ValueError, match=r"shape \(6, 7, 5\), got \(6, 7, 5, 2\)"):
        check_labels([[case(tmp_path, "b", shape=(6, 7, 5, 2))], []], NAMES)


def test_a_label_that_is_too_large_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MED3D_MAX_VOXELS", "300")
    with pytest.raises(ValueError, match="at most 300 voxels, got 60 x 7 x 5 .*a_seg.nii"):
        check_labels([[case(tmp_path, "a", shape=(60, 7, 5))], []], NAMES)


def test_an_image_may_have_a_last_axis_of_one(tmp_path: Path) -> None:
    item = case(tmp_path, "a", shift=0.9)
    image = nib.load(item["image"])
    again = nib.Nifti1Image(np.array(image.dataobj)[..., None], image.affine)
    again.header.set_zooms((2.0, 2.0, 3.0, 0.1))  # the last is a time
    nib.save(again, item["image"])
    assert check_labels([[item], []], NAMES) == [[item], []]


def test_five_unknown_values_are_shown(tmp_path: Path) -> None:
    items = [case(tmp_path, "a", (0, 3, 4, 5, 6, 7)), case(tmp_path, "b", (0, 3, 4, 5, 6, 7, 8))]
    with pytest.raises(ValueError, match=r"(?s)the value 3, 4, 5, 6, 7 in.*3, 4, 5, 6, 7 … in"):
        check_labels([items, []], NAMES)


def test_classes_that_differ_in_capitals_alone_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than capitals, got 'LV', 'lv '; rename them"):
        check_labels([[case(tmp_path, "a")], []], ["background", "LV", "lv "])
