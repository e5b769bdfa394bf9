"""Whose a volume is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from volume_writers import write_dicom

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.patients import name_series, patients_of, place
from med3dinsight_ext.io.dicom import series_header


def test_a_patient_keeps_its_place_in_every_version() -> None:
    found = [place("P1"), place("P2"), place("ä"), place("P1", seed=1)]
    # SHA-256 of "0 P1", "0 P2", "0 ä" and "1 P1", as a share of 2 to the power of 256
    assert found == pytest.approx(
        [0.0297320994852, 0.7259021427493, 0.3915734573951, 0.8124608502634]
    )


def test_a_series_without_a_patient_has_its_patient_id(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    for name in ("named", "given", "v.nii.gz"):
        write_dicom(tmp_path / name)
        for path in (tmp_path / name).iterdir():
            image = pydicom.dcmread(path)
            image.PatientID = "P7"
            image.save_as(path)
    header = pydicom.dcmread(tmp_path / "named" / "0000.dcm")
    items = [{"image": str(tmp_path / name)} for name in ("named", "given", "v.nii.gz")]
    items[1]["patient"] = "own"
    for item, modality in zip(items, ("auto", "MR", "auto"), strict=True):
        item["modality"] = modality
    name_series(items)
    assert [item.get("patient") for item in items] == ["P7", "own", None]
    assert [item["modality"] for item in items] == ["CT", "MR", "auto"]
    assert series_header(str(tmp_path / "named")) == ("P7", "CT")
    header.Modality = "PT"
    header.save_as(tmp_path / "named" / "0000.dcm")
    assert series_header(str(tmp_path / "named"))[1] == "PET"


def test_copies_are_one_patients(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    items = [
        {"image": "a.nii", "patient": "P1", "content": "1"},
        {"image": "b.nii", "patient": "", "content": "1"},
        {"image": "c.nii", "patient": 3},
        {"image": "d.nii", "content": "2"},
        {"image": "e.nii"},
    ]
    assert patients_of(items) == ["P1", "P1", "3", "d.nii", "e.nii"]
    assert "1 of 5 volumes are copies of others" in caplog.text
    caplog.clear()
    assert patients_of(items[2:]) == ["3", "d.nii", "e.nii"] and not caplog.text


def test_blanks_around_a_patient_are_not_its_name() -> None:
    items = [{"image": f"{n}.nii", "patient": name} for n, name in enumerate(("P1", "P1 ", 0))]
    assert patients_of(items) == ["P1", "P1", "0"]


@pytest.mark.parametrize(
    ("header", "row"),
    [("image,Patient", "a.nii,P1"), ("Image,patient", "a.nii,P1"), ("image,label,label", "a,1,2")],
)
def test_columns_that_would_be_overlooked_are_named(header: str, row: str, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ValueError, match="columns must .*l.csv; rename"):
        datalist(tmp_path / "l.csv")


def test_blanks_around_a_column_are_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    (tmp_path / "l.csv").write_text("image, patient \na.nii,P1\n")
    assert datalist(tmp_path / "l.csv")[0]["patient"] == "P1"


@pytest.mark.parametrize("missing", ["NA", "n/a", "nan", "", None, float("nan")])
def test_a_missing_patient_is_no_patient(missing: Any) -> None:
    items = [{"image": f"{n}.nii", "patient": missing} for n in range(2)]
    assert patients_of(items) == ["0.nii", "1.nii"]
