"""Volumes at addresses are fetched once, again when they change, and faults are one line."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fakes
import fsspec
import nibabel as nib
import numpy as np
import pytest
from data.test_prepared import case, segmentation
from running import ROOT

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.labels import read_case
from med3dinsight_ext.data.prepared import PreparedCopy
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.grids import GridStore
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.io.remote import fetched, local_path, version
from med3dinsight_ext.models.teacher_classifier import TeacherFeatures
from med3dinsight_ext.training.soft_labels import SoftLabels
from med3dinsight_ext.training.volume_targets import VolumeTargets

NAMES = ["background", "organ"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MED3D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def item(tmp_path: Path) -> dict[str, Any]:
    return case(tmp_path / "data", "a")


def put(item: dict[str, Any], root: str, **options: Any) -> dict[str, Any]:
    files = fsspec.filesystem(root.partition("://")[0], **options)
    remote = dict(item)
    for key in ("image", "label"):
        remote[key] = f"{root}/{Path(item[key]).name}"
        files.put_file(item[key], remote[key])
    return remote


def same(item: dict[str, Any], remote: dict[str, Any]) -> None:
    for ours, theirs in zip(read_case(remote, NAMES), read_case(item, NAMES), strict=True):
        assert np.array_equal(ours.numpy(), theirs.numpy())
        assert np.array_equal(ours.affine, theirs.affine)


def test_an_address_in_a_list_is_read_as_the_file_is(
    item: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    remote = put(item, "memory://one")
    (tmp_path / "list.json").write_text(json.dumps([remote]))
    (listed,) = datalist(tmp_path / "list.json")
    assert listed == remote
    same(item, listed)
    assert read_volume(listed["image"]).meta["filename_or_obj"] == "memory://one/a.nii.gz"
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["a.nii.gz", "a_seg.nii.gz"]
    before = [path.stat().st_mtime_ns for path in files]
    same(item, listed)  # from the cache
    assert [path.stat().st_mtime_ns for path in files] == before


def test_an_object_that_is_replaced_is_fetched_again(item: dict[str, Any], tmp_path: Path) -> None:
    remote = put(item, "memory://two")["image"]
    memo = HashMemo(tmp_path / "files.jsonl")
    assert memo(remote) == memo(item["image"])
    other = nib.Nifti1Image(np.random.default_rng(1).random((5, 6, 7)), np.eye(4))
    nib.save(other, tmp_path / "b.nii.gz")
    fsspec.filesystem("memory").put_file(tmp_path / "b.nii.gz", remote)
    assert memo.get(remote) is None and memo(remote) == memo(tmp_path / "b.nii.gz")
    assert read_volume(remote).shape == (1, 5, 6, 7)


def test_a_copy_is_prepared_from_addresses_and_read_without_them(
    item: dict[str, Any], tmp_path: Path
) -> None:
    remote = put(item, "memory://three")
    copy = PreparedCopy(tmp_path / "copy", segmentation())
    copy.check([remote])
    local = dict(item)
    copy.check([local])
    assert remote["prepared"] == local["prepared"]  # by content


def test_what_is_gone_is_one_line_and_no_verdict(item: dict[str, Any], tmp_path: Path) -> None:
    remote = put(item, "memory://four")
    fsspec.filesystem("memory").rm(remote["image"])
    message = (
        "volume must be reachable, got FileNotFoundError: .* for memory://four/a.nii.gz; check"
    )
    with pytest.raises(ValueError, match=message) as error:
        read_volume(remote["image"])
    assert "\n" not in str(error.value)
    copy = PreparedCopy(tmp_path / "copy", segmentation())
    with pytest.raises(ValueError, match="1 bad of 1.*(?s:.*)must be reachable"):
        copy.check([remote])
    put(item, "memory://four")
    assert copy.sound([remote]) == [remote]


def test_a_broken_object_names_its_address(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("memory://five/a.nii.gz", b"no volume")
    with pytest.raises(ValueError, match="memory://five/a.nii.gz"):
        read_volume("memory://five/a.nii.gz")
    with pytest.raises(ValueError, match="one file, got memory://five/a.mhd; write it as .mha"):
        fetched("memory://five/a.mhd")


def test_an_address_of_a_folder_that_is_written_to_is_one_line(tmp_path: Path) -> None:
    features = TeacherFeatures(fakes.teacher(), (2, 2, 2), layers=["0"])
    for name, build in (
        ("prepared", lambda root: PreparedCopy(root, segmentation())),
        ("store_dir", lambda root: Store(root, fakes.teacher(), TemplateCaptions())),
        ("store_dir", lambda root: GridStore(root, fakes.teacher(), ["0"])),
        ("store_dir", lambda root: SoftLabels(root, 2, (2, 2, 2))),
        ("store_dir", lambda root: VolumeTargets(root, features, [])),
    ):
        message = f"{name} must be .* got s3://bucket/x; copy .* lines of docs/guides/scale.md"
        with pytest.raises(ValueError, match=message):
            build("s3://bucket/x")
    with pytest.raises(ValueError, match="source must be .* s3://bucket/x; name a local list"):
        datalist("s3://bucket/x")
    assert local_path("a/b", "prepared") == Path("a/b")
    assert rsync_lines()


def rsync_lines() -> list[str]:
    """The lines that copy to and from a bucket."""
    return re.findall(r"^python -c .*rsync.*", (ROOT / "docs/guides/scale.md").read_text(), re.M)


def test_a_web_server_is_read(item: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "data"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        same(item, {**item, "image": f"{root}/a.nii.gz", "label": f"{root}/a_seg.nii.gz"})
        with pytest.raises(ValueError, match="reachable, got FileNotFoundError.*/b.nii.gz; check"):
            read_volume(f"{root}/b.nii.gz")
        before, path = version(f"{root}/a.nii.gz"), tmp_path / "data" / "a.nii.gz"
        os.utime(path, (path.stat().st_mtime + 100,) * 2)  # replaced by one of the same size
        fsspec.core.url_to_fs(root)[0].invalidate_cache()
        assert version(f"{root}/a.nii.gz") != before  # by its date: this server has no ETag
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="reachable, got FileNotFoundError.*; check the address"):
        read_volume(f"{root}/c.nii.gz")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of moto's S3 server, in a process of its own."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    running = subprocess.Popen(words, stdout=quiet, stderr=quiet)
    end = time.monotonic() + 90
    while time.monotonic() < end and running.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.wait()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a filesystem on the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return {"skip_instance_cache": True}


@pytest.mark.slow
def test_volumes_on_s3_are_prepared_by_worker_processes(
    s3: dict[str, Any], item: dict[str, Any], tmp_path: Path
) -> None:
    files = fsspec.filesystem("s3", **s3)
    files.mkdir("scans")
    remote = put(item, "s3://scans/ct", **s3)
    others = [case(tmp_path / "data", f"v{i}", seed=i) for i in range(3)]
    items = [remote, *(put(other, "s3://scans/ct", **s3) for other in others)]
    (tmp_path / "list.json").write_text(json.dumps(items))
    listed = datalist(tmp_path / "list.json")
    same(item, listed[0])
    copy = PreparedCopy(tmp_path / "copy", segmentation(), workers=2)
    copy.check(listed)
    copy.check(local := [dict(i) for i in (item, *others)])
    assert [i["prepared"] for i in listed] == [i["prepared"] for i in local]


@pytest.mark.slow
def test_a_copy_and_a_store_go_through_a_bucket(
    s3: dict[str, Any],
    item: dict[str, Any],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bucket in ("volumes", "copies"):
        fsspec.filesystem("s3", **s3).mkdir(bucket)
    remote = put(item, "s3://volumes", **s3)
    folder = tmp_path / "COPY"

    def found() -> tuple[str, str]:
        (sound,) = PreparedCopy(folder, segmentation()).sound([dict(remote)])
        store = Store(folder, fakes.teacher(), TemplateCaptions(), per_plane=2)
        (filled,) = store.fill([{"image": remote["image"], "modality": "CT"}])
        return sound["prepared"], filled["targets"]

    made = found()
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push, pull = (
        line.replace("BUCKET", "copies").replace("python", sys.executable, 1)
        for line in rsync_lines()
    )
    subprocess.run(["bash", "-c", push], cwd=tmp_path, check=True)
    shutil.rmtree(folder)
    shutil.rmtree(cache)
    subprocess.run(["bash", "-c", pull], cwd=tmp_path, check=True)
    assert files == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found() == made and not cache.exists()  # no volume is fetched again


@pytest.mark.slow
def test_a_bucket_that_is_gone_and_wrong_credentials_are_one_line(
    s3: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"s3://nowhere/{i}.nii.gz"} for i in range(100)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(
        ValueError, match="got FileNotFoundError: .* for s3://nowhere/0.nii.gz; chec"
    ):
        datalist(tmp_path / "list.json")
    for name in ("_info", "_ls"):
        monkeypatch.setattr(f"s3fs.S3FileSystem.{name}", refuse)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # a kept one is bound to the methods before
    with pytest.raises(
        ValueError, match="got PermissionError: Forbidden for s3://nowhere/0"
    ) as err:
        datalist(tmp_path / "list.json")
    assert "\n" not in str(err.value) and str(err.value).endswith("bucket and the credentials")


async def refuse(*_: Any, **__: Any) -> None:
    """What s3fs makes of a server's 403: moto's server takes any credentials."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    raise translate_boto_error(ClientError({"Error": {"Code": "403", "Message": "Forbidden"}}, "H"))
