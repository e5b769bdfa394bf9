"""One training at a time in a folder, whatever ends it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch.distributed as dist
from running import forked, trains_in

from med3dinsight_ext.io.folder_lock import NAME, only_training


def test_the_folder_is_free_again_and_empty_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "models"
    with pytest.raises(KeyError), only_training(folder):
        with only_training(tmp_path / "new" / ".." / "new" / "models"):
            assert (folder / NAME).is_file()
        with forked(lambda: pytest.raises(ValueError, only_training(folder).__enter__)):
            assert (folder / NAME).is_file()  # a refused process removes nothing
        raise KeyError
    assert not list(folder.iterdir())
    with trains_in(folder):  # and it is free for others
        pass


def test_the_error_names_folder_process_and_remedy(tmp_path: Path) -> None:
    wanted = (
        rf"got {tmp_path}, where process %d on \S+ trains; wait for its end, or name another "
        r"folder \(--out, bundle_root or ckpt_dir\)"
    )
    with trains_in(tmp_path) as holder:
        with pytest.raises(ValueError, match=wanted % holder), only_training(tmp_path):
            pass


def test_a_killed_process_holds_nothing_even_if_its_workers_live(tmp_path: Path) -> None:
    holding = only_training(tmp_path)  # ends where no name refers to it

    def hold() -> None:
        holding.__enter__()
        worker = os.fork()
        if worker == 0:
            time.sleep(600)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))

    with forked(hold):
        worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # it lives
        assert (tmp_path / NAME).is_file()
        with only_training(tmp_path):
            assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on")
        assert not (tmp_path / NAME).exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_that_its_holder_has_removed_meanwhile_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.lockf, []

    def removed(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", removed)
    with only_training(tmp_path):
        assert len(calls) == 2 and (tmp_path / NAME).is_file()


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(number: int) -> Any:
        def lockf(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        return lockf

    monkeypatch.setattr(fcntl, "lockf", fails(errno.ENOLCK))
    with only_training(tmp_path):
        assert f"{tmp_path} is on a file system without locks" in caplog.text
    monkeypatch.setattr(fcntl, "lockf", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), only_training(tmp_path):
        pass


def one_rank(rank: int, folder: Path) -> None:
    """Write what a rank of two sees in a folder that is held, and in a free one."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        with only_training(folder / "taken"):
            text = "it began"
    except ValueError as error:
        text = str(error)
    with only_training(folder / "free"):
        idist.barrier()
        text += f"; {(folder / 'free' / NAME).is_file()}"
    (folder / f"{rank}.txt").write_text(text)


def test_no_rank_waits_for_one_that_is_refused(tmp_path: Path) -> None:
    with trains_in(tmp_path / "taken"):
        first = os.fork()
        if first == 0:
            try:
                one_rank(0, tmp_path)
            finally:
                os._exit(0)
        with forked(lambda: one_rank(1, tmp_path)):
            os.waitpid(first, 0)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0].startswith("ckpt_dir must be of one training") and texts[0].endswith("; True")
    assert texts[1].startswith(f"{tmp_path / 'taken'} must be free, got an error of rank 0")
