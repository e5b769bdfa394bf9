"""What is left of a file after a power cut right behind its rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import teacher, volume
from ignite.engine import Engine
from torch import nn

from evidence import results
from med3dinsight_ext.captions.answer_log import AnswerLog
from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import move, write_atomic
from med3dinsight_ext.training.checkpoints import checkpoint
from med3dinsight_ext.training.history import History


def state(path: Path | int) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is renamed and was not flushed as it is now loses its content."""
    flushed = set()

    def lose(source: Any, target: Any, really: Callable = os.replace) -> None:
        really(source, target)
        for path in (Path(target), *Path(target).rglob("*")):
            if path.is_file() and state(path) not in flushed:
                path.write_bytes(b"")

    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(state(file)))
    monkeypatch.setattr(os, "replace", lose)
    monkeypatch.setattr(os, "rename", lose)


def a_file(folder: Path) -> None:
    write_atomic(folder / "a", lambda draft: draft.write_text("x"))


def a_folder(folder: Path) -> None:
    (folder / "draft" / "deep").mkdir(parents=True)
    (folder / "draft" / "deep" / "a").write_text("x")
    move(folder / "draft", folder / "done")


def a_checkpoint(folder: Path) -> None:
    checkpoint({"model": nn.Linear(2, 1)}, folder, "model.pt")(Engine(lambda *_: None))
    assert torch.load(folder / "model.pt", weights_only=True)


def an_entry(folder: Path) -> None:
    item = volume(folder / "v.nii.gz")
    Store(folder / "store", teacher(), TemplateCaptions(), per_plane=1).fill([item])


def answers(folder: Path) -> None:
    log = AnswerLog(folder / "a.jsonl", {})
    log.answers["axial", 1] = "a mass"
    log.save()


def evidence(folder: Path) -> None:
    results.add("cpu", {"name": "a"}, folder)


def history(folder: Path) -> None:
    (folder / "history.jsonl").write_text('{"epoch": 0}\n')
    History(folder / "history.jsonl").start(Engine(lambda *_: None))


WRITERS = (a_file, a_folder, a_checkpoint, an_entry, answers, evidence, history)


@pytest.mark.parametrize("write", WRITERS)
def test_a_power_cut_leaves_no_empty_file(
    write: Callable[[Path], None], power_cut: None, tmp_path: Path
) -> None:
    write(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sizes and all(sizes.values()), sizes


def test_the_folder_is_flushed_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        os, "fsync", lambda file: seen.append((os.fstat(file).st_ino, os.listdir(tmp_path)))
    )
    a_file(tmp_path)
    assert seen[-1] == (tmp_path.stat().st_ino, ["a"])


def test_each_answer_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, flushed = AnswerLog(tmp_path / "a.jsonl", {}), []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(state(file)))
    for index in range(2):
        log.add(("axial", index), "a mass")
        assert flushed[-1] == state(log.path)


def test_a_disk_that_fails_at_the_flush_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        a_file(tmp_path)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_that_another_process_has_written_is_not_replaced(tmp_path: Path) -> None:
    for name in ("draft", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    with pytest.raises(ValueError, match=r"folder must be new, got .*there by another process; "):
        move(tmp_path / "draft", tmp_path / "there")
    assert (tmp_path / "there" / "a.txt").read_text() == "there"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    def full(draft: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.html'"):
        write_atomic(tmp_path / "a.html", full)
    with pytest.raises(OSError, match=r"No such file .*other"):
        write_atomic(tmp_path / "a.html", lambda draft: (tmp_path / "other").read_bytes())
    assert not list(tmp_path.iterdir())
