"""Every format gives the same voxels at the same place; what is broken is named."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import ITKReader, PydicomReader
from monai.transforms import LoadImage, Orientation
from volume_writers import AFFINE, VOXELS, write_dicom, write_mha, write_mhd, write_nrrd

from med3dinsight_ext.data.volumes import load_volume, read_volume
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.io.images import open_volume

nrrd = pytest.importorskip("nrrd")
pydicom = pytest.importorskip("pydicom")

WRITERS: dict[str, Callable[..., Any]] = {
    "a.nrrd": write_nrrd,
    "gzip.nrrd": lambda path: write_nrrd(path, encoding="gzip"),
    "ras.nrrd": lambda path: write_nrrd(path, space="right-anterior-superior"),
    "las.nrrd": lambda path: write_nrrd(path, space="left-anterior-superior"),
    "a.mha": write_mha,
    "packed.mha": lambda path: write_mha(path, packed=True),
    "big.mha": lambda path: write_mha(path, order=">"),
    "a.mhd": write_mhd,
    "packed.mhd": lambda path: write_mhd(path, packed=True),
    "series": write_dicom,
    "rescaled": lambda path: write_dicom(path, slope=0.5, intercept=-1024),
    "1.2.840.names": lambda path: write_dicom(path, names="1.2.840.{0}"),
    "reversed": lambda path: write_dicom(path, number=lambda k: 99 - k),
    "rle": lambda path: write_dicom(path, compress="1.2.840.10008.1.2.5"),
    "flat.nii": lambda path: nib.save(nib.Nifti1Image(VOXELS, AFFINE), path),
}


def nifti(folder: Path) -> Path:
    nib.save(nib.Nifti1Image(VOXELS, AFFINE), folder / "reference.nii.gz")
    return folder / "reference.nii.gz"


@pytest.mark.parametrize("name", WRITERS)
def test_a_volume_is_the_same_in_every_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    expected, found = read_volume(str(nifti(tmp_path))), read_volume(str(path))
    assert found.shape == expected.shape == (1, 4, 6, 5)
    assert np.allclose(found.numpy(), expected.numpy(), atol=1e-4)
    assert np.allclose(found.affine, expected.affine, atol=1e-5)
    assert np.allclose(found.pixdim, (0.8, 1.1, 2.5), atol=1e-5)
    assert found.meta["filename_or_obj"] == str(path)
    header = open_volume(path)  # its voxels are at the same world coordinates, in the file's order
    for index in ((0, 0, 0), (3, 4, 2)):
        world = header.affine @ (*index, 1)
        place = np.linalg.solve(AFFINE, world).round(4)[:3]
        assert np.asarray(header.dataobj)[index] == pytest.approx(VOXELS[tuple(place.astype(int))])


@pytest.mark.parametrize("name", ["packed.mha", "a.mhd"])
def test_metaimages_are_read_as_by_itk(name: str, tmp_path: Path) -> None:
    pytest.importorskip("itk")
    WRITERS[name](tmp_path / name)
    reader = ITKReader()
    theirs = LoadImage(reader, image_only=True, ensure_channel_first=True)(tmp_path / name, reader)
    ours = load_volume(tmp_path / name)
    assert np.array_equal(ours, theirs)
    assert np.allclose(ours.affine, theirs.affine, atol=1e-5)


@pytest.mark.parametrize("name", ["series", "rescaled"])
def test_a_series_is_read_as_by_monai(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    reader = PydicomReader()
    theirs = LoadImage(reader, image_only=True, ensure_channel_first=True)(tmp_path / name, reader)
    ours, theirs = (
        Orientation("RAS", labels=None)(x) for x in (load_volume(tmp_path / name), theirs)
    )
    assert np.allclose(ours, theirs, atol=1e-4)
    assert np.allclose(ours.affine, theirs.affine, atol=1e-5)


def test_each_slice_has_its_own_rescaling(tmp_path: Path) -> None:
    write_dicom(tmp_path / "pet", slope=lambda k: 0.25 * (k + 1))
    assert np.allclose(
        read_volume(str(tmp_path / "pet")), read_volume(str(nifti(tmp_path))), atol=1
    )


def drop(folder: Path) -> None:
    write_dicom(folder)
    (folder / "0002.dcm").unlink()


def mix(folder: Path) -> None:
    write_dicom(folder)
    write_dicom(folder, uid="1.2.3.5", names="other{0}.dcm")


def repeat(folder: Path) -> None:
    write_dicom(folder)
    write_dicom(folder, names="echo{0}.dcm")


def change(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_dicom(folder)
        image = pydicom.dcmread(folder / "0001.dcm")
        for name, value in fields.items():
            setattr(image, name, value)
        image.save_as(folder / "0001.dcm")

    return write


def syntax(uid: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_dicom(folder)
        for path in folder.iterdir():
            image = pydicom.dcmread(path)
            image.file_meta.TransferSyntaxUID = uid
            image.PixelData = pydicom.encaps.encapsulate([b"\0" * 40])
            image["PixelData"].VR = "OB"
            image.save_as(path)

    return write


def damage(folder: Path) -> None:
    write_dicom(folder)
    (folder / "0003.dcm").write_bytes((folder / "0003.dcm").read_bytes()[:-20])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (drop, "have all its slices, got 5 mm between 0001.dcm and 0003.dcm, 2.5 mm elsewhere"),
        (mix, r"hold one DICOM series, got 2: 1.2.3.4 \(5 files\), 1.2.3.5 \(5 files\) in"),
        (repeat, "have one image at a place, got .*0.dcm and .*0.dcm at one place in .*echo"),
        (change(NumberOfFrames=3), "hold one image a file, got 3 frames in 0001.dcm .*dcm2niix"),
        (change(SamplesPerPixel=3), "be grey, got colours in 0001.dcm"),
        (change(PixelSpacing=[2, 2]), r"have one PixelSpacing, got \[.*in 0001.dcm, \[2.0, 2.0\]"),
        (change(ImagePositionPatient=None), "have ImagePositionPatient in every file, got none in"),
        (
            lambda folder: write_dicom(folder, shear=1.0),
            r"above each other, got slices up to 4.0 mm beside each other \(gantry tilt\)",
        ),
        (
            syntax("1.2.840.10008.1.2.4.70"),
            "a compression that is decoded here, got JPEG Lossless.* in .*pylibjpeg",
        ),
        (syntax("1.2.840.10008.1.2.4.90"), "must hold readable images, got RuntimeError: Unable"),
        (syntax("1.2.840.10008.1.2.4.100"), "compression that is decoded here, got MPEG2"),
        (damage, "(header must claim|must hold readable images)"),
        (lambda folder: folder.mkdir(), "hold a DICOM series, got no DICOM file in"),
    ],
)  # fmt: skip
def test_what_is_no_sound_series_is_named(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "series")
    with pytest.raises(ValueError, match=message) as error:
        read_volume(str(tmp_path / "series"))
    assert str(tmp_path / "series") in str(error.value)
    assert "\n" not in str(error.value)


def edit(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.mha", edit(b"NDims = 3", b"NDims = 2"), "be 3D, got 2 dimensions"),
        ("a.mha", edit(b"DimSize = 4 6 5", b"DimSize = 4 6 999"), "header must claim what"),
        ("a.mha", edit(b"MET_FLOAT", b"MET_STRING"), "one binary number a voxel, got 1 of MET_S"),
        ("a.mha", edit(b"ElementSpacing", b"Ignored"), "have ElementSpacing, got none"),
        ("a.mha", edit(b"ElementDataFile", b"Nothing"), "have a MetaImage header"),
        ("packed.mha", edit(b"CompressedData = True", b"CompressedData = No"), "header must claim"),
        ("a.mhd", edit(b"a.raw", b"../b"), "have its voxels in one file beside it, got '../b'"),
        ("a.nrrd", edit(b"sizes: 4 6 5", b"sizes: 4 6 999"), "header must claim what its file can"),
        ("a.nrrd", edit(b"space: left-posterior-superior\n", b""), "have a space .* got none"),
        ("a.nrrd", edit(b"encoding: raw", b"encoding: raw\ndata file: a"), "another data file"),
        ("a.nrrd", edit(b"type: float", b"type: block"), "volume must be readable"),
        ("a.nrrd", edit(b"NRRD", b"NEED"), "volume must be readable"),
        ("a.nrrd", edit(b"encoding: raw", b'encoding: raw\nspace units: "um" "um" ""'), "be in mm"),
    ],
)  # fmt: skip
def test_a_broken_header_is_named(
    name: str, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / name)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_volume(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_booleans_of_a_metaimage_are_written_in_many_ways(tmp_path: Path) -> None:
    write_mha(tmp_path / "a.mha")
    whole = open_volume(tmp_path / "a.mha").get_fdata()
    head, _, voxels = (tmp_path / "a.mha").read_bytes().partition(b"ElementDataFile = LOCAL\n")
    for word in (b"true", b"T", b"1"):
        swapped = np.frombuffer(voxels, "<f4").astype(">f4").tobytes()
        lines = [line for line in head.splitlines(True) if b"MSB" not in line]
        lines += [b"BinaryDataByteOrderMSB = " + word + b"\n", b"ElementDataFile = LOCAL\n"]
        (tmp_path / "a.mha").write_bytes(b"".join(lines) + swapped)
        assert np.array_equal(open_volume(tmp_path / "a.mha").get_fdata(), whole)


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    for name in ("gzip.nrrd", "packed.mha"):
        WRITERS[name](tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-60])
        with pytest.raises(ValueError, match=name):
            read_volume(str(tmp_path / name))


def test_the_limit_of_voxels_holds_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MED3D_MAX_VOXELS", "119")
    for name, write in WRITERS.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match="at most 119 voxels, got .*MED3D_MAX_VOXELS"):
            open_volume(tmp_path / name)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("nrrd", "a.nrrd"), ("pydicom", "series")):
        WRITERS[name](tmp_path / name)
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ValueError, match=rf"package {module}, got none; .*ext\[formats\]"):
            open_volume(tmp_path / name)


def test_a_hash_covers_every_file_of_a_volume(tmp_path: Path) -> None:
    memo = HashMemo(tmp_path / "files.jsonl")
    for name, part in (("a.mhd", "a.raw"), ("series", "series/0003.dcm")):
        WRITERS[name](tmp_path / name)
        before = memo(tmp_path / name)
        changed = tmp_path / part
        changed.write_bytes(changed.read_bytes()[:-1] + b"\x7f")
        assert memo.get(tmp_path / name) is None
        assert memo(tmp_path / name) != before
    assert HashMemo(tmp_path / "files.jsonl").get(tmp_path / "series") == memo(tmp_path / "series")


def test_the_order_of_names_does_not_change_a_series_hash(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for k, path in enumerate(sorted((tmp_path / "a").iterdir(), reverse=True)):
        (tmp_path / "b" / f"{k}.dcm").write_bytes(path.read_bytes())
    memo = HashMemo(tmp_path / "files.jsonl")
    assert memo(tmp_path / "a") == memo(tmp_path / "b")


def test_gzip_that_claims_more_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    write_nrrd(tmp_path / "a.nrrd", encoding="gzip")
    head, _ = (tmp_path / "a.nrrd").read_bytes().split(b"\n\n", 1)
    head = head.replace(b"sizes: 4 6 5", b"sizes: 900 900 900")
    (tmp_path / "a.nrrd").write_bytes(head + b"\n\n" + gzip.compress(bytes(10)))
    with pytest.raises(ValueError, match="header must claim what its file can hold"):
        open_volume(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("unit", "named"), [("meter", "metres"), ("micron", "micrometres")])
def test_another_unit_than_mm_is_refused(unit: str, named: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4))
    for code in ("unknown", "mm"):
        image.header.set_xyzt_units(code)
        nib.save(image, tmp_path / "a.nii.gz")
        assert open_volume(tmp_path / "a.nii.gz").shape == (4, 5, 6)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=f"must be in mm, got {named} as .*a.nii.gz; scale"):
        open_volume(tmp_path / "a.nii.gz")
