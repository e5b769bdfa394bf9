"""Headers that claim more voxels than there are, read with little memory left."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fakes import volume
from running import environment

from med3dinsight_ext.data.volumes import CheckClaimd, read_volume
from med3dinsight_ext.io.claims import npz_array
from med3dinsight_ext.io.images import open_volume

SIDE = 30_000  # 3e4 cubed voxels of float32 are 1e14 bytes
READ = """
import contextlib, io, json, resource, sys
from pathlib import Path
from monai.transforms import Compose, LoadImaged
from med3dinsight_ext.data import datalists, labels, laterality, volumes
from med3dinsight_ext.doctor import doctor
from med3dinsight_ext.io.errors import root_cause

folder, sound = Path(sys.argv[1]), sys.argv[2]
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
seg = Compose([volumes.CheckClaimd("image"), LoadImaged("image")])


def checked(path):
    # the findings of doctor as an error
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            doctor(str(Path(path).parent), page=str(folder.parent / "page.html"))
    except SystemExit:
        raise ValueError(out.getvalue()) from None


readers = {
    "volume": lambda path: volumes.read_volume(path),
    "label": lambda path: labels.read_label({"image": sound, "label": path}, ["a", "b"]),
    "laterality": lambda path: laterality.offsets(path, 2),
    "doctor": checked,
    "segmentation": lambda path: seg({"image": path}),
}
found = {}
for lie in sorted(folder.iterdir()):
    for name, read in readers.items():
        path = next(lie.iterdir())
        try:
            if path.suffix != ".npz":
                read(str(path))
            elif name == "volume":
                read(f"{path}::train_images::0")
            elif name == "doctor":
                datalists.datalist(path)
            else:
                continue
            found[f"{lie.name} {name}"] = "read"
        except Exception as error:
            cause = root_cause(error)
            found[f"{lie.name} {name}"] = f"{type(cause).__name__}: {cause}"
print(json.dumps(found))
"""


def header(shape: tuple[int, ...], kind: type = np.float32) -> bytes:
    about = nib.Nifti1Header()
    about.set_data_dtype(kind)
    about.set_data_shape(shape)
    about.set_sform(np.eye(4), 1)
    about["magic"], about["vox_offset"] = b"n+1", 352
    return about.binaryblock + bytes(4)


def npy(shape: tuple[int, ...], content: bytes) -> bytes:
    file = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue() + content


def lies(folder: Path) -> None:
    """A folder for each lie, with one file."""
    noise = np.random.default_rng(0).bytes(2000)
    contents = {
        "huge/a.nii": header((SIDE,) * 3) + noise,
        "huge_gz/a.nii.gz": gzip.compress(header((SIDE,) * 3) + noise),
        "small/a.nii": header((800, 800, 800), np.uint8) + noise,
        "small_gz/a.nii.gz": gzip.compress(header((800, 800, 800), np.uint8) + noise),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    (folder / "sparse").mkdir()
    with (folder / "sparse" / "a.nii").open("wb") as file:
        file.write(header((2000, 2000, 2000), np.uint8))
        file.truncate(352 + 2000**3)
    arrays = {"npz": npy((1, SIDE, SIDE, SIDE), noise), "npz_small": npy((2, 800, 800, 800), noise)}
    for name, images in arrays.items():
        (folder / name).mkdir()
        with zipfile.ZipFile(folder / name / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_images.npy", images)
            archive.writestr("train_labels.npy", npy(images_shape(name), noise))


def images_shape(name: str) -> tuple[int, ...]:
    return (SIDE,) * 3 if name == "npz" else (800, 800, 800)


CASES = [
    f"{lie} {reader}"
    for lie in ("huge", "huge_gz", "small", "small_gz", "sparse")
    for reader in ("volume", "label", "laterality", "doctor", "segmentation")
] + [f"{lie} {reader}" for lie in ("npz", "npz_small") for reader in ("volume", "doctor")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each reader raises for each lie with 256 MiB to spare."""
    folder = tmp_path_factory.mktemp("lies")
    lies(folder / "lies")
    sound = volume(folder / "sound.nii.gz")["image"]
    words = [sys.executable, "-c", READ, str(folder / "lies"), sound]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_lying_header_is_named_before_memory_is_allocated(
    case: str, found: dict[str, str]
) -> None:
    rule = (
        "volume must have at most 1,073,741,824 voxels, got 2000 x 2000 x 2000"
        if case.startswith("sparse")
        else "header must claim what its file can hold, got "
    )
    assert "Error" in found[case] and rule in found[case] and "MemoryError" not in found[case]
    assert f"lies/{case.split()[0]}/a." in found[case]


def test_the_emptiest_honest_files_are_read(tmp_path: Path) -> None:
    array = np.zeros((100, 200, 300), np.uint8)  # compresses as well as anything can
    array[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    np.savez_compressed(tmp_path / "a.npz", train_images=array)
    assert os.path.getsize(tmp_path / "a.nii.gz") < array.size / 200
    assert read_volume(str(tmp_path / "a.nii.gz")).shape == (1, *array.shape)
    assert np.array_equal(npz_array(tmp_path / "a.npz", "train_images"), array)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nii.bz2", "hdr", "mgz"])
def test_honest_files_of_each_kind_may_be_opened(ending: str, tmp_path: Path) -> None:
    kind = {"hdr": nib.Nifti1Pair, "mgz": nib.MGHImage}.get(ending, nib.Nifti1Image)
    path = tmp_path / f"a.{ending}"
    nib.save(kind(np.ones((3, 4, 5), np.float32), np.eye(4)), path)
    assert open_volume(path).shape == (3, 4, 5)


def extended(path: Path, kind: type, *sizes: int, content: bytes = bytes(24)) -> Path:
    """A volume whose header's extensions claim these sizes; each is followed by the content."""
    header = kind()
    header.set_data_dtype(np.float32)
    header.set_data_shape((2, 3, 4))
    header.set_sform(np.eye(4), 1)
    start = header.template_dtype.itemsize + 4
    ends = start + sum(8 + len(content) for _ in sizes)
    header["magic"], header["vox_offset"] = header.single_magic, ends
    kinds = np.dtype("i4").newbyteorder(header.endianness)
    blocks = [np.array([size, 6], kinds).tobytes() + content for size in sizes]
    voxels = np.arange(24, dtype=np.float32).tobytes()
    data = header.binaryblock + b"\1\0\0\0" + b"".join(blocks) + voxels
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("size", [2**31 - 16, 2**24, 15, 0, -(2**31)])
def test_an_extension_of_any_size_is_no_reason_to_fill_the_memory(
    size: int, name: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = extended(tmp_path / name, kind, 32, size)
    monkeypatch.setattr(nib, "load", lambda _: pytest.fail("the extension was read"))
    with pytest.raises(ValueError, match=f"extensions must .*got {size:,} in .*{name}"):
        open_volume(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
def test_sound_extensions_are_read(kind: type, tmp_path: Path) -> None:
    path = extended(tmp_path / "a.nii.gz", kind, 32, 32)
    assert open_volume(path).header.extensions.count("comment") == 2
    assert np.array_equal(np.asarray(open_volume(path).dataobj).ravel("F"), np.arange(24))


def test_extensions_are_sized_in_the_byte_order_of_the_header(tmp_path: Path) -> None:
    def swapped() -> nib.Nifti1Header:
        return nib.Nifti1Header(endianness=">")

    assert open_volume(extended(tmp_path / "a.nii", swapped, 32)).shape == (2, 3, 4)


def test_extensions_of_a_header_of_its_own_are_checked(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.ones((2, 3, 4), np.float32), np.eye(4)), tmp_path / "a.hdr")
    header = (tmp_path / "a.hdr").read_bytes()[:348]
    (tmp_path / "a.hdr").write_bytes(header + b"\1\0\0\0" + np.array([16, 6], "i4").tobytes() * 2)
    assert open_volume(tmp_path / "a.hdr").shape == (2, 3, 4)
    (tmp_path / "a.hdr").write_bytes(header + b"\1\0\0\0" + np.array([2**30, 6], "i4").tobytes())
    for name in ("a.hdr", "a.img"):
        with pytest.raises(ValueError, match=f"extensions must .*got 1,073,741,824 in .*{name}"):
            open_volume(tmp_path / name)


def test_a_file_cut_by_a_byte_is_refused(tmp_path: Path) -> None:
    path = Path(volume(tmp_path / "a.nii")["image"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"header must claim .*room for 15,359 bytes in .*a\.nii"):
        open_volume(path)


def test_the_limit_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = volume(tmp_path / "a.nii.gz")["image"]
    monkeypatch.setenv("MED3D_MAX_VOXELS", "3840")
    assert open_volume(path).shape == (12, 16, 20)
    monkeypatch.setenv("MED3D_MAX_VOXELS", "3839")
    with pytest.raises(ValueError, match="at most 3,839 voxels, got 12 x 16 x 20 .*MED3D_MAX_VOX"):
        read_volume(path)


def test_what_has_no_name_of_a_volume_is_left_to_the_reader(tmp_path: Path) -> None:
    assert CheckClaimd("image")({"image": str(tmp_path / "a.npz")})
