"""Costs are those of the job; a disk that is full and files that are broken are named."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data.test_prepared import case, images, segmentation
from ray_store import build

from med3dinsight_ext.data import costs, manifests, prepared
from med3dinsight_ext.data.chunks import CannotWrite
from med3dinsight_ext.data.costs import measure, prepare_costs
from med3dinsight_ext.data.prepared import PreparedCopy
from med3dinsight_ext.doctor import check_data


def test_the_disk_that_is_foretold_is_what_is_used_and_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [case(tmp_path, f"v{i}", seed=i) for i in range(5)]
    copy = PreparedCopy(tmp_path / "copy", segmentation())
    found = prepare_costs(copy, items)
    assert not copy.root.exists() and found["missing"] == 5 and found["hours"] > 0
    assert "5 volumes, 5 of them not in" in (out := capsys.readouterr().out)
    assert re.search(
        r"about .* GB of disk \(.* GB are free\), .* hours with 1 workers of .*by 3 vo", out
    )
    copy.check(items)
    made = sum(path.stat().st_size for path in copy.root.glob("*/*.b2nd")) / 1e9
    assert found["gigabytes"] == pytest.approx(made, rel=0.05)
    assert prepare_costs(copy, items)["missing"] == 0


def test_workers_share_the_hours_and_a_small_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [case(tmp_path, "v0")] * 400
    monkeypatch.setattr(costs, "measure", lambda work, items: work(items[0]) or costs.Rate(1, 9, 1))
    monkeypatch.setattr(costs, "free_gigabytes", lambda folder: 1e-6)
    hours = [
        prepare_costs(PreparedCopy(tmp_path / "copy", images(), workers), items)["hours"]
        for workers in (0, 4)
    ]
    assert hours == [1.0, 0.25]
    assert "the disk is too small for the prepared copy" in caplog.text


def test_seconds_are_the_median_and_bad_items_do_not_count() -> None:
    def work(item: float) -> None:
        if item < 0:
            raise ValueError("bad")
        time.sleep(item)

    rate = measure(work, [0.05, 9, -1, 9, 0.06])
    assert rate.volumes == 2 and 0.05 < rate.seconds < 0.2
    assert measure(work, [-1.0]).seconds == 0
    assert measure(work, []) == (0, 0, 0) or measure(work, []).volumes == 0


FULL = """
import resource, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from data.test_prepared import PreparedCopy, case, images
from pathlib import Path
items = [case(Path({folder!r}), f"v{{i}}", seed=i) for i in range(3)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
PreparedCopy({copy!r}, images(), {workers}).check(items)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(workers: int, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    program = FULL.format(
        root=str(tests.parent), tests=str(tests), folder=str(tmp_path / "data"),
        copy=str(tmp_path / "copy"), workers=workers,
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert "CannotWrite: prepared must be a folder that can be written, got Error" in last
    assert "free space" in last and "start again: it goes on" in last
    items = [case(tmp_path / "data", f"v{i}", seed=i) for i in range(3)]
    assert len(PreparedCopy(tmp_path / "copy", images()).check(items)) == 3


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "copy").touch()
    with pytest.raises(CannotWrite, match="can be written, got .*File exists.* in .*/copy; free"):
        PreparedCopy(tmp_path / "copy", images()).check([case(tmp_path, "v0")])


def test_a_tenth_of_broken_files_is_listed_once_and_never_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [case(tmp_path / "data", f"v{i:02}", seed=i) for i in range(20)]
    Path(items[3]["image"]).write_bytes(b"no volume")
    cut = Path(items[11]["image"])
    cut.write_bytes(cut.read_bytes()[:-200])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    copy = PreparedCopy(tmp_path / "copy", images())
    with pytest.raises(ValueError, match=r"got 2 bad of 20 .*(?s:.*)v03.nii.gz(?s:.*)v11.nii.gz"):
        copy.check(items)
    assert len(list(copy.root.glob("*/*.b2nd"))) == 18
    monkeypatch.setattr(prepared.PreparedCopy, "make", None)  # a second start makes nothing
    assert len(PreparedCopy(tmp_path / "copy", images()).sound(items, skip_bad=True)) == 18
    assert caplog.text.count("left out: ") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before


def test_a_package_that_is_missing_is_no_verdict_on_a_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from volume_writers import write_nrrd

    write_nrrd(tmp_path / "a.nrrd")
    item = {"image": str(tmp_path / "a.nrrd"), "modality": "CT"}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nrrd", None)
        with pytest.raises(ValueError, match="read with the package nrrd"):
            PreparedCopy(tmp_path / "copy", images()).check([item])
    assert PreparedCopy(tmp_path / "copy", images()).sound([item]) == [item]


def test_nothing_is_written_beside_the_volumes(tmp_path: Path) -> None:
    """As a read-only source demands: not even a file that is removed again."""
    folder = tmp_path / "data"
    items = [case(folder, f"v{i}", seed=i) for i in range(3)]
    before = {path: path.stat() for path in (folder, *folder.iterdir())}
    PreparedCopy(tmp_path / "copy", images()).check([dict(item) for item in items])
    build(tmp_path / "store").fill(items)
    manifests.split(str(folder), str(tmp_path / "lists"), test_share=0.5, seed=1)
    check_data(str(folder), None, None, str(tmp_path / "page.html"))
    for path, stat in before.items():
        now = path.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns) == (stat.st_mtime_ns, stat.st_ctime_ns), path
    assert {folder, *folder.iterdir()} == set(before)
