"""Values of a label by the names of its segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from med3dinsight_ext.monailabel.app.segments import class_value, described, renumber

NAMES = ["background", "Liver", "spleen"]


def label(folder: Path, *values: float) -> Path:
    path = folder / "label.nii.gz"
    array = np.array(values, np.float32).reshape(1, 1, -1)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2, 3, 1])), path)
    return path


def segments(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "idx": n + 7} for n, name in enumerate(names)]


def test_values_follow_the_names_in_the_order_of_the_list(tmp_path: Path) -> None:
    path, out = label(tmp_path, 0, 1, 2, 3, 3), tmp_path / "out.nii.gz"
    assert renumber(path, segments("spleen", "background", "liver"), NAMES, out)
    found = nib.load(out)
    assert np.asarray(found.dataobj).ravel().tolist() == [0, 2, 0, 1, 1]
    assert np.array_equal(found.affine, nib.load(path).affine)


@pytest.mark.parametrize("given", [{"name": "spleen"}, [{"label": "spleen"}], "spleen", [1]])
def test_without_names_the_values_are_those_of_the_classes(given: Any, tmp_path: Path) -> None:
    assert not renumber(label(tmp_path, 0, 1), given, NAMES, tmp_path / "out.nii.gz")
    assert described([{"name": "Liver"}], given) == [{"name": "Liver"}]


def test_colours_go_with_the_names() -> None:
    given = [{"name": "spleen", "color": [1, 2, 3]}, {"name": "LIVER", "segmentAttribute": {}}]
    found = described([{"name": "Liver"}, {"name": "spleen"}], given)
    assert found == [{"name": "Liver"}, {"name": "spleen", "color": [1, 2, 3]}]


def test_a_label_with_the_values_of_its_classes_is_not_written(tmp_path: Path) -> None:
    path, out = label(tmp_path, 0, 1, 2), tmp_path / "out.nii.gz"
    assert not renumber(path, segments("LIVER", "Spleen", "mine"), NAMES, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ((0, 1), segments("kidney"), "segments must be classes of the model .*, got 'kidney'; ren"),
        ((0, 2), segments("liver"), "label_info must name every value .* got 1 names and the val"),
        ((0, 0.5), segments("liver"), "got 1 names and the value 0.5"),
        ((0, 1), ["kidney"], "segments must be classes of the model .*, got 'kidney'; ren"),
    ],
)
def test_what_has_no_class_is_refused(
    values: tuple[float, ...], given: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        renumber(label(tmp_path, *values), given, NAMES, tmp_path / "out.nii.gz")


def test_a_file_that_is_no_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(b"no label")
    with pytest.raises(ValueError, match="label must be readable, got .*x.nii.gz"):
        renumber(tmp_path / "x.nii.gz", segments("liver"), NAMES, tmp_path / "out.nii.gz")


def test_a_class_is_found_by_its_name_whatever_its_capitals() -> None:
    assert [class_value(name, NAMES) for name in (" liver", "SPLEEN", "x", None)] == [
        1,
        2,
        None,
        None,
    ]


def test_more_than_256_classes_keep_their_values(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(301)]
    assert renumber(label(tmp_path, 0, 1), segments("c300"), names, tmp_path / "out.nii.gz")
    assert np.unique(nib.load(tmp_path / "out.nii.gz").dataobj).tolist() == [0, 300]
