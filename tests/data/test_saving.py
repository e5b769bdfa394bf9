"""Segmentations appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from running import merged

from med3dinsight_ext.data.saving import SaveSegmentationd

AFFINE = np.diag([-1.5, 2, 1.2, 1])


def data(name: str = "a.b.nii.gz") -> dict:
    mask = torch.zeros(1, 4, 5, 6)
    mask[0, 1, 2, 3] = 2
    return {"pred": MetaTensor(mask, torch.tensor(AFFINE), {"filename_or_obj": name})}


def saver(folder: Path, root: Path | None = None) -> SaveSegmentationd:
    return SaveSegmentationd("pred", folder, root, output_postfix="seg", output_dtype=torch.uint8)


def test_a_segmentation_is_written_under_its_images_name(tmp_path: Path) -> None:
    saver(tmp_path)(data())
    assert os.listdir(tmp_path) == ["a.b_seg.nii.gz"]
    image = nib.load(tmp_path / "a.b_seg.nii.gz")
    assert np.allclose(image.affine, AFFINE) and image.get_data_dtype() == np.uint8
    assert np.argwhere(np.asarray(image.dataobj)).tolist() == [[1, 2, 3]]


def test_images_of_one_name_keep_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write = saver(Path("out"), Path("data"))
    for name in ("s0/t.1/ct.nii.gz", "s1/ct.nii.gz"):
        write(data(str(tmp_path / "data" / name)))
    write(data("/elsewhere/ct.nii.gz"))
    files = sorted(path.as_posix() for path in Path("out").rglob("*.gz"))
    assert files == ["out/ct_seg.nii.gz", "out/s0/t.1/ct_seg.nii.gz", "out/s1/ct_seg.nii.gz"]


def test_no_segmentation_replaces_that_of_another_image(tmp_path: Path) -> None:
    write = saver(tmp_path)
    write(data("/data/s0/ct.nii.gz"))
    write(data("/data/s0/ct.nii.gz"))
    before = (tmp_path / "ct_seg.nii.gz").stat().st_mtime_ns
    with pytest.raises(ValueError, match="got /data/s0/ct.nii.gz and /data/s1/ct.nii, both ct;"):
        write(data("/data/s1/ct.nii"))
    assert (tmp_path / "ct_seg.nii.gz").stat().st_mtime_ns == before


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_no_part_of_a_file(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before:
        saver(tmp_path)(data())
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(image: nib.Nifti1Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(nib, "save", fail)
    message = r"output_dir must be a folder that can be written, got .Errno 28. No space left"
    with pytest.raises(ValueError, match=message):
        saver(tmp_path)(data())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"output_dir must be .*, got .Errno \d+. .* in .*/file/a;"
    ):
        saver(tmp_path / "file" / "a")(data())


def test_another_fault_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: nib.Nifti1Image, path: Path) -> None:
        raise KeyError("header")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(RuntimeError, match="KeyError: 'header'"):
        saver(tmp_path)(data())


@pytest.mark.parametrize(("classes", "dtype"), [(256, "uint8"), (257, "int16")])
def test_a_saved_segmentation_holds_all_its_classes(
    classes: int, dtype: str, tmp_path: Path
) -> None:
    config = merged("seg-finetune", "inference.json")
    config |= {"label_names": [f"c{n}" for n in range(classes)], "output_dir": str(tmp_path)}
    (save,) = [t for t in config["postprocessing"]["transforms"] if "output_dtype" in t]
    config["save"] = save | {"root": str(tmp_path)}
    meta = {"filename_or_obj": str(tmp_path / "x.nii.gz")}
    label = torch.full((1, 4, 4, 4), classes - 1.0)
    pred = MetaTensor(label, affine=torch.eye(4), meta=meta)
    ConfigParser(config).get_parsed_content("save")({"pred": pred})
    (found,) = tmp_path.rglob("*_seg.nii.gz")
    image = nib.load(found)
    assert image.get_data_dtype() == dtype and np.unique(image.get_fdata()) == [classes - 1]
