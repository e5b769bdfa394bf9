"""A split by hashing keeps patients and copies together, whatever is added later."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import fakes
import pytest
from ray_store import build
from volume_writers import write_dicom

from med3dinsight_ext.cli import main
from med3dinsight_ext.data import manifests
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.layouts import read_dataset
from med3dinsight_ext.data.patients import joined
from med3dinsight_ext.data.splits import hold_out
from med3dinsight_ext.io.files import HashMemo


def volumes(folder: Path, count: int, first: int = 0) -> list[dict]:
    folder.mkdir(exist_ok=True)
    return [fakes.volume(folder / f"v{i}.nii.gz", i) for i in range(first, first + count)]


def split(source: Path, out: Path, **options: Any) -> tuple[list[dict], list[dict], dict]:
    manifests.split(str(source), str(out), **options)
    ending = source.suffix if source.suffix == ".parquet" else ".jsonl"
    development, test = (datalist(out / f"{name}{ending}") for name in manifests.LISTS)
    return development, test, json.loads((out / "split_report.json").read_text())


def listed(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def names(items: list[dict]) -> set[str]:
    return {Path(item["image"]).name for item in items}


def test_new_volumes_move_no_other_and_patients_stay_together(tmp_path: Path) -> None:
    items = [i | {"patient": f"P{k // 2}"} for k, i in enumerate(volumes(tmp_path / "in", 40))]
    few = split(listed(tmp_path / "few.jsonl", items[:30]), tmp_path / "few")
    all_ = split(listed(tmp_path / "all.jsonl", items), tmp_path / "all")
    for before, after in zip(few[:2], all_[:2], strict=True):
        assert before and names(before) <= names(after)
    development, test, report = all_
    people = [{item["patient"] for item in part} for part in (development, test)]
    assert not people[0] & people[1] and len(people[0] | people[1]) == 20
    assert report["lists"]["test"] == {"volumes": len(test), "patients": len(people[1])}
    assert 0 < len(people[1]) < 10
    other = split(tmp_path / "all.jsonl", tmp_path / "other", seed=1)
    assert names(other[1]) != names(test)


def test_copies_join_patients_and_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [i | {"patient": f"P{k}"} for k, i in enumerate(volumes(tmp_path / "in", 20))]
    alone = split(listed(tmp_path / "alone.jsonl", items), tmp_path / "alone", test_share=0.5)
    one, other = (part[0] for part in alone[:2])  # in different lists
    copy = shutil.copy(other["image"], tmp_path / "in" / "copy.nii.gz")
    again = [*items, {**one, "image": str(copy)}]
    found = split(listed(tmp_path / "joined.jsonl", again), tmp_path / "joined", test_share=0.5)
    where = [{"copy.nii.gz", *(Path(i["image"]).name for i in (one, other))} & names(part)
             for part in found[:2]]  # fmt: skip
    assert sorted(map(len, where)) == [0, 3]
    assert found[2]["copies"] == [[other["image"], str(copy)]]
    assert found[2]["joined_patients"] == [sorted((one["patient"], other["patient"]))]
    assert "1 copies of others; 1 patients under several names" in capsys.readouterr().out
    train, held = hold_out(found[0] + found[1], 0.5)  # of one patient now
    assert sorted(len({"copy.nii.gz", Path(other["image"]).name} & names(x))
                  for x in (train, held)) == [0, 2]  # fmt: skip


def test_hashes_of_a_store_are_used_and_no_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = volumes(tmp_path / "in", 8)
    build(tmp_path / "store").fill(items)
    monkeypatch.setattr("med3dinsight_ext.io.files.sha256", None)
    development, test, report = split(
        tmp_path / "in", tmp_path / "out", test_share=0.5, hashes=str(tmp_path / "store")
    )
    assert len(development) + len(test) == 8 == report["without_patient"]


def test_a_volume_without_a_patient_keeps_its_list_when_it_is_moved(tmp_path: Path) -> None:
    volumes(tmp_path / "in", 12)
    before = split(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    after = split(tmp_path / "elsewhere", tmp_path / "again")
    assert [names(part) for part in before[:2]] == [names(part) for part in after[:2]]


def test_the_patient_of_a_series_is_its_patient_id(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    for k, patient in enumerate(("A", "A", "B", "", "C")):
        write_dicom(tmp_path / f"s{k}", uid=f"1.2.{k}", intercept=float(k))
        for path in (tmp_path / f"s{k}").iterdir():
            image = pydicom.dcmread(path)
            image.PatientID = patient
            image.save_as(path)
    items = datalist(tmp_path)
    assert [item.get("patient") for item in items] == ["A", "A", "B", None, "C"]
    given = listed(tmp_path / "l.jsonl", [{"image": "s0", "patient": "Z"}, {"image": "s1"}])
    assert [item["patient"] for item in datalist(given)] == ["Z", "A"]
    given.unlink()
    assert [item["patient"] for item in read_dataset(tmp_path).items] == ["A", "A", "B", "s3", "C"]
    train, held = hold_out(items, 0.5)
    assert not {i.get("patient") for i in train} & {i.get("patient") for i in held}


def test_a_series_that_cannot_be_read_has_no_patient(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.dcm").write_bytes(b"no DICOM")
    assert datalist(tmp_path) == [{"image": str(tmp_path / "s"), "modality": "auto"}]


def test_unreadable_files_are_listed_and_in_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes(tmp_path / "in", 10)
    read = HashMemo.__call__

    def failing(memo: HashMemo, file: str) -> str:
        if file.endswith("v3.nii.gz"):
            raise OSError(5, "Input/output error")
        return read(memo, file)

    monkeypatch.setattr(HashMemo, "__call__", failing)
    development, test, report = split(tmp_path / "in", tmp_path / "out")
    assert len(names(development) | names(test)) == 9
    assert report["unreadable"] == {
        str(tmp_path / "in" / "v3.nii.gz"): "[Errno 5] Input/output error"
    }


def test_one_patient_for_most_volumes_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [{**item, "patient": "ANON"} for item in volumes(tmp_path / "in", 10)]
    items += volumes(tmp_path / "in", 6, first=10)
    split(listed(tmp_path / "list.jsonl", items), tmp_path / "out", test_share=0.5)
    assert "10 of 16 volumes have the patient 'ANON': no real one?" in caplog.text


def test_an_empty_list_and_a_wrong_share_are_errors(tmp_path: Path) -> None:
    items = [{**item, "patient": "A"} for item in volumes(tmp_path / "in", 2)]
    source = listed(tmp_path / "list.jsonl", items)
    with pytest.raises(ValueError, match="both lists must have patients, got none for .* of 1"):
        split(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"test_share must be in \(0, 1\), got 1"):
        split(source, tmp_path / "out", test_share=1)


def test_parquet_in_is_parquet_out(tmp_path: Path) -> None:
    parquet, pyarrow = (pytest.importorskip(n) for n in ("pyarrow.parquet", "pyarrow"))
    items = [i | {"patient": k, "label": k % 2} for k, i in enumerate(volumes(tmp_path / "in", 9))]
    del items[3]["patient"]
    parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "list.parquet")
    assert datalist(tmp_path / "list.parquet") == items
    development, test, _ = split(tmp_path / "list.parquet", tmp_path / "out")
    assert {i["label"] for i in development + test} == {0, 1} and len(development + test) == 9
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="bad.parquet"):
        datalist(tmp_path / "bad.parquet")


def test_without_pyarrow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="a.parquet must be read and written by pyarrow, got none"):
        datalist(tmp_path / "a.parquet")


def test_patients_are_joined_through_others() -> None:
    assert joined(list("dcba"), ["1", "2", "2", None]) == ["d", "b", "b", "a"]
    chain = joined(["c", "b", "b", "a", "e"], ["1", "1", "2", "2", None])
    assert chain == ["a", "a", "a", "a", "e"]


def test_copies_of_different_patients_are_held_out_together(
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = [{"image": f"{i}.nii", "targets": str(i % 10)} for i in range(20)]
    with caplog.at_level(logging.INFO):
        parts = hold_out(items, 0.3)
    assert not {i["targets"] for i in parts[0]} & {i["targets"] for i in parts[1]}
    assert "10 of 20 volumes are copies of others; they stay in one part" in caplog.text


def test_the_command_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volumes(tmp_path / "in", 12)
    main(["split", str(tmp_path / "in"), str(tmp_path / "out"), "--test_share", "0.3"])
    assert capsys.readouterr().out.startswith("12 volumes: development ")


def test_a_folders_labels_are_listed_and_do_not_move_a_volume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [fakes.volume(tmp_path / f"v{i}.nii.gz", i) for i in range(12)]
    (tmp_path / "in").mkdir()
    for item in items:
        shutil.move(item["image"], tmp_path / "in")
    plain = split(tmp_path / "in", tmp_path / "plain")
    shutil.copy(tmp_path / "in" / "v1.nii.gz", tmp_path / "in" / "v0_seg.nii.gz")
    monkeypatch.chdir(tmp_path / "in")
    labelled = split(Path("../in"), tmp_path / "labelled")
    assert [names(part) for part in labelled[:2]] == [names(part) for part in plain[:2]]
    found = {Path(i["image"]).name for part in labelled[:2] for i in part if i.get("label")}
    assert found == {"v0.nii.gz"}
    shutil.move("v0_seg.nii.gz", "other_seg.nii.gz")
    split(tmp_path / "in", tmp_path / "mismatched")
    assert "the lists have no labels: labels must belong to the images" in caplog.text


def test_sessions_of_a_subject_stay_together(tmp_path: Path) -> None:
    for n in range(12):
        folder = tmp_path / f"bids/sub-{n:02}"
        for session in ("ses-1", "ses-2"):
            (folder / session / "anat").mkdir(parents=True)
            fakes.volume(folder / session / "anat/T1w.nii.gz", 2 * n + (session == "ses-2"))
    development, test, report = split(tmp_path / "bids", tmp_path / "out", test_share=0.4)
    subjects = [{item["patient"] for item in part} for part in (development, test)]
    assert subjects[0].isdisjoint(subjects[1]) and len(subjects[0] | subjects[1]) == 12
    assert report["without_patient"] == 0


def test_the_modality_of_a_folder_is_listed_and_its_class_names_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in" / "imagesTr").mkdir(parents=True)
    for n in range(12):
        fakes.volume(tmp_path / "in" / "imagesTr" / f"v{n}_0000.nii.gz", n)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "tumour": 1}}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(about))
    development, test, _ = split(tmp_path / "in", tmp_path / "out", test_share=0.4)
    assert {item["modality"] for item in development + test} == {"CT"}
    assert "give --label_names \"['background', 'tumour']\"" in caplog.text
