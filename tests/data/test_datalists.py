from __future__ import annotations

import doctest
import json
import logging
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dataset_writers import GOOD, decathlon, nifti
from monai.data import MetaTensor
from real_data import real_data

from med3dinsight_ext.data import datalists
from med3dinsight_ext.data.datalists import (
    class_items,
    class_weights,
    datalist,
    subset_names,
    with_all_classes,
)
from med3dinsight_ext.data.modalities import modality_name
from med3dinsight_ext.data.volumes import (
    ScaleByModalityd,
    check_parts,
    guess_modality,
    read_volume,
)


def patched(path: Path, offset: int, value: float) -> str:
    """A sound file with one float of its header overwritten."""
    nifti(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, offset, value)
    path.write_bytes(content)
    return str(path)


def raw(path: Path, array: np.ndarray) -> str:
    """A file with an array's own type."""
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return str(path)


def cut_short(path: Path) -> str:
    nifti(path, np.random.default_rng(0).random((20, 21, 22)))
    path.write_bytes(path.read_bytes()[:-4000])
    return str(path)


def text_file(path: Path) -> str:
    path.write_text("not a volume")
    return str(path)


def with_value(path: Path, value: float) -> str:
    array = GOOD.copy()
    array[1, 2, 3] = value
    return nifti(path, array)


PIXDIM, SROW_X = 80, 280  # byte offsets of the first spacing and the first affine row
BAD = {
    "text": (lambda p: text_file(p / "v.nii.gz"), "be readable, got .* BadGzipFile"),
    "absent": (lambda p: str(p / "v.nii.gz"), "be readable, got .* FileNotFoundError"),
    "truncated .nii.gz": (lambda p: cut_short(p / "v.nii.gz"), "be readable, got .* EOFError"),
    "truncated .nii": (
        lambda p: cut_short(p / "v.nii"),
        "header must claim what its file can hold",
    ),
    "nan": (lambda p: with_value(p / "v.nii.gz", np.nan), "be finite, got 1 NaN"),
    "infinite": (lambda p: with_value(p / "v.nii.gz", np.inf), "be finite, got 1 NaN or inf"),
    "4D": (lambda p: nifti(p / "v.nii", np.ones((3, 4, 5, 2))), r"be 3D, got shape \(3, 4, 5, 2\)"),
    "2D": (lambda p: nifti(p / "v.nii", np.ones((3, 4))), r"be 3D, got shape \(3, 4\)"),
    "colours": (
        lambda p: raw(p / "v.nii", np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "have one real value a voxel, got .*'R'",
    ),
    "complex": (lambda p: raw(p / "v.nii", GOOD + 1j), "have one real value a voxel, got complex"),
    "thin": (lambda p: nifti(p / "v.nii", GOOD[:, :1]), "be thicker than one voxel"),
    "no spacing": (
        lambda p: patched(p / "v.nii", PIXDIM, 0.0),
        r"above 0 mm, got \[0.0, 1.0, 1.0\]",
    ),
    "negative spacing": (lambda p: patched(p / "v.nii", PIXDIM, -2.0), r"above 0 mm, got \[-2.0"),
    "nan spacing": (lambda p: patched(p / "v.nii", PIXDIM, np.nan), r"above 0 mm, got \[nan"),
    "flat affine": (lambda p: patched(p / "v.nii", SROW_X, 0.0), "have an invertible affine"),
    "nan affine": (
        lambda p: patched(p / "v.nii", SROW_X + 12, np.nan),
        "have an invertible affine",
    ),
    "constant": (lambda p: nifti(p / "v.nii", 0 * GOOD + 7), "vary, got 7 everywhere"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_volume_is_named_with_its_path_and_reason(tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_volume(path)
    assert path in str(caught.value) and "repair the file" in str(caught.value)


def test_a_volume_is_read_with_its_values_spacing_and_name(tmp_path: Path) -> None:
    path = nifti(tmp_path / "v.nii.gz", GOOD, np.diag([1.0, 2.0, 3.0, 1.0]))
    volume = read_volume(path)
    assert volume.dtype == torch.float32
    assert torch.equal(volume.as_tensor(), torch.from_numpy(GOOD)[None])
    assert volume.pixdim.tolist() == [1, 2, 3] and volume.meta["filename_or_obj"] == path


def test_a_volume_is_turned_to_ras(tmp_path: Path) -> None:
    # Stored axes run to inferior, left, posterior.
    affine = np.array([[0, -2, 0, 0], [0, 0, -3, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = read_volume(nifti(tmp_path / "v.nii.gz", GOOD, affine))
    expected = torch.from_numpy(GOOD.transpose(1, 2, 0)[::-1, ::-1, ::-1].copy())
    assert torch.equal(volume.as_tensor()[0], expected) and volume.pixdim.tolist() == [2, 3, 1]


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    assert read_volume(nifti(tmp_path / "v.nii", GOOD[..., None])).shape == (1, 3, 4, 5)


def test_all_bad_volumes_are_named_at_once(tmp_path: Path) -> None:
    paths = [nifti(tmp_path / "good.nii"), nifti(tmp_path / "flat.nii", 0 * GOOD)]
    paths.append(text_file(tmp_path / "text.nii"))
    with pytest.raises(ValueError, match="got 2 bad of 3 .skip_bad leaves") as caught:
        check_parts([[{"image": path} for path in paths]])
    assert paths[1] in str(caught.value) and paths[2] in str(caught.value)
    assert paths[0] not in str(caught.value)


def test_bad_volumes_can_be_left_out_and_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [{"image": nifti(tmp_path / f"{i}.nii", i * GOOD)} for i in range(3)]
    with caplog.at_level(logging.WARNING):
        assert check_parts([items], skip_bad=True) == [items[1:]]
    assert items[0]["image"] in caplog.text


def test_bad_volumes_of_all_parts_are_named_or_left_out(tmp_path: Path) -> None:
    names = ("good", "flat", "text")
    good, flat, text = ({"image": str(tmp_path / f"{name}.nii")} for name in names)
    nifti(tmp_path / "good.nii")
    nifti(tmp_path / "flat.nii", 0 * GOOD)
    text_file(tmp_path / "text.nii")
    with pytest.raises(ValueError, match="got 2 bad of 4") as caught:
        check_parts([[good, flat], [text, {**good}]])
    assert flat["image"] in str(caught.value) and text["image"] in str(caught.value)
    assert check_parts([[good, flat], [text, {**good}]], skip_bad=True) == [[good], [good]]


def test_leaving_all_volumes_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1 bad of 1"):
        check_parts([[{"image": text_file(tmp_path / "v.nii")}]], skip_bad=True)


@pytest.mark.parametrize(
    ("written", "modality"),
    [("MRI", "MR"), ("MR_T1", "MR"), ("flair", "MR"), ("ct", "CT"), ("PT", "PET"), ("", "auto")],
)
def test_modalities_are_known_by_many_names(written: str, modality: str) -> None:
    assert modality_name(written) == modality


def test_an_unknown_modality_is_refused(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="modality must be CT, MR, PET or auto, got 'ultrasound'"):
        datalist(tmp_path, modality="ultrasound")


def test_air_tells_ct_from_mr() -> None:
    assert guess_modality(torch.tensor([-1000.0, 40.0])) == "CT"
    assert guess_modality(torch.tensor([-3.0, 900.0])) == "MR"


def test_a_decathlon_file_gives_images_labels_and_modality(tmp_path: Path) -> None:
    items = datalist(decathlon(tmp_path))
    assert items[1] == {
        "image": str(tmp_path / "imagesTr" / "b.nii.gz"),
        "label": str(tmp_path / "labelsTr" / "b.nii.gz"),
        "modality": "MR",
    }


def test_another_section_of_a_decathlon_file_can_be_asked_for(tmp_path: Path) -> None:
    source = decathlon(tmp_path, test=["./imagesTr/c.nii.gz"])
    assert [item["image"][-8:] for item in datalist(source, subset="test")] == ["c.nii.gz"]
    with pytest.raises(ValueError, match=r"subset must be one of \['training', 'test'\].*'tset'"):
        datalist(source, subset="tset")


def test_a_json_list_keeps_its_fields(tmp_path: Path) -> None:
    nifti(tmp_path / "p1" / "CT.nii.gz")
    row = {"image": "p1/CT.nii.gz", "modality": "CT", "patient": "p1", "age": 50}
    (tmp_path / "index.json").write_text(json.dumps([row]))
    (item,) = datalist(tmp_path / "index.json")
    assert item == row | {"image": str(tmp_path / "p1" / "CT.nii.gz")}


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_a_table_gives_images_and_class_labels(tmp_path: Path, name: str) -> None:
    nifti(tmp_path / "a.nii")
    rows = {
        "list.csv": "image,label\na.nii,benign\n",
        "list.jsonl": '{"image": "a.nii", "label": "benign"}\n\n',
    }
    (tmp_path / name).write_text(rows[name])
    (item,) = datalist(tmp_path / name)
    assert item == {"image": str(tmp_path / "a.nii"), "label": "benign", "modality": "auto"}


def test_a_folder_gives_its_images_but_not_its_labels(tmp_path: Path) -> None:
    for name in (
        "b/CT.nii.gz",
        "b/CT_gtv.nii.gz",
        "a_seg.nii",
        "a.nii",
        "labelsTr/a.nii",
        "b/labels/CT.nii",
    ):
        nifti(tmp_path / name)
    names = [str(Path(i["image"]).relative_to(tmp_path)) for i in datalist(tmp_path)]
    assert names == ["a.nii", "b/CT.nii.gz"]


def test_an_archive_gives_its_arrays_image_by_image(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 6), dtype=np.uint8)
    arrays = {
        "train_images": stack[:2],
        "train_labels": np.array([[0], [1]]),
        "test_images": stack[2:],
        "test_labels": np.array([[1]]),
    }
    np.savez(tmp_path / "set.npz", **arrays)
    assert len(datalist(tmp_path / "set.npz")) == 3
    items = datalist(tmp_path / "set.npz", subset="train", modality="CT")
    assert [item["label"] for item in items] == [0, 1] and items[0]["modality"] == "CT"
    volume = read_volume(items[1]["image"])
    assert torch.equal(volume.as_tensor(), torch.from_numpy(stack[1]).float()[None])


def test_a_modality_that_is_given_overrides_the_items_own(tmp_path: Path) -> None:
    assert {i["modality"] for i in datalist(decathlon(tmp_path), modality="pet")} == {"PET"}


def test_paths_can_start_from_another_root(tmp_path: Path) -> None:
    nifti(tmp_path / "images" / "a.nii")
    (tmp_path / "list.csv").write_text("image\na.nii\n")
    (item,) = datalist(tmp_path / "list.csv", root=tmp_path / "images")
    assert item["image"] == str(tmp_path / "images" / "a.nii")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "path\na.nii\n", "image must be a path in every item"),
        ("a.csv", "image\nlost.nii\n", "images must exist, got 1 of 1"),
        ("a.csv", "image\na.nii\n./a.nii\n", "images must be listed once, got 1 of 1"),
        ("a.jsonl", '{"image": "a.nii"}\n{"image"\n', "a.jsonl line 2 must be JSON"),
        ("a.jsonl", '["a.nii"]\n', "a.jsonl line 1 must be a JSON object"),
        ("a.json", "[", "source must be readable, got .*a.json"),
        ("a.json", "{}", "source must have a list 'training'"),
        ("a.json", '{"training": 5}', "source must be readable, got .*a.json: .*; write it like"),
        ("a.json", "[5]", "items must be readable, got .*a.json: .*; correct the list"),
        ("a.json", "5", "source must have a list 'training', got 5 in .*a.json"),
        ("a.csv", "image\n", "source must list images, got none"),
        ("a.txt", "a.nii", "source must be a folder, .json, .jsonl, .csv, .parquet or .npz"),
    ],
)
def test_a_faulty_list_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    nifti(tmp_path / "a.nii")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        datalist(tmp_path / name)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must exist, got .*nowhere"):
        datalist(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must list images, got none"):
        datalist(tmp_path)


def test_real_volumes_pass_the_check_and_show_their_modality() -> None:
    items = datalist(real_data("sarcoma") / "index.json")[::4]
    assert len(check_parts([items])[0]) == len(items) == 31
    for item in items[:12]:
        guess = guess_modality(read_volume(item["image"]))
        assert (guess == "CT") == (item["modality"] == "CT")


def test_numbers_that_are_names_are_no_indices() -> None:
    def labels(given: list[Any], names: list[Any]) -> list[int]:
        items = [{"image": f"{n}.nii", "label": n} for n in given]
        return [item["label"] for item in class_items(items, names)]

    assert labels([1, 2, 3], ["1", "2", "3"]) == [0, 1, 2]
    assert labels([0, 2, 10], ["0", "2", "10"]) == [0, 1, 2]
    assert labels([0, 1], ["1", "0"]) == [1, 0] and labels([0, 1], ["well", "ill"]) == [0, 1]
    assert class_items([{"image": "a", "label": [1]}], ["1", "2"])[0]["label"] == 0
    assert labels([0.0, 1.0], ["0.0", "1.0"]) == [0, 1] == labels([0, 1], ["0.0", "1.0"])
    assert labels([-1, 0, 1], ["-1", "0", "1"]) == [0, 1, 2]
    assert labels([1, "2"], [1, 2]) == [0, 1]
    with pytest.raises(ValueError, match="label must be one of class_names .*got 1 of 2"):
        labels([0, 1], ["1", "2"])


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    nifti(tmp_path / "disk" / "p1" / "a.nii")
    (tmp_path / "study").mkdir()
    for name in ("p1", "p2"):
        (tmp_path / "study" / name).symlink_to(tmp_path / "disk" / "p1")
    (tmp_path / "study" / "loop").symlink_to(tmp_path / "study")
    (tmp_path / "study" / "a").symlink_to(tmp_path)  # above it
    nifti(tmp_path / "study" / "z" / "b.nii")
    (tmp_path / "study" / "b").symlink_to(tmp_path / "study" / "z")
    found = [item["image"] for item in datalist(tmp_path / "study")]
    assert found == [str(tmp_path / "study" / name) for name in ("p1/a.nii", "z/b.nii")]


def test_a_table_of_excel_has_its_columns(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii")
    (tmp_path / "a.csv").write_text("image,label\na.nii,ill\n", encoding="utf-8-sig")
    assert datalist(tmp_path / "a.csv")[0]["label"] == "ill"
    (tmp_path / "b.csv").write_text("image;label\na.nii;ill\n")
    with pytest.raises(ValueError, match="got None beside 'image;label'; name it in a field or"):
        datalist(tmp_path / "b.csv")


def test_ct_is_scaled_by_hu_and_mr_by_percentiles() -> None:
    volume = MetaTensor(torch.linspace(-1000, 1000, 4 * 5 * 6).view(1, 4, 5, 6))
    scale = ScaleByModalityd("image", (-200, 300))
    ct = scale({"image": volume, "modality": "CT"})["image"]
    assert torch.allclose(ct, ((volume + 200) / 500).clamp(0, 1), atol=1e-6)
    assert torch.equal(scale({"image": volume, "modality": "auto"})["image"], ct)
    mr = scale({"image": volume, "modality": "MR"})["image"]
    assert isinstance(mr, MetaTensor) and mr.min() == 0 and mr.max() == 1 and mr.median() < 0.6


@pytest.mark.parametrize(
    ("own", "used"), [({}, "CT"), ({"modality": "auto"}, "CT"), ({"modality": "MR"}, "MR")]
)
def test_an_item_without_a_modality_has_the_given_one(own: dict, used: str) -> None:
    volume = MetaTensor(torch.linspace(-100, 200, 4 * 5 * 6).view(1, 4, 5, 6))  # no air: like MR
    found = ScaleByModalityd("image", modality="ct")({"image": volume, **own})["image"]
    assert torch.equal(
        found, ScaleByModalityd("image")({"image": volume, "modality": used})["image"]
    )


@pytest.mark.parametrize("label", [1, "1", "ill", ["ill"], [1]], ids=str)
def test_a_label_may_be_a_name_or_an_index(label: object) -> None:
    item = {"image": "/d/a.nii", "label": label, "modality": "CT"}
    assert class_items([item], ["well", "ill"]) == [item | {"label": 1}]
    assert item["label"] == label


def test_a_text_that_is_a_name_and_an_index_is_the_name() -> None:
    assert class_items([{"image": "a.nii", "label": "1"}], ["1", "0"])[0]["label"] == 0


def test_all_bad_labels_are_counted_and_the_first_three_named() -> None:
    labels = ["ill", "Ill", 2, -1, 1.0, [0, 1], None]
    items = [{"image": f"/d/{i}.nii", "label": label} for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match=r"got 6 of 7 that are not: 'Ill' of /d/1.nii, 2 of") as e:
        class_items(items, ["well", "ill"])
    assert "['well', 'ill']" in str(e.value) and "/d/3.nii; correct" in str(e.value)


def test_texts_of_a_table_have_no_blanks_and_some_stand_for_no_label(tmp_path: Path) -> None:
    given = ["benign", "malignant ", " NA", "nan", float("nan")]
    rows = [{"image": nifti(tmp_path / f"{i}.nii"), "label": x} for i, x in enumerate(given)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    found = [item["label"] for item in datalist(tmp_path / "list.json")]
    assert found == ["benign", "malignant", "", "", None]


def test_folders_above_the_dataset_are_no_classes() -> None:
    item = {"image": "/well/data/ill/a.nii"}
    assert class_items([item], ["well", "ill"], "/well/data")[0]["label"] == 1


def test_an_item_without_label_is_named() -> None:
    with pytest.raises(ValueError, match="'no label' of /d/a.nii; correct these labels"):
        class_items([{"image": "/d/a.nii", "label": ""}], ["well", "ill"])


def test_a_folder_named_after_a_class_is_the_label(tmp_path: Path) -> None:
    for name in ("well/a.nii", "ill/patient_1/b.nii.gz", "ill/illness.nii"):
        nifti(tmp_path / name)
    items = with_all_classes(class_items(datalist(tmp_path), ["well", "ill"]), ["well", "ill"])
    assert {Path(i["image"]).name: i["label"] for i in items} == {
        "a.nii": 0,
        "b.nii.gz": 1,
        "illness.nii": 1,
    }


def test_a_label_field_comes_before_the_folder() -> None:
    items = class_items([{"image": "/d/well/a.nii", "label": 1}], ["well", "ill"])
    assert items[0]["label"] == 1


def test_folders_of_two_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['ill', 'well'\] of /well/ill/a.nii"):
        class_items([{"image": "/well/ill/a.nii"}], ["well", "ill"])


def test_a_class_without_a_case_is_an_error_in_training_alone() -> None:
    items = [{"image": "a.nii", "label": "ill"}]
    assert class_items(items, ["well", "ill"])[0]["label"] == 1
    with pytest.raises(ValueError, match=r"a case in training, got none for \['well'\]; add"):
        with_all_classes(class_items(items, ["well", "ill"]), ["well", "ill"])


@pytest.mark.parametrize("names", [["ill"], ["ill", "ill"]])
def test_class_names_must_differ(names: list[str]) -> None:
    with pytest.raises(ValueError, match="class_names must be two or more different ones, got"):
        class_items([], names)


def test_the_examples_of_the_docstrings_hold() -> None:
    result = doctest.testmod(datalists)
    assert result.attempted and not result.failed


def test_sections_are_subsets(tmp_path: Path) -> None:
    listed = tmp_path / "dataset.json"
    listed.write_text(json.dumps({"training": ["a.nii"], "test": ["b.nii"]}))
    assert subset_names(listed) == ["training", "test"]
    listed.write_text(json.dumps(["a.nii"]))
    assert subset_names(listed) == subset_names(tmp_path) == []


def test_weights_of_classes_are_inverse_to_their_cases() -> None:
    weights = class_weights([{"label": label} for label in (0, 0, 0, 1)], 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (["1", "2"], 1.0, 0),
        (["2", "high"], 1, 1),
        (["1", "2", "3", "4a"], 1, 0),
        (["1", "2", "3", "4a"], "4a", 3),
        (["True", "False"], True, 0),
        (["negative", "positive"], True, 1),
        (["2", "high"], "2", 0),
        (["2", "high"], 2.0, None),
    ],
)
def test_a_number_is_a_name_where_all_names_are_numbers(
    names: list[str], label: object, index: int | None
) -> None:
    items = [{"image": "a.nii", "label": label}]
    if index is None:
        with pytest.raises(ValueError, match=f"label must be one of .*got 1 of 1 .*: {label} of"):
            class_items(items, names)
    else:
        assert class_items(items, names)[0]["label"] == index


def test_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    for name in ("a.nii.gz", ".Trash-1000/files/b.nii.gz", ".git/annex/c.nii.gz"):
        nifti(tmp_path / name)
    assert [Path(item["image"]).name for item in datalist(tmp_path)] == ["a.nii.gz"]
    assert len(datalist(tmp_path / ".Trash-1000")) == 1
