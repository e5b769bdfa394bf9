"""Clocks that jump, and files whose times lie in the future or the past."""

from __future__ import annotations

import os
import re
from pathlib import Path

import fakes
import pytest
import torch
from running import ROOT, Killed, run, settings

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.training.record import RunRecord, read_record

YEAR = 365 * 86400 * 10**9
TIMES = {"1901": -69 * YEAR, "1970": 0, "2106": 136 * YEAR, "2400": 430 * YEAR}  # in ns


def set_times(folder: Path, nanoseconds: int) -> None:
    for path in folder.rglob("*"):
        os.utime(path, ns=(nanoseconds, nanoseconds))


def test_no_other_file_reads_a_clock_that_may_jump() -> None:
    """Durations and deadlines are measured by clocks that do not."""
    clock = re.compile(r"st_[acm]time|getmtime|time\.time\(|datetime\.(now|fromtimestamp|today)")
    package = ROOT / "med3dinsight_ext"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if clock.search(path.read_text("utf-8"))
    }
    assert found == {
        "io/files.py",  # HashMemo
        "training/record.py",  # date of the start; whether weights were replaced
        "monailabel/app/answers.py",  # times of events, which are sorted
        "monailabel/app/datastores.py",  # as the class that it extends: equal or not
        "monailabel/app/rounds.py",  # the epoch that viewers show meanwhile
        "monailabel/app/versions.py",  # date of weights; whether they are the same: equal or not
        "workflows.py",  # which files a prediction has written: equal or not
    }


@pytest.mark.parametrize("time", TIMES)
def test_another_file_with_the_same_size_and_time_is_hashed_again(
    time: str, tmp_path: Path
) -> None:
    """As of an archive that gives all its files one time, unpacked over an earlier one."""
    file = tmp_path / "v.nii"
    file.write_bytes(b"one")
    os.utime(file, ns=(TIMES[time],) * 2)
    memo = HashMemo(tmp_path / "files.jsonl")
    first = memo(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(TIMES[time],) * 2)
    assert HashMemo(tmp_path / "files.jsonl")(file) != first
    assert memo(file) == HashMemo(tmp_path / "files.jsonl")(file)


@pytest.mark.parametrize("time", TIMES)
def test_a_store_is_filled_once_whatever_the_time_of_its_files(time: str, tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    items = [fakes.volume(images / f"{i}.nii.gz", i) for i in range(2)]
    set_times(images, TIMES[time])
    first = Store(tmp_path / "store", fakes.teacher(), TemplateCaptions(), 2).fill(items)
    set_times(tmp_path, TIMES["1970"])  # the clock jumped back between the runs

    class Unused(TemplateCaptions):
        def caption_volumes(self, *_: object) -> None:  # type: ignore[override]
            raise AssertionError("a volume is made again")

    assert Store(tmp_path / "store", fakes.teacher(), Unused(), 2).fill(items) == first


def test_a_training_is_resumed_after_the_clock_jumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undisturbed run, and one that is killed and goes on among files of the future."""
    data = fakes.write_volumes(tmp_path / "in", 3)
    backbone = {"_target_": "fakes.PlainNet"}

    def train(name: str) -> Path:
        out = tmp_path / name
        given = settings("pretrain", out, data, max_epochs=3, backbone=backbone)
        run("pretrain", ["train.json"], **given)
        return out / "models"

    whole, update = train("whole"), RunRecord.update

    def killed(record: RunRecord, epoch: int, metric: object) -> None:
        update(record, epoch, metric)  # type: ignore[arg-type]
        if epoch == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunRecord, "update", killed)
        train("halves")
    set_times(tmp_path, TIMES["2400"])
    halves = train("halves")
    one, other = (torch.load(path / "student.pt", weights_only=True) for path in (whole, halves))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    record = read_record(halves / "model.pt")
    assert record and record["epochs"] == 3 and record["resumed_after"] in ([1], [2])
    assert 0 < record["seconds"] < 3600


@pytest.mark.parametrize("time", TIMES)
def test_weights_of_any_time_have_a_date(time: str, tmp_path: Path) -> None:
    versions = pytest.importorskip("med3dinsight_ext.monailabel.app.versions")
    (tmp_path / "model.pt").write_bytes(b"")
    os.utime(tmp_path / "model.pt", ns=(TIMES[time],) * 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", versions.weights_of(tmp_path)["saved"])
