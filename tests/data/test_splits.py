from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_writers import decathlon, nifti
from real_data import real_data

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.splits import hold_out, partition, take


def split(folder: Path, **lists: object) -> Path:
    (folder / "split.json").write_text(json.dumps(lists))
    return folder / "split.json"


def test_a_split_matches_file_names(tmp_path: Path) -> None:
    source, file = decathlon(tmp_path), split(tmp_path, seed=7, development=["a", "c"], test=["b"])
    assert [i["image"][-8] for i in datalist(source, split=file, subset="development")] == [
        "a",
        "c",
    ]


def test_a_split_matches_folders(tmp_path: Path) -> None:
    paths = [nifti(tmp_path / f"{p}/{kind}.nii") for p in ("p1", "p2") for kind in ("CT", "PET")]
    file = split(tmp_path, development=["p1"], test=["p2"])
    assert [i["image"] for i in datalist(tmp_path, split=file, subset="test")] == paths[2:]


def test_the_id_of_a_split_is_the_patient_of_its_images(tmp_path: Path) -> None:
    for name in ("p1/CT", "p1/PT", "p2/CT"):
        nifti(tmp_path / f"{name}.nii.gz")
    file = split(tmp_path, development=["p1", "p2"])
    items = datalist(tmp_path, split=file, subset="development")
    assert [item["patient"] for item in items] == ["p1", "p1", "p2"]
    assert [len(part) for part in hold_out(items, 0.5)] in ([2, 1], [1, 2])


def test_a_split_matches_patients(tmp_path: Path) -> None:
    rows = [{"image": nifti(tmp_path / f"{i}.nii"), "patient": f"p{i // 2}"} for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    file = split(tmp_path, development=["p0"], test=["p1"])
    items = datalist(tmp_path / "list.json", split=file, subset="test")
    assert [item["patient"] for item in items] == ["p1", "p1"]


def test_folders_above_the_root_do_not_match(tmp_path: Path) -> None:
    nifti(tmp_path / "test" / "a.nii")
    with pytest.raises(ValueError, match=r"split must name ids of the source, got \['test'\]"):
        datalist(tmp_path / "test", split=split(tmp_path, test=["test"]), subset="test")


@pytest.mark.parametrize(
    ("lists", "subset", "message"),
    [
        ({"development": ["a", "x", "y"]}, "development", r"got \['x', 'y'\] of .*split.json"),
        ({"development": ["a"]}, "train", r"subset must be one of \['development'\].*'train'"),
        ({"development": ["a"]}, None, r"subset must be one of \['development'\].*None"),
        ({"development": ["a"], "test": ["a"]}, "test", r"name each id once, got \['a'\]"),
        ({"development": ["a", "b", "c"], "test": ["imagesTr"]}, "test", "keep an image in one"),
    ],
)
def test_a_faulty_split_is_refused(
    tmp_path: Path, lists: dict, subset: str | None, message: str
) -> None:
    source = decathlon(tmp_path)
    with pytest.raises(ValueError, match=message):
        datalist(source, split=split(tmp_path, **lists), subset=subset)


def test_real_splits_keep_patients_apart() -> None:
    folder = real_data("sarcoma")
    subsets = [
        datalist(folder / "index.json", split=folder / "split.json", subset=name)
        for name in ("development", "test")
    ]
    patients = [{item["patient"] for item in items} for items in subsets]
    assert [len(p) for p in patients] == [29, 12] and not patients[0] & patients[1]
    assert len(datalist(folder)) == sum(map(len, subsets)) == 123


def test_a_patients_images_are_held_out_together() -> None:
    items = [{"image": f"{p}/{m}", "patient": p} for p in "abcde" for m in ("CT", "MR")]
    train, held = hold_out(items, 0.4, seed=1)
    assert {i["patient"] for i in train}.isdisjoint(i["patient"] for i in held)
    assert (len(train), len(held)) == (6, 4)
    assert hold_out(items, 0.4, seed=1) == (train, held) != hold_out(items, 0.4, seed=2)
    assert hold_out(items, 0) == (items, [])
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\), got 1"):
        hold_out(items, 1)


def test_classes_keep_their_shares_when_cases_are_held_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = [{"image": f"{i}.nii", "label": int(i < 3)} for i in range(20)]
    for seed in range(20):
        train, held = hold_out(items, 0.2, seed)
        assert sorted(i["label"] for i in held) == [0, 0, 0, 1]
        assert {i["label"] for i in train} == {0, 1}
    rare = [*items, {"image": "rare.nii", "label": 2}]
    assert all(rare[-1] in hold_out(rare, 0.4, seed)[0] for seed in range(20))
    one_each = [{"image": f"{i}.nii", "label": i} for i in range(3)]
    assert hold_out(one_each, 0.5) == (one_each, [])
    assert "nothing is held out: each class has one patient" in caplog.text


def test_one_patient_is_not_split_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    items = [{"image": f"{i}.nii", "patient": "ANON"} for i in range(12)]
    assert hold_out(items, 0.2) == (items, [])
    assert "all 12 items are of one patient, ANON; write the patient of each" in caplog.text


def test_few_cases_hold_every_class_in_its_share() -> None:
    items = [{"image": f"{i}.nii.gz", "label": int(i % 5 == 0)} for i in range(200)]
    for seed in range(20):
        counts = [sum(i["label"] for i in take(items, n, seed)) for n in (2, 10, 50)]
        assert counts == [1, 2, 10]


def test_fewer_cases_are_a_subset_of_more() -> None:
    items = [{"image": str(i)} for i in range(20)]
    few, more = take(items, 3), take(items, 9)
    assert len(few) == 3 and all(item in more for item in few)
    assert more == [item for item in items if item in more]  # in their order
    assert take(items, None) == items == take(items, 99)
    assert take(items, 3, seed=1) != few
    with pytest.raises(ValueError, match="max_cases must be at least 1, got 0"):
        take(items, 0)
    assert hold_out(items, 0.2)[0] != items


@pytest.mark.parametrize(
    ("cases", "val_fraction", "max_cases", "train", "val"),
    [
        (9, None, None, 9, 0),
        (10, None, None, 8, 2),
        (40, None, 9, 9, 0),
        (40, None, 10, 8, 2),
        (40, None, 99, 32, 8),
        (40, 0.2, 5, 4, 1),
        (4, 0.25, None, 3, 1),
        (40, 0.0, 20, 20, 0),
        (40, 0.5, 2, 1, 1),
        (40, 0.5, 1, 1, 0),
    ],
)
def test_max_cases_counts_training_and_validation(
    cases: int, val_fraction: float | None, max_cases: int | None, train: int, val: int
) -> None:
    items = [{"image": str(i)} for i in range(cases)]
    parts = partition(items, val_fraction, max_cases)
    assert [len(part) for part in parts] == [train, val]


def test_one_class_is_not_held_out_alone(caplog: pytest.LogCaptureFixture) -> None:
    rare = [{"image": f"{i}.nii", "label": int(i == 11)} for i in range(12)]
    for count in (None, 11):
        train, val = partition(rare, None, count)
        assert not val and len(train) == (count or 12)
        assert {item["label"] for item in train} == {0, 1}
    assert "nothing is held out: validation would see class 0 alone" in caplog.text
    even = [{"image": f"{i}.nii", "label": i % 2} for i in range(12)]
    with pytest.raises(ValueError, match=r"hold out cases of two classes, got 0.05, .* out 1 of"):
        partition(even, 0.05, None)
    assert {item["label"] for item in partition(even, None, None)[1]} == {0, 1}


def test_max_cases_of_all_cases_changes_nothing() -> None:
    items = [{"image": str(i), "patient": str(i // 4)} for i in range(12)]
    assert partition(items, None, 12) == partition(items, None, None)
    assert [len(part) for part in partition(items, None, 12)] == [8, 4]


def test_images_of_one_patient_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    same = [{"image": str(i), "patient": "P1"} for i in range(2)]
    assert hold_out(same[:1], 0.5) == (same[:1], []) and not caplog.text
    assert hold_out(same, 0.0) == (same, []) and not caplog.text
    apart = [item | {"patient": item["image"]} for item in same]
    assert [len(part) for part in hold_out(apart, 0.5)] == [1, 1] and not caplog.text
    assert hold_out(same, 0.5) == (same, [])
    assert "nothing is held out: all 2 items are of one patient, P1" in caplog.text


def test_what_is_held_out_of_all_cases_never_trains() -> None:
    items = [{"image": str(i)} for i in range(40)]
    held = partition(items, None, None)[1]
    for count in (3, 12, 30):
        train, val = partition(items, None, count)
        assert not any(item in held for item in train) and all(item in held for item in val)


@pytest.mark.parametrize("lists", [{"test": ["a" * 10**5]}, {"a" * 10**5: []}], ids=["id", "list"])
def test_long_ids_do_not_hide_the_file(tmp_path: Path, lists: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"split\.json") as caught:
        datalist(decathlon(tmp_path), split=split(tmp_path, **lists), subset="test")
    assert len(str(caught.value)) < 500


def test_a_patient_in_two_lists_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        nifti(tmp_path / f"{name}.nii.gz")
    rows = [{"image": f"{name}.nii.gz", "patient": "P" if name < "c" else "Q"} for name in "abc"]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    file = split(tmp_path, development=["a", "c"], test=["b"])
    datalist(tmp_path / "list.json", split=file, subset="test")
    assert "1 patients are in two lists" in caplog.text and "'P'" in caplog.text
    caplog.clear()
    file = split(tmp_path, development=["a", "b"], test=["c"])
    datalist(tmp_path / "list.json", split=file, subset="test")
    assert not caplog.text
