from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from page_reader import Page
from PIL import Image

from med3dinsight_ext.data.cohort import read_cohort
from med3dinsight_ext.data.laws import Finding
from med3dinsight_ext.reports.data_page import LISTED, SHOWN, thumbnail, write_data_page


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for i in range(LISTED + 2):
        array = random.normal(0, 100, (6, 5, 4)).astype(np.float32)
        array[0, 0] = -1000
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{i:02d} <b>.nii")
    cohort = read_cohort(folder)
    names = [record.name for record in cohort.records]
    found = [
        Finding("error", "usable files", "cannot be read", ["gone.nii"], "Repair it."),
        Finding("warning", "faces", "possible face", names, "Deface."),
    ]
    write_data_page(folder / "page.html", cohort, found, title="Data <i>")
    return Page(folder / "page.html")


def test_findings_are_named_with_level_files_and_remedy(page: Page) -> None:
    assert page.text["h1"] == ["Data <i>"] and not {"b", "i"} & set(page.names)
    assert [text for text in page.text["span"] if text in ("error", "warning")] == [
        "error",
        "warning",
    ]
    assert {"cannot be read ", "Repair it.", "Deface."} <= set(page.text["p"])
    assert "1 error, 1 warning, 0 notes" in page.text["td"]
    assert any(text.endswith("and 2 more") for text in page.text["small"])


def test_thumbnails_of_findings_and_of_a_sample_are_on_the_page(page: Page) -> None:
    images = page.having("img", "src")
    assert len(images) == SHOWN + 12
    assert all(str(image).startswith("data:image/jpeg;base64,") for image in images)
    assert page.links == images


def test_a_page_without_volumes_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(b"no volume")
    write_data_page(tmp_path / "page.html", read_cohort(tmp_path), [])
    assert "No law is broken." in Page(tmp_path / "page.html").text["p"]


def test_a_label_is_drawn_in_the_colours_of_its_classes(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(0, 1, (8, 8, 8)).astype(np.float32)
    label = np.zeros((8, 8, 8), np.uint8)
    label[2:6, 2:6, 2:6] = 2
    for name, volume in (("a.nii", array), ("a_seg.nii", label)):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / name)
    rows = [{"image": "a.nii", "label": "a_seg.nii"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    cohort = read_cohort(tmp_path / "list.json", names=["background", "liver", "spleen"])
    plain = thumbnail(cohort.records[0]._replace(labels=None), "MR")
    drawn = thumbnail(cohort.records[0], "MR")
    colors = [pixels(uri).reshape(-1, 3).astype(int) for uri in (plain, drawn)]
    assert abs(colors[0] - colors[0][:, :1]).max() < 8
    assert (colors[1][:, 0] - colors[1][:, 2]).max() > 80  # orange, the second class
    assert (colors[1][:, 2] - colors[1][:, 0]).max() < 40  # and no blue, the first
