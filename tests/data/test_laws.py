"""Each law on a cohort of tiny CT volumes, with one planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3dinsight_ext.data import laws
from med3dinsight_ext.data.cohort import Cohort, read_cohort
from med3dinsight_ext.data.identity import text_strokes
from med3dinsight_ext.data.laws import Finding, findings
from med3dinsight_ext.data.likeness import near_pairs

SHAPE = (26, 28, 24)
NAMES = ["background", "kidney_left", "kidney_right"]
SPACING = (3.0, 3.0, 4.0)
CASES = 10


def body(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT of a trunk with a liver, a spine and lungs above, and the label of its kidneys."""
    random = np.random.default_rng(seed)
    grid = zip(np.indices(SHAPE), SHAPE, strict=True)
    x, y, z = ((i + random.uniform(0, 1)) / n * 2 - 1 for i, n in grid)

    def ball(*parts: tuple[np.ndarray, float, float]) -> np.ndarray:
        return sum(((a - centre) / radius) ** 2 for a, centre, radius in parts) < 1

    image = np.full(SHAPE, -1000.0)
    image[ball((x, 0, 0.8), (y, 0, 0.7))] = 0
    image[image == 0] += 100 * random.normal(size=SHAPE)[image == 0]
    image[ball((x, 0.35, 0.3), (y, 0.1, 0.4), (z, -0.2, 0.5))] += 400
    image[ball((x, 0, 0.12), (y, -0.45, 0.12))] += 1000
    image[ball((x, 0, 0.5), (y, 0, 0.4), (z, 0.9, 0.4))] = -800
    label = np.zeros(SHAPE, np.uint8)
    label[5:9, 8:12, 8:13], label[17:21, 8:12, 7:12] = 1, 2
    return image.astype(np.float32), label


def save(path: Path, array: np.ndarray, spacing: Sequence[float] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten sound cases, eight for development and two for test."""
    rows = []
    for i in range(CASES):
        for kind, array in zip(("images", "labels"), body(i), strict=True):
            save(tmp_path / kind / f"{i}.nii", array)
        rows.append({"image": f"images/{i}.nii", "label": f"labels/{i}.nii", "patient": f"p{i}"})
    about = {"modality": {"0": "CT"}, "labels": dict(enumerate(NAMES)), "training": rows}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    split = {"development": [f"p{i}" for i in range(8)], "test": ["p8", "p9"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    return tmp_path


def cohort(folder: Path) -> Cohort:
    return read_cohort(folder / "dataset.json", folder / "split.json")


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    save(path, np.ascontiguousarray(edit(np.asarray(nib.load(path).dataobj))))


def images(*numbers: int) -> list[str]:
    return [f"images/{i}.nii" for i in numbers]


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def test_sound_data_breaks_no_law(folder: Path) -> None:
    assert findings(cohort(folder)) == []


def test_a_patient_in_two_lists_is_an_error(folder: Path) -> None:
    about = json.loads((folder / "dataset.json").read_text())
    about["training"][9]["patient"] = "p3"
    (folder / "dataset.json").write_text(json.dumps(about))
    split = {"development": [f"p{i}" for i in range(8)], "test": ["p8", "9"]}
    (folder / "split.json").write_text(json.dumps(split))
    finding = only(laws.one_list_per_patient(cohort(folder)))
    assert finding.level == "error" and finding.files == images(3, 9)
    assert finding.text == "patient p3 is in development and test"


def test_a_section_of_the_source_is_a_list(folder: Path) -> None:
    (folder / "split.json").unlink()
    about = json.loads((folder / "dataset.json").read_text())
    about["validation"] = [{**about["training"].pop(9), "patient": "p0"}]
    (folder / "dataset.json").write_text(json.dumps(about))
    finding = only(laws.one_list_per_patient(read_cohort(folder / "dataset.json")))
    assert finding.text == "patient p0 is in training and validation"


def test_an_id_without_an_image_is_an_error(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"test": ["p8", "nobody"]}))
    finding = only(laws.usable_files(cohort(folder)))
    assert finding.level == "error" and finding.text.endswith("match no image: nobody")


def test_a_bad_file_is_an_error_and_the_others_are_read(folder: Path) -> None:
    (folder / "images" / "2.nii").write_bytes(b"no volume")
    found = cohort(folder)
    finding = only(laws.usable_files(found))
    assert finding.files == images(2) and "must be readable" in finding.text
    assert len(found.records) == CASES - 1


def test_a_label_beside_its_image_is_an_error(folder: Path) -> None:
    save(folder / "labels" / "2.nii", body(2)[1], (3.0, 3.0, 5.0))
    finding = only(laws.usable_files(cohort(folder)))
    assert finding.files == images(2) and "lie where its image lies" in finding.text
    assert finding.remedy.startswith("Resample it, or copy the image's affine")


@pytest.mark.parametrize(("to", "level"), [(1, "warning"), (9, "error")])
def test_the_same_voxels_twice_are_worse_in_two_lists(folder: Path, to: int, level: str) -> None:
    save(folder / "images" / f"{to}.nii", body(0)[0].astype(np.float64))  # other bytes
    found = cohort(folder)
    finding = only(laws.no_copies(found))
    assert finding.level == level and finding.files == images(0, to)
    assert laws.no_near_copies(found) == []


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_near_copy_is_found(folder: Path, mirrored: bool) -> None:
    noise = np.random.default_rng(0).normal(0, 10, SHAPE)
    array = (body(4)[0] + noise).astype(np.float32)
    save(folder / "images" / "9.nii", array[::-1].copy() if mirrored else array)
    finding = only(laws.no_near_copies(cohort(folder)))
    assert finding.level == "error" and finding.files == images(4, 9)
    assert ("when one is mirrored" in finding.text) is mirrored


def test_a_copy_with_a_hot_voxel_is_found(folder: Path) -> None:
    array = body(4)[0]
    array[13, 14, 12] = 1e6
    save(folder / "images" / "9.nii", array)
    assert only(laws.no_near_copies(cohort(folder))).files == images(4, 9)


def test_a_volume_is_no_copy_of_itself() -> None:
    grid = np.random.default_rng(0).random((2, 24, 24, 24))
    assert list(near_pairs(grid)) == []
    assert [pair[:2] for pair in near_pairs([*grid, grid[0]])] == [(0, 2)]


def test_a_patients_own_scans_may_be_alike(folder: Path) -> None:
    save(folder / "images" / "5.nii", body(4)[0] * 1.01)
    about = json.loads((folder / "dataset.json").read_text())
    about["training"][5]["patient"] = "p4"
    (folder / "dataset.json").write_text(json.dumps(about))
    (folder / "split.json").write_text(json.dumps({"test": ["p8"]}))
    assert laws.no_near_copies(cohort(folder)) == []


@pytest.mark.parametrize(("value", "shown"), [(7, "7"), (0.5, "0.5"), (-1, "-1")])
def test_a_value_without_a_name_is_an_error(folder: Path, value: float, shown: str) -> None:
    label = body(6)[1].astype(np.float32)
    label[0, 0, 0] = value
    save(folder / "labels" / "6.nii", label)
    finding = only(laws.named_values(cohort(folder)))
    assert finding.level == "error" and finding.files == images(6)
    assert finding.text == f"label value {shown} is not one of 0 to 2"


def test_names_may_be_given(folder: Path) -> None:
    found = read_cohort(folder / "dataset.json", names=["background", "kidney"])
    assert only(laws.named_values(found)).files == images(*range(CASES))


def test_a_class_that_no_label_has_is_an_error(folder: Path) -> None:
    found = cohort(folder)._replace(names=[*NAMES, "spleen"])
    finding = only(laws.filled_classes(found))
    assert finding.level == "error" and finding.text == "no label has the class spleen"


def test_an_empty_label_and_a_forgotten_class_are_told_apart(folder: Path) -> None:
    change(folder / "labels" / "1.nii", np.zeros_like)
    for i in range(CASES, 2 * CASES):
        save(folder / "labels" / f"{i}.nii", body(i)[1])
        save(folder / "images" / f"{i}.nii", body(i)[0])
    change(folder / "labels" / "12.nii", lambda label: label * (label == 1))
    about = json.loads((folder / "dataset.json").read_text())
    about["training"] += [
        {"image": f"images/{i}.nii", "label": f"labels/{i}.nii"} for i in range(CASES, 2 * CASES)
    ]
    (folder / "dataset.json").write_text(json.dumps(about))
    empty, forgotten = laws.filled_classes(cohort(folder))
    assert empty.files == images(1) and empty.text == "the label is empty"
    assert forgotten.files == images(12) and forgotten.text.startswith("kidney_right is missing")


def test_swapped_labels_are_an_error(folder: Path) -> None:
    change(folder / "labels" / "3.nii", lambda label: (3 - label) * (label > 0))
    left, right = laws.sides(cohort(folder))
    assert left.files == right.files == images(3) and left.level == "error"
    assert left.text == "kidney_left lies on the right, in 9 others on the left"


def test_a_class_on_one_side_without_a_pair_is_a_note(folder: Path) -> None:
    found = cohort(folder)._replace(names=["background", "spleen", "liver"])
    assert {finding.level for finding in laws.sides(found)} == {"note"}
    assert [finding.text.split(" in ")[0] for finding in laws.sides(found)] == [
        "spleen lies on the left",
        "liver lies on the right",
    ]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_volume_is_suspect(folder: Path, axis: int) -> None:
    change(folder / "images" / "7.nii", lambda image: np.flip(image, axis))
    finding = only(laws.orientation(cohort(folder)))
    assert finding.level == "warning" and finding.files == images(7)
    assert finding.text.endswith(f"with {' and '.join(laws.SIDES[axis])} exchanged")


def test_a_header_that_says_so_is_no_mirror(folder: Path) -> None:
    image = np.flip(body(7)[0], 0).copy()
    nib.save(nib.Nifti1Image(image, np.diag([-3.0, 3, 4, 1])), folder / "images" / "7.nii")
    change(folder / "labels" / "7.nii", lambda label: label[::-1])
    label = nib.load(folder / "labels" / "7.nii")
    nib.save(nib.Nifti1Image(label.get_fdata(), np.diag([-3.0, 3, 4, 1])), label.get_filename())
    assert findings(cohort(folder)) == []


def test_a_symmetric_cohort_tells_nothing(folder: Path) -> None:
    for i in range(CASES):
        change(folder / "images" / f"{i}.nii", lambda image: np.maximum(image, image[::-1]))
    random = np.random.default_rng(0)
    change(folder / "images" / "7.nii", lambda x: x + random.normal(0, 5, SHAPE).astype("f4"))
    assert laws.orientation(cohort(folder)) == []


def test_an_odd_spacing_is_a_warning(folder: Path) -> None:
    for kind, array in zip(("images", "labels"), body(5), strict=True):
        save(folder / kind / "5.nii", array, (3.0, 3.0, 8.0))
    finding = only(laws.spacings(cohort(folder)))
    assert finding.files == images(5) and "3.00 x 3.00 x 8.00 mm, usually 3.00" in finding.text


@pytest.mark.parametrize(
    ("edit", "level", "text"),
    [
        (lambda x: x + 1024, "error", "offset by 1024"),
        (lambda x: x - 1024, "error", "no soft tissue"),
        (lambda x: (x + 1000) / 2000, "error", "scaled to a range"),
        (lambda x: x.clip(-100), "note", "no air"),
    ],
    ids=["plus 1024", "minus 1024", "scaled", "without air"],
)
def test_hu_that_are_no_hu(folder: Path, edit: Callable, level: str, text: str) -> None:
    change(folder / "images" / "2.nii", edit)
    finding = only(laws.hounsfield(cohort(folder)))
    assert finding.level == level and finding.files == images(2) and text in finding.text


def test_mr_that_looks_like_ct_is_a_warning(folder: Path) -> None:
    about = json.loads((folder / "dataset.json").read_text())
    about["modality"] = {"0": "MRI"}
    (folder / "dataset.json").write_text(json.dumps(about))
    finding = only(laws.hounsfield(cohort(folder)))
    assert finding.text == "MR has intensities like CT in HU" and len(finding.files) == CASES


def test_mixed_modalities(folder: Path) -> None:
    change(folder / "images" / "2.nii", lambda x: (x + 1000).clip(0))
    about = json.loads((folder / "dataset.json").read_text())
    del about["modality"]
    (folder / "dataset.json").write_text(json.dumps(about))
    unlike = only(laws.modalities(cohort(folder)))
    assert unlike.level == "warning" and unlike.files == images(2)
    about["training"][2]["modality"] = "MR"
    (folder / "dataset.json").write_text(json.dumps(about))
    several = only(laws.modalities(cohort(folder)))
    assert several.level == "note" and several.text == "several modalities: 9 CT, 1 MR"


def test_text_in_a_corner_is_found_and_a_line_is_not(folder: Path) -> None:
    def write(image: np.ndarray) -> np.ndarray:
        image[:6, :7] = (np.indices((6, 7)).sum(0) % 2 * 2000)[..., None]  # strokes of a pixel
        return image

    def line(image: np.ndarray) -> np.ndarray:
        image[1, :] = 2000
        return image

    change(folder / "images" / "4.nii", write)
    change(folder / "images" / "5.nii", line)
    finding = only(laws.burnt_in_text(cohort(folder)))
    assert finding.files == images(4) and finding.text.startswith("possible")


def test_three_voxels_are_too_few_for_text() -> None:
    volume = np.zeros((32, 3, 32))
    volume[:, :, :8] = np.indices((3, 8)).sum(0) % 2
    assert text_strokes(volume) == 0


@pytest.mark.parametrize(
    ("nose", "left", "face"), [(True, 0, True), (False, 0, False), (True, 8, False)]
)
def test_a_whole_head_with_a_nose_has_a_face(
    tmp_path: Path, nose: bool, left: int, face: bool
) -> None:
    x, y, z = np.indices((50, 60, 50)) * 4.0
    head = ((x - 100) / 75) ** 2 + ((y - 115) / 95) ** 2 < 1
    if nose:
        head |= (abs(x - 100) < 15) & (abs(z - 80) < 15) & (y > 115) & (y < 230)
    image = np.where(head & (z < 180), 40.0, -1000.0).astype(np.float32)
    save(tmp_path / "a.nii", image[left:], (4.0, 4.0, 4.0))
    assert bool(laws.faces(read_cohort(tmp_path))) is face


def test_findings_are_sorted_by_level(folder: Path) -> None:
    change(folder / "images" / "2.nii", lambda x: x.clip(-100))
    change(folder / "labels" / "3.nii", lambda label: (3 - label) * (label > 0))
    levels = [finding.level for finding in findings(cohort(folder))]
    assert levels == sorted(levels, key=laws.LEVELS.index) and len(set(levels)) > 1


def test_a_label_with_nan_is_named_and_every_fault_has_its_text(folder: Path) -> None:
    change(folder / "labels/0.nii", lambda label: np.where(label == 1, np.nan, label))
    change(folder / "labels/1.nii", lambda label: label.astype(np.float32))
    found = cohort(folder)
    (named,) = laws.named_values(found)
    assert "label value nan is not one of" in named.text and named.files == ["images/0.nii"]
    assert not laws.usable_files(found)
    (fault,) = laws.usable_files(found._replace(faults={"x.nii": "no semicolon"}))
    assert (fault.text, fault.remedy) == ("no semicolon", "Repair it, or leave it out.")
