from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from page_reader import Page

from med3dinsight_ext.reports import predictions


def test_the_page_has_the_volumes_of_the_classes_and_pictures_of_the_first_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "SHOWN", 1)
    files, affine = {}, np.diag([-2.0, 1.0, 3.0, 1.0])  # stored from right to left
    for i in range(2):
        image, label = tmp_path / f"v{i}.nii.gz", tmp_path / f"v{i}_seg.nii.gz"
        array = np.random.default_rng(i).random((10, 12, 14), dtype=np.float32)
        marked = np.zeros(array.shape, np.uint8)
        marked[:5, :10, :4] = 1 + i
        nib.save(nib.Nifti1Image(array, affine), image)
        nib.save(nib.Nifti1Image(marked, affine), label)
        files[str(image)] = label
    page = tmp_path / "predictions.html"
    predictions.write_predictions(page, files, ["background", "liver <left>", "spleen"])
    assert not Page(page).open
    text = page.read_text("utf-8")
    assert "liver &lt;left&gt;" in text and "The first of 2 cases." in text
    assert text.count("<svg") == 1 and "Prediction on v0.nii.gz: liver" in text
    rows = [
        line
        for line in text.splitlines()
        if "v" in line and ".nii.gz" in line and line.startswith("<tr>")
    ]
    ml = 5 * 10 * 4 * 2 * 1 * 3 / 1000
    assert f"<td>{ml:.1f}</td><td>0</td>" in rows[0]
    assert f"<td>0</td><td>{ml:.1f}</td>" in rows[1]
