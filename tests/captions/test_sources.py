from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from real_data import real_data

from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.volumes import read_volume


def image(path: Path, affine: np.ndarray | None = None) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return {"image": str(path), "modality": "MR"}


def captions(folder: Path, *rows: dict | str) -> FileCaptions:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return FileCaptions(folder / "captions.jsonl")


def row(**changes: object) -> dict:
    fields = {"image": "a.nii", "plane": "axial", "index": 1, "size": 5, "caption": "One."}
    return {k: v for k, v in (fields | changes).items() if v is not None}


def test_captioned_slices_are_required_at_their_centres(tmp_path: Path) -> None:
    item = image(tmp_path / "a.nii")
    found = captions(tmp_path, row(), row(plane=0, index=2, size=3), row(index=0)).required(item)
    assert found[0].tolist() == [0, 2, 2]
    torch.testing.assert_close(found[1], torch.tensor([2.5 / 3, 0.1, 0.3]))


def test_a_row_may_name_an_address(tmp_path: Path) -> None:
    item = {"image": "s3://bucket/a.nii", "modality": "MR"}
    file = captions(tmp_path, row(image="s3://bucket/a.nii"))
    file.check_items([item])
    assert file.caption(item, [2, 2], [0.3, 0.5]) == ["One.", None]


def test_a_caption_comes_back_for_its_slice_only(tmp_path: Path) -> None:
    item = image(tmp_path / "a.nii")
    file = captions(tmp_path, row(), row(plane="coronal", index=3, size=4, caption="Two."))
    plane, position = torch.tensor([2, 2, 1, 1, 0]), torch.tensor([0.3, 0.5, 0.875, 0.3, 0.3])
    assert file.caption(item, plane, position) == ["One.", None, "Two.", None, None]


def test_positions_within_a_slice_find_its_caption(tmp_path: Path) -> None:
    file = captions(tmp_path, row(index=4)) if image(tmp_path / "a.nii") else None
    assert file.caption({"image": str(tmp_path / "a.nii")}, [2, 2, 2], [0.79, 0.81, 1.0]) == [
        None,
        "One.",
        "One.",
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"size": None},
        {"index": None, "position": 0.3},
        {"index": None, "size": None, "position": 0.39},
        {"position": 0.3, "caption": None, "text": " One. "},
        {"plane": "2"},
    ],
)
def test_a_slice_can_be_named_in_several_ways(tmp_path: Path, fields: dict) -> None:
    item, file = image(tmp_path / "a.nii"), captions(tmp_path, row(**fields))
    plane, position = file.required(item)
    assert plane.tolist() == [2] and position.tolist() == pytest.approx([0.3])
    assert file.caption(item, plane, position) == ["One."]


def test_without_a_size_the_index_counts_in_ras(tmp_path: Path) -> None:
    # The stored axes are z, x, y; the axial extent is 3 voxels, not 5.
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    item = image(tmp_path / "a.nii", affine)
    assert captions(tmp_path, row(size=None)).required(item)[1].tolist() == [0.5]


def test_a_csv_file_is_read(tmp_path: Path) -> None:
    item = image(tmp_path / "a.nii")
    (tmp_path / "c.csv").write_text('image,plane,index,position,text\na.nii,2,1,,"One, two."\n')
    assert FileCaptions(tmp_path / "c.csv").caption(item, [2], [0.3]) == ["One, two."]


def test_a_comma_outside_quotes_cuts_no_caption(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("image,plane,index,text\na.nii,2,1,Normal, but a cyst\n")
    with pytest.raises(ValueError, match=r"c.csv line 2 must have 4 cells, got more; put texts"):
        FileCaptions(tmp_path / "c.csv")
    item = image(tmp_path / "a.nii")
    (tmp_path / "c.csv").write_text("image,plane,index,text\na.nii,2,1,Normal,,\n")
    assert FileCaptions(tmp_path / "c.csv").caption(item, [2], [0.3]) == ["Normal"]


def test_images_are_found_below_another_root(tmp_path: Path) -> None:
    item = image(tmp_path / "images" / "a.nii")
    (tmp_path / "c.jsonl").write_text(json.dumps(row()))
    file = FileCaptions(tmp_path / "c.jsonl", root=tmp_path / "images")
    assert file.caption(item, [2], [0.3]) == ["One."]


def test_an_image_without_captions_is_fine(tmp_path: Path) -> None:
    image(tmp_path / "a.nii")
    file, other = captions(tmp_path, row()), image(tmp_path / "b.nii")
    assert len(file.required(other)[0]) == 0 and file.caption(other, [2], [0.3]) == [None]


def test_captions_of_one_image_do_not_change_the_fingerprint_of_another(tmp_path: Path) -> None:
    a, b = image(tmp_path / "a.nii"), image(tmp_path / "b.nii")
    before = captions(tmp_path, row())
    after = captions(tmp_path, row(image="b.nii"), row())
    assert after.fingerprint(a) == before.fingerprint(a)
    assert after.fingerprint(b) != before.fingerprint(b)


@pytest.mark.parametrize("change", [{"caption": "Two."}, {"index": 2}, {"plane": "coronal"}])
def test_whatever_changes_a_caption_changes_the_fingerprint(tmp_path: Path, change: dict) -> None:
    item = image(tmp_path / "a.nii")
    prints = [captions(tmp_path, r).fingerprint(item) for r in (row(size=4), row(**change, size=4))]
    assert prints[0] != prints[1]


def test_captions_of_no_listed_image_are_an_error(tmp_path: Path) -> None:
    image(tmp_path / "a.nii")
    file, other = captions(tmp_path, row()), image(tmp_path / "b.nii")
    file.check_items([other, {"image": str(tmp_path / "a.nii")}])
    with pytest.raises(ValueError, match=r"got .*a\.nii in .*captions.jsonl and .*b\.nii"):
        file.check_items([other])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plane": "oblique"}, "plane must be one of sagittal, coronal, axial .*'oblique'"),
        ({"plane": None}, "plane must be one of"),
        ({"index": 5}, r"index must be in 0..size - 1, got 5 of 5"),
        ({"index": -1}, r"index must be in 0..size - 1, got -1 of 5"),
        ({"index": "one"}, "index must be an integer, got 'one'"),
        ({"index": 1.9}, "index must be an integer, got 1.9"),
        ({"index": True}, "index must be an integer, got True"),
        ({"position": "mid"}, "position must be a number, got 'mid'"),
        ({"index": None}, "index or position must be given, got neither"),
        ({"position": 0.9}, r"position must be \(index \+ 0.5\) / size, got 0.9 for index 1 of 5"),
        ({"index": None, "position": 1.2}, r"position must lie in \[0, 1\], got 1.2"),
        ({"index": None, "position": float("nan")}, r"position must lie in \[0, 1\], got nan"),
        ({"size": 0}, "index must be in 0..size - 1, got 1 of 0"),
        ({"caption": None}, "caption must be text, got None"),
        ({"caption": "  "}, "caption must be text, got '  '"),
        ({"image": "lost.nii"}, "image must exist, got 'lost.nii'"),
        ({"image": None}, "image must be a path, got None"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path: Path, fields: dict, message: str) -> None:
    image(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=f"{message}.*captions.jsonl line 3"):
        captions(tmp_path, row(), "", row(**fields))


@pytest.mark.parametrize("key", ["image", "plane", "index"])
def test_file_and_line_are_read_before_a_long_value_ends(key: str, tmp_path: Path) -> None:
    image(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=key) as raised:
        captions(tmp_path, row(), row(**{key: "x" * 10**5}))
    assert "captions.jsonl line 2" in str(raised.value)[:300]


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="captions.jsonl line 2 must be JSON"):
        captions(tmp_path, row(), '{"image": ')


def test_a_slice_that_the_image_does_not_have_is_named(tmp_path: Path) -> None:
    item, file = image(tmp_path / "a.nii"), captions(tmp_path, row(size=None, index=5))
    for shape in (None, (3, 4, 5)):
        with pytest.raises(ValueError, match=r"index must be in 0..4, got 5 in .*jsonl line 1"):
            file.required(item, shape)


def test_a_position_of_another_slice_than_the_index_is_named(tmp_path: Path) -> None:
    item = image(tmp_path / "a.nii")
    fields = {k: v for k, v in row(index=1, position=0.9).items() if k != "size"}
    with pytest.raises(ValueError, match="got 0.9 for index 1 of .*captions.jsonl line 1"):
        captions(tmp_path, fields).required(item)


def test_a_caption_of_another_image_size_is_named(tmp_path: Path) -> None:
    item, file = image(tmp_path / "a.nii"), captions(tmp_path, row())
    assert len(file.required(item, (3, 4, 5))[0]) == 1
    with pytest.raises(ValueError, match="size must be 6 along the axial axis, got 5 in .*line 1"):
        file.required(item, (3, 4, 6))


def test_two_captions_of_one_slice_are_an_error(tmp_path: Path) -> None:
    item = image(tmp_path / "a.nii")
    file = captions(tmp_path, row(), row(index=None, position=0.35, caption="Two."))
    with pytest.raises(ValueError, match="one a slice, got a second for axial 1 in .*line 2"):
        file.required(item)


def test_a_template_names_modality_plane_and_depth() -> None:
    texts = TemplateCaptions().caption({"modality": "CT"}, torch.tensor([2, 0]), [0.95, 0.5])
    assert texts == ["CT axial slice, uppermost", "CT sagittal slice, central"]


def test_a_template_does_not_contain_auto() -> None:
    assert TemplateCaptions().caption({"modality": "auto"}, [1], [0.5]) == [
        "medical coronal slice, middle"
    ]


def test_a_template_requires_no_slice_but_has_a_fingerprint() -> None:
    plane, position = TemplateCaptions().required({})
    assert len(plane) == len(position) == 0 and plane.dtype == torch.long
    one, two = (TemplateCaptions(t).fingerprint({}) for t in ("{plane}", "{depth}"))
    assert one != two


@pytest.mark.parametrize("template", ["{organ}", "{}", "{plane", "{plane.organ}"])
def test_an_unknown_field_of_a_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template must use no field but"):
        TemplateCaptions(template)


@pytest.mark.parametrize(
    ("name", "source", "rows", "images"),
    [("sarcoma", "index.json", 656, 123), ("hippocampus", "dataset.json", 600, 100)],
)
def test_real_captions_belong_to_real_slices(
    name: str, source: str, rows: int, images: int
) -> None:
    folder = real_data(name)
    file, items = FileCaptions(folder / "captions.jsonl"), datalist(folder / source)
    file.check_items(items)
    assert len(file.rows) == images
    assert sum(len(file.required(item)[0]) for item in items) == rows
    shapes = [(item, read_volume(item["image"]).shape[1:]) for item in items[:9]]
    assert all(None not in file.caption(i, *file.required(i, shape)) for i, shape in shapes)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions must be a file, got .*none.csv; correct the"):
        FileCaptions(tmp_path / "none.csv")
