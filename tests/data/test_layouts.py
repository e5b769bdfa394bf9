"""Layouts of folders: what is found, and one clear line for each that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volume_writers import write_dicom

from med3dinsight_ext.data.layouts import check_trainable, class_numbers, read_dataset


def put(root: Path, *names: str, shape: tuple[int, ...] = (6, 7, 8), value: int = 0) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        array = np.zeros(shape, np.uint8)
        array.flat[: array.size // 2] = value
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / name)


def pairs(root: Path, labels: Path | None = None) -> dict[str, str]:
    """Image to label, as paths below the folder."""
    top = root.parent
    return {
        str(Path(i["image"]).relative_to(top)): str(Path(i.get("label", top)).relative_to(top))
        for i in read_dataset(root, labels).items
    }


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["imagesTr/a.nii.gz", "imagesTr/b.nii.gz"], ["labelsTr/a.nii.gz"]),
        (["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz"], ["labelsTr/a.nii.gz"]),
        (["images/a.nii", "images/b.nii.gz"], ["labels/a.nii.gz"]),
        (["a.nii.gz", "b.nii.gz"], ["a_seg.nii.gz"]),
        (["p1/ct.nii.gz", "p2/ct.nii.gz"], ["p1/ct_mask.nii.gz"]),
        (["p1/images/x.nii.gz", "p2/images/x.nii.gz"], ["p1/labels/x.nii.gz"]),
        (["imagesTr/a_0001.nii.gz", "imagesTr/a_0002.nii.gz"], ["labelsTr/a_0001.nii.gz"]),
        (["a_0001.nii.gz", "a_0002.nii.gz"], ["a_0001_seg.nii.gz"]),
        (["imagesTr/a_0001_0000.nii.gz", "imagesTr/a_0002_0000.nii.gz"], ["labelsTr/a_0001.nii"]),
    ],
)
def test_usual_layouts_pair_images_and_labels(
    images: list[str], labels: list[str], tmp_path: Path
) -> None:
    put(tmp_path / "d", *images, *labels)
    assert pairs(tmp_path / "d") == {f"d/{images[0]}": f"d/{labels[0]}", f"d/{images[1]}": "."}


def test_labels_may_be_in_another_folder_or_a_list(tmp_path: Path) -> None:
    put(tmp_path, "scans/a.nii.gz", "scans/b.nii.gz", "masks/b_label.nii.gz")
    assert pairs(tmp_path / "scans", tmp_path / "masks") == {
        "scans/a.nii.gz": ".",
        "scans/b.nii.gz": "masks/b_label.nii.gz",
    }
    (tmp_path / "classes.csv").write_text("image,label\na.nii.gz,ill\nb.nii.gz,well\n")
    found = read_dataset(tmp_path / "scans", tmp_path / "classes.csv")
    assert [item["label"] for item in found.labelled()] == ["ill", "well"] and not found.segments()


def test_labels_may_be_in_a_folder_beside_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "d", "ct/a.nii.gz", "ct/b_0000.nii.gz", "seg/a.nii.gz")
    found = {"d/ct/a.nii.gz": "d/seg/a.nii.gz", "d/ct/b_0000.nii.gz": "."}
    assert pairs(tmp_path / "d", tmp_path / "d/seg") == found
    put(tmp_path / "e", "ct/a/x_0000.nii.gz", "ct/b/y_0000.nii.gz", "seg/x.nii.gz")
    found = {"e/ct/a/x_0000.nii.gz": "e/seg/x.nii.gz", "e/ct/b/y_0000.nii.gz": "."}
    assert pairs(tmp_path / "e", tmp_path / "e/seg") == found
    monkeypatch.chdir(tmp_path)
    assert len(read_dataset("e", "e/seg").items) == 2


def test_two_labels_of_an_image_are_named_where_labels_are_needed(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", "a_seg.nii.gz", "a_mask.nii.gz", "b.nii.gz", "b_seg.nii.gz")
    found = read_dataset(tmp_path)
    assert [Path(item["image"]).name for item in found.labelled()] == ["b.nii.gz"]
    assert found.notes == ["2 labels are left out: two or more are of one image"]
    with pytest.raises(ValueError, match=r"one for each image, got .*a_\w+.nii.gz and .*a_\w+.nii"):
        found.check_labels()


def test_most_labels_decide_whether_numbers_are_channels(tmp_path: Path) -> None:
    cases = [f"c{i}" for i in range(4)]
    put(tmp_path / "imagesTr", *(f"{case}_0000.nii.gz" for case in cases), "more.nii.gz")
    put(tmp_path / "labelsTr", *(f"{case}.nii.gz" for case in (*cases, "more")))
    found = read_dataset(tmp_path)
    assert len(found.labelled()) == 5 and found.items[0]["patient"] == "c0" and not found.notes


def test_numbers_of_the_channels_of_dataset_json_are_those(tmp_path: Path) -> None:
    put(tmp_path / "imagesTr", "c0_0000.nii.gz", "c0_0001.nii.gz", "c1_0001.nii.gz")
    described(tmp_path, ["CT", "PET"], {"background": 0})
    found = [(item["modality"], item["patient"]) for item in read_dataset(tmp_path).items]
    assert found == [("CT", "c0"), ("PET", "c0"), ("PET", "c1")]


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (["a_0000", "a_0001", "b_0000", "b_0001"], ["a", "a", "b", "b"]),  # channels
        (["a_0000", "b_0000"], ["a", "b"]),
        (["a_0000", "a_0001", "a_0002"], ["a_0000", "a_0001", "a_0002"]),
        (["a_0001", "b_0001"], ["a_0001", "b_0001"]),
        (["a_0000", "a_0001", "b_0000"], ["a_0000", "a_0001", "b_0000"]),
        (["CT/p1", "CT/p2", "MR/p1"], ["p1", "p2", "p1"]),
        (["p/CT/a1", "p/CT/a2", "p/MR/b", "q/CT/a"], ["p", "p", "p", "q"]),
        (["sub-1/ses-1/a", "sub-1/ses-2/a", "sub-2/a"], ["sub-1", "sub-1", "sub-2"]),
        (["p/t1", "p/t2", "q/t1"], ["p", "p", "q"]),
    ],
)
def test_patients_of_a_folder(names: list[str], patients: list[str], tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}.nii.gz" for name in names))
    found = read_dataset(tmp_path)
    assert [item["patient"] for item in found.items] == patients
    said = ["2 folders are taken for patients; write a list if they are not"]
    assert found.notes == (said if names[0][:2] == "p/" else [])


def test_patients_of_a_list_are_its_paths_and_subjects(tmp_path: Path) -> None:
    names = ["a/T1.nii.gz", "b/T1.nii.gz", "sub-1/T1.nii.gz", "sub-1/T2.nii.gz"]
    put(tmp_path, *names)
    (tmp_path / "list.json").write_text(json.dumps([{"image": name} for name in names]))
    found = [item["patient"] for item in read_dataset(tmp_path / "list.json").items]
    assert found == [*names[:2], "sub-1", "sub-1"]


def test_a_dataset_json_gives_names_and_modality_and_test_images_stay_out(tmp_path: Path) -> None:
    put(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    found = read_dataset(tmp_path)
    assert found.names == ["background", "liver"] and len(found.items) == 1
    assert found.items[0]["modality"] == "CT" and found.items[0]["patient"] == "a"
    assert found.notes == ["imagesTs is left out: images for tests"]


def test_a_split_of_more_images_stops_a_training_and_no_plan(tmp_path: Path) -> None:
    put(tmp_path, "a.nii", "b.nii")
    (tmp_path / "split.json").write_text('{"development": ["a", "gone"], "test": ["b"]}')
    found = read_dataset(tmp_path)
    assert [item["image"] for item in found.training().items] == [str(tmp_path / "a.nii")]
    with pytest.raises(ValueError, match=r"split must name ids of the source, got .*'gone'"):
        found.check_split()


def test_the_cases_for_tests_of_a_split_are_not_for_training(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "split.json").write_text('{"development": ["a"], "test": ["b"]}')
    found = read_dataset(tmp_path)
    assert len(found.items) == 2
    assert [Path(item["image"]).name for item in found.training().items] == ["a.nii.gz"]


def test_the_test_section_of_an_archive_is_left_out(tmp_path: Path) -> None:
    arrays = {f"{name}_images": np.ones((2, 4, 5, 6)) for name in ("train", "val", "test")}
    arrays |= {f"{name}_labels": np.array([[0], [1]]) for name in ("train", "val", "test")}
    np.savez(tmp_path / "set.npz", **arrays)
    found = read_dataset(tmp_path / "set.npz")
    sections = [item["image"].split("::")[1] for item in found.items]
    assert sections == ["train_images"] * 2 + ["val_images"] * 2
    assert found.notes == ["2 images of set.npz are left out: its section test"]


def test_regions_of_nnunet_name_no_classes_and_that_is_said(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    labels = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}}
    (tmp_path / "dataset.json").write_text(json.dumps(labels))
    found = read_dataset(tmp_path)
    assert found.names is None and "'whole' is a region of several values" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b'{"labels": {"0": "background",}}', "dataset.json must be readable, got .*dataset.json"),
        (
            '{"labels": {"0": "L\u00e4sion"}}'.encode("latin-1"),
            "must be readable, got .*dataset.json",
        ),
    ],
)
def test_a_dataset_json_that_cannot_be_read_is_named(
    text: bytes, rule: str, tmp_path: Path
) -> None:
    put(tmp_path, "a.nii.gz")
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(ValueError, match=rule):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["split.json", "captions.jsonl"])
@pytest.mark.parametrize("folder", ["imagesTr", "images"])
def test_a_file_of_the_dataset_in_its_folder_of_images_is_not_overlooked(
    name: str, folder: str, tmp_path: Path
) -> None:
    put(tmp_path, f"{folder}/a.nii.gz")
    (tmp_path / folder / name).touch()
    with pytest.raises(ValueError, match=f"{name} must lie in .*, got .*{folder}/{name}; move"):
        read_dataset(tmp_path)
    (tmp_path / name).touch()
    assert tmp_path / name in read_dataset(tmp_path)


def test_images_of_a_patients_folder_belong_together_but_classes_are_no_patients(
    tmp_path: Path,
) -> None:
    put(tmp_path / "few", "p1/t1.nii.gz", "p1/t2.nii.gz", "p2/t1.nii.gz")
    assert [i["patient"] for i in read_dataset(tmp_path / "few").items] == ["p1", "p1", "p2"]
    put(tmp_path / "many", *(f"{c}/{i}.nii.gz" for c in ("ill", "well") for i in range(11)))
    assert len({i["patient"] for i in read_dataset(tmp_path / "many").items}) == 22


@pytest.mark.parametrize(
    ("files", "rule"),
    [
        ([], "data must hold .nii.gz, .nii, .* files or DICOM series, got no files in"),
        (["a.txt", "b.txt", "c"], "got 2 .txt, 1 without extension in"),
        (["a.png"], r"got 1 .png in .* pictures \(2D\) are not volumes"),
    ],
)
def test_a_folder_without_volumes_says_what_is_in_it(
    files: list[str], rule: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rule):
        read_dataset(tmp_path)


def test_dicom_beside_nifti_is_left_out_with_a_note(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    for name in ("b.dcm", "c"):
        (tmp_path / name).touch()
    found = read_dataset(tmp_path)
    assert found.notes == ["1 DICOM files beside other volumes are left out"]
    assert [Path(item["image"]).name for item in found.items] == ["a.nii.gz"]


def test_endings_in_capitals_are_left_out_with_a_note(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", "C.NII.GZ")
    found = read_dataset(tmp_path)
    assert len(found.items) == 1
    assert "1 files like C.NII.GZ are left out: write endings in small letters" in found.notes


@pytest.mark.parametrize("name", ["a.seg", "a-seg", "a-label", "a-mask"])
def test_what_slicer_and_others_call_a_label_is_one(name: str, tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", f"{name}.nii.gz")
    (item,) = read_dataset(tmp_path).items
    assert Path(item["label"]).name == f"{name}.nii.gz"


def test_a_stray_file_hides_no_series(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    write_dicom(tmp_path / "p1", names="I{0:04d}")
    (tmp_path / "p1" / "CHECKSUMS").write_text("x" * 200)
    assert [Path(i["image"]).name for i in read_dataset(tmp_path).items] == ["p1"]


def test_one_file_a_missing_folder_and_labels_of_others_are_errors(tmp_path: Path) -> None:
    put(tmp_path, "scans/a.nii.gz", "masks/x.nii.gz")
    with pytest.raises(ValueError, match=r"must be a folder or a list, got the file .*name its fo"):
        read_dataset(tmp_path / "scans/a.nii.gz")
    with pytest.raises(ValueError, match="data must exist, got .*none"):
        read_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=r"got 1 labels \(x …\) and none named like one of 1 imag"):
        read_dataset(tmp_path / "scans", tmp_path / "masks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="labels must hold label maps, got no volumes"):
        read_dataset(tmp_path / "scans", tmp_path / "empty")
    with pytest.raises(ValueError, match="labels must be a folder or a list, got .*lost"):
        read_dataset(tmp_path / "scans", tmp_path / "lost")
    (tmp_path / "list.json").write_text('[{"image": "scans/a.nii.gz"}]')
    with pytest.raises(ValueError, match="labels must be a list where data is one, got .*masks"):
        read_dataset(tmp_path / "list.json", tmp_path / "masks")


def test_labels_without_an_image_are_noted(tmp_path: Path) -> None:
    put(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    assert read_dataset(tmp_path).notes == ["1 of 2 labels have no image"]


def described(root: Path, channels: list[str], labels: dict[str, int]) -> None:
    """nnU-Net's dataset.json."""
    names = {str(i): name for i, name in enumerate(channels)}
    (root / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": labels}))


def test_two_channels_of_a_labelled_case_are_images_of_one_patient_and_not_trainable(
    tmp_path: Path,
) -> None:
    put(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    described(tmp_path, ["CT", "PET"], {"background": 0, "tumour": 1})
    found = read_dataset(tmp_path)
    assert [(i["modality"], i["patient"]) for i in found.items] == [("CT", "a"), ("PET", "a")]
    with pytest.raises(ValueError, match="one image a label, got a_0000.nii.gz, a_0001.nii.gz for"):
        check_trainable(found)
    (tmp_path / "imagesTr/a_0001.nii.gz").unlink()
    check_trainable(read_dataset(tmp_path))


def test_an_unknown_channel_is_of_any_modality_and_ignored_voxels_are_not_a_class(
    tmp_path: Path,
) -> None:
    put(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    described(tmp_path, ["zscore"], {"background": 0, "tumour": 1, "ignore": 2})
    found = read_dataset(tmp_path)
    assert found.items[0]["modality"] == "auto"
    with pytest.raises(ValueError, match="must not be partial, got a label ignore in the dataset"):
        check_trainable(found)
    described(tmp_path, ["zscore"], {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    with pytest.raises(ValueError, match="must not be partial, got a label ignore in the dataset"):
        check_trainable(read_dataset(tmp_path))


def test_class_numbers_must_count_up(tmp_path: Path) -> None:
    put(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", value=1)
    assert class_numbers(read_dataset(tmp_path).items) == {0, 1}
    put(tmp_path, "labels/a.nii.gz", value=5)
    with pytest.raises(ValueError, match=r"0, 1, 2, … without a gap, got 0, 5 in 1 label maps"):
        class_numbers(read_dataset(tmp_path).items)
    (tmp_path / "labels/a.nii.gz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"label must be readable, got .*labels/a.nii.gz: Bad"):
        class_numbers(read_dataset(tmp_path).items)


def test_every_format_is_an_image_and_a_label_map_may_have_any_but_dicom(tmp_path: Path) -> None:
    names = ["a.nii", "b.nrrd", "c.mha", "d.mhd"]
    files = [f"{folder}/{name}" for folder in ("images", "labels") for name in names]
    for name in (
        *files,
        "images/d.raw",
        "images/.e.nrrd",
        "images/p1/s1/1.dcm",
        "labels/p1/s1.nrrd",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "images/p2").mkdir()
    (tmp_path / "images/p2/IM1").write_bytes(bytes(128) + b"DICM")
    found = read_dataset(tmp_path)
    images = [str(Path(item["image"]).relative_to(tmp_path / "images")) for item in found.items]
    assert images == [*names, "p1/s1", "p2"]
    labels = [Path(str(item.get("label"))).name for item in found.items]
    assert labels == [*names, "s1.nrrd", "None"]
