import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandSpatialCropd,
    ResizeWithPadOrCropd,
    Spacingd,
    SpatialPadd,
)

from med3dinsight_ext.data import prepared, volumes
from med3dinsight_ext.data.chunks import CannotWrite
from med3dinsight_ext.data.labels import ReadCased, check_labels
from med3dinsight_ext.data.prepared import PreparedCopy, ReadPreparedd, loading, prepared_copy
from med3dinsight_ext.data.settings import described
from med3dinsight_ext.data.volumes import ReadVolumed, ScaleByModalityd, check_parts

NAMES = ["background", "organ"]
PATCH = (32, 32, 32)


def case(folder: Path, name: str, size: tuple[int, ...] = (40, 30, 52), seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    affine = np.array([[-1.5, 0, 0, 9], [0, 2, 0, -7], [0, 0, 1.2, 3], [0, 0, 0, 1]])
    label = np.zeros(size, np.uint8)
    label[5:12, 8:20, 30:40] = 1
    image = (random.normal(0, 90, size) + 200 * label).astype(np.int16)
    item = {"image": str(folder / f"{name}.nii.gz"), "label": str(folder / f"{name}_seg.nii.gz")}
    for key, array in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, affine), item[key])
    return {**item, "modality": "CT"}


def segmentation(spacing: float = 1.5) -> list[Any]:
    both = ["image", "label"]
    return [
        ReadCased(both, NAMES),
        ScaleByModalityd("image"),
        Spacingd(both, [spacing] * 3, mode=["bilinear", "nearest"]),
        SpatialPadd(both, PATCH),
    ]


def images() -> list[Any]:
    return [ReadVolumed("image"), ScaleByModalityd("image"), Spacingd("image", [1.5] * 3)]


def patches(transforms: list[Any], item: dict, seed: int = 3) -> list[dict]:
    compose = Compose(transforms)
    compose.set_random_state(seed)
    found: list[dict] = []
    for _ in range(3):
        part = compose(dict(item))
        found += part if isinstance(part, list) else [part]
    return found


@pytest.mark.parametrize("crop", ["spatial", "by_label", "none", "centre"])
def test_a_prepared_patch_is_the_direct_one(crop: str, tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    keys = ["image"] if crop in ("spatial", "centre") else ["image", "label"]
    load: list[Any] = {
        "centre": [*images(), ResizeWithPadOrCropd("image", (50, 24, 32))],
        "spatial": [*images(), SpatialPadd("image", PATCH)],
    }.get(crop, segmentation())
    flip = RandFlipd(keys, prob=0.5, spatial_axis=0)
    crops: dict[str, Any] = {
        "spatial": lambda: [RandSpatialCropd("image", PATCH, random_size=False), flip],
        "by_label": lambda: [RandCropByPosNegLabeld(keys, "label", PATCH, 1, 0, 2), flip],
    }
    augment = crops.get(crop, list)
    copy = prepared_copy(tmp_path / "copy", load, 0)
    copy.check([item])
    direct = patches(loading(load, None, augment()), item)
    ours = patches(loading(load, copy, augment()), item)
    assert len(direct) == len(ours) == (6 if crop == "by_label" else 3)
    for one, other in zip(direct, ours, strict=True):
        for key in keys:
            tolerance = 0.502 / prepared.STEPS if key == "image" else 0
            torch.testing.assert_close(
                other[key].as_tensor(), one[key].as_tensor(), atol=tolerance, rtol=0
            )
            torch.testing.assert_close(other[key].affine, one[key].affine, atol=1e-6, rtol=0)
            assert other[key].meta["filename_or_obj"] == item[key]


def test_only_the_chunks_of_a_patch_are_read(tmp_path: Path) -> None:
    item = case(tmp_path, "a", (200, 200, 200))
    load = [ReadVolumed("image"), ScaleByModalityd("image"), SpatialPadd("image", PATCH)]
    copy = PreparedCopy(tmp_path / "copy", load[:2])
    copy.check([item])
    read = ReadPreparedd(copy, load[2:], RandSpatialCropd("image", PATCH, random_size=False))
    size = copy.path(item["prepared"], "image").stat().st_size
    begin = int(Path("/proc/self/io").read_text().split()[1])
    assert read(item)["image"].shape == (1, *PATCH)
    assert int(Path("/proc/self/io").read_text().split()[1]) - begin < 0.3 * size


def test_a_second_start_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [case(tmp_path, name, seed=i) for i, name in enumerate("abc")]
    bad = case(tmp_path, "bad")
    Path(bad["label"]).write_bytes(b"no nifti")
    gone = case(tmp_path, "gone", seed=9)
    Path(gone["label"]).unlink()
    load, val = segmentation(), [bad, gone]
    with pytest.raises(ValueError, match=r"(?s)2 bad of 5.*label must be readable.*be a file"):
        check_labels([items, val], NAMES, copy=prepared_copy(tmp_path / "copy", load, 2))
    monkeypatch.setattr(PreparedCopy, "make", None)
    monkeypatch.setattr("med3dinsight_ext.io.files.sha256", None)
    again = prepared_copy(tmp_path / "copy", load, 2)
    assert check_labels([items, val], NAMES, True, again) == [items, []]
    with pytest.raises(ValueError, match="2 bad of 5"):
        check_labels([items, val], NAMES, copy=again)


def test_a_limit_of_the_machine_is_no_verdict_on_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, load = case(tmp_path, "a"), images()
    monkeypatch.setenv("MED3D_MAX_VOXELS", "1000")
    with pytest.raises(ValueError, match="MED3D_MAX_VOXELS"):
        prepared_copy(tmp_path / "copy", load, 0).check([item])
    monkeypatch.delenv("MED3D_MAX_VOXELS")
    for error in (MemoryError(), OSError(5, "Input/output error")):
        with monkeypatch.context() as patch:
            patch.setattr("med3dinsight_ext.data.volumes.load_volume", mock.Mock(side_effect=error))
            with pytest.raises(ValueError, match=type(error).__name__):
                prepared_copy(tmp_path / "copy", load, 0).check([item])
    assert prepared_copy(tmp_path / "copy", load, 0).check([item])


def test_a_volume_that_is_replaced_while_it_is_read_makes_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, load = case(tmp_path, "a"), images()
    read = volumes.load_volume

    def replacing(*given: Any, **options: Any) -> Any:
        case(tmp_path, "a", seed=1)
        return read(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(volumes, "load_volume", replacing)
        with pytest.raises(ValueError, match="1 bad of 1.*\n.*stay as it is while it is read"):
            prepared_copy(tmp_path / "copy", load, 0).check([item])
    assert not list((tmp_path / "copy").glob("??/*.b2nd"))
    assert prepared_copy(tmp_path / "copy", load, 0).check([item])


def test_what_changes_a_value_changes_the_entry(tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    copies = [PreparedCopy(tmp_path, segmentation(mm)[:3]) for mm in (1.5, 1.5, 2.0)]
    names = [copy.entry(item) for copy in copies]
    assert names[0] == names[1] != names[2]
    assert copies[0].entry({**item, "modality": "MR"}) != names[0]
    for key, settings in (("image", segmentation()), ("label", segmentation())):
        time.sleep(0.01)  # a new time of change
        Path(item[key]).write_bytes(Path(case(tmp_path, f"b{key}", seed=7)["image"]).read_bytes())
        changed = PreparedCopy(tmp_path, settings[:3]).entry(item)
        assert changed != names[0]
        names[0] = changed


def test_an_archive_is_keyed_by_content_and_member(tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    items = [{"image": f"{archive}::train_images::{i}", "modality": "MR"} for i in range(2)]
    names: set[str] = set()
    for seed in (0, 1):
        random = np.random.default_rng(seed)
        np.savez(archive, train_images=random.random((2, 9, 9, 9)), seed=[seed] * (1 + seed))
        copy = PreparedCopy(tmp_path / "copy", images())
        assert len(copy.check(items)) == 2
        names |= {item["prepared"] for item in items}
        assert PreparedCopy(tmp_path / "copy", images())._record(items[1]) is not None
    assert len(names) == 4


def test_the_order_of_a_set_changes_no_entry() -> None:
    transform = images()[1]
    transform.names = {"a", "b", "c"}
    assert described([transform])[0][1]["names"] == ["a", "b", "c"]


def test_a_replaced_volume_is_prepared_anew(tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    load = [*images(), SpatialPadd("image", PATCH)]
    copy = PreparedCopy(tmp_path / "copy", load[:3])
    copy.check([item])
    first = item["prepared"]
    time.sleep(0.01)
    case(tmp_path, "a", seed=1)
    again = PreparedCopy(tmp_path / "copy", load[:3])
    again.check([item])
    assert item["prepared"] != first
    whole = ReadPreparedd(again, load[3:])(item)["image"]
    direct = Compose(load)(dict(item))["image"]
    torch.testing.assert_close(whole.as_tensor(), direct.as_tensor(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("fault", ["cut", "flip", "gone"])
def test_a_broken_entry_is_made_again(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = case(tmp_path, "a")
    copy = PreparedCopy(tmp_path / "copy", images())
    copy.check([item])
    read = ReadPreparedd(copy, [])
    expected = read(item)["image"]
    path = copy.path(item["prepared"], "image")
    sound = path.read_bytes()
    broken = bytearray(sound)
    broken[len(sound) // 2] ^= 4
    if fault == "gone":
        path.unlink()
    else:
        path.write_bytes(sound[: len(sound) // 2] if fault == "cut" else broken)
    assert torch.equal(read(item)["image"], expected)
    assert f"preparing {item['image']} again" in caplog.text
    assert path.read_bytes() == sound


def test_an_entry_whose_file_is_gone_is_made_at_the_start(tmp_path: Path) -> None:
    item = case(tmp_path, "a")
    copy = PreparedCopy(tmp_path / "copy", images())
    copy.check([item])
    path = copy.path(item["prepared"], "image")
    path.unlink()
    PreparedCopy(tmp_path / "copy", images()).check([item])
    assert path.exists()


def test_lines_that_a_full_disk_cut_are_ignored(tmp_path: Path) -> None:
    items = [case(tmp_path, name, seed=i) for i, name in enumerate("ab")]
    PreparedCopy(tmp_path / "copy", images()).check(items)
    index = tmp_path / "copy" / "index.jsonl"
    index.write_text(index.read_text()[:-20])
    again = PreparedCopy(tmp_path / "copy", images())
    assert len(check_parts([items], copy=again)[0]) == 2
    lines = [json.loads(line) for line in index.read_text().split("\n") if line.endswith("}")]
    assert {line["entry"] for line in lines} == {item["prepared"] for item in items}


def test_what_a_worker_could_not_write_is_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, here, make = case(tmp_path, "a"), os.getpid(), PreparedCopy.make

    def full_in_workers(copy: PreparedCopy, given: dict) -> prepared.Record:
        if os.getpid() != here:
            raise CannotWrite("disk full")
        return make(copy, given)

    monkeypatch.setattr(PreparedCopy, "make", full_in_workers)
    copy = PreparedCopy(tmp_path / "copy", images(), 1)
    copy.check([item])
    assert copy.path(item["prepared"], "image").exists()


def test_an_item_that_was_not_checked_is_an_error(tmp_path: Path) -> None:
    copy = PreparedCopy(tmp_path / "copy", images())
    with pytest.raises(ValueError, match=r"item must be prepared, got a\.nii without an entry"):
        ReadPreparedd(copy, [])({"image": "a.nii"})


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from data.test_prepared import PreparedCopy, images
items = [dict(image=str(p), modality="CT") for p in sorted(Path({folder!r}).glob("v*.nii.gz"))]
PreparedCopy({copy!r}, images(), 0).check([i for i in items if "_seg" not in i["image"]])
"""


@pytest.mark.slow
def test_killed_and_parallel_jobs_leave_sound_entries(tmp_path: Path) -> None:
    items = [case(tmp_path, f"v{i}", seed=i) for i in range(12)]
    tests = Path(__file__).parents[1]
    program = PROGRAM.format(
        root=str(tests.parent), tests=str(tests), folder=str(tmp_path), copy=str(tmp_path / "copy")
    )
    jobs = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    done = tmp_path / "copy" / "index.jsonl"
    while not done.exists() and any(job.poll() is None for job in jobs):
        time.sleep(0.02)
    os.kill(jobs[0].pid, signal.SIGKILL)
    jobs[0].wait()
    assert jobs[1].wait() == 0
    plain = PreparedCopy(tmp_path / "plain", images())
    copy = PreparedCopy(tmp_path / "copy", images())
    for one in (plain, copy):
        one.check(items)
        found = {p.name: p.read_bytes() for p in one.root.glob("*/*.b2nd") if p.name[0] != "."}
        assert len(found) == 12
        if one is plain:
            expected = found
    assert found == expected
