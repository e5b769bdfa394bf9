"""A store is the same, however its writers interleave and wherever they are killed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import fakes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Killed

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import HashMemo, write_atomic

VOLUMES = 3
few = settings(max_examples=max(5, settings().max_examples // 4))  # each fills stores


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("volumes")
    return [fakes.volume(folder / f"{i}.nii.gz", i) for i in range(VOLUMES)]


def writer(root: Path) -> Store:
    return Store(root, fakes.teacher(), TemplateCaptions(), per_plane=1)


def entries(root: Path) -> dict[str, str]:
    """Hash of every entry's files, by name; drafts count too."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.parent != root
    }


@pytest.fixture(scope="module")
def whole(items: list[dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("whole")
    writer(root).fill(items)
    return entries(root)


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, VOLUMES - 1)), max_size=6))
def test_any_interleaving_of_writers_gives_one_store(
    items: list[dict], whole: dict[str, str], turns: list[tuple[int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writers = [writer(Path(folder)) for _ in range(3)]
        for who, which in turns:
            writers[who].fill([items[which]])
        done = writers[0].fill(items)
        assert entries(Path(folder)) == whole
        assert [row["image"] for row in done] == [item["image"] for item in items]


@few
@given(st.integers(0, 4 * 2 * VOLUMES), st.sampled_from(["touch", "chmod", "replace", "mkdir"]))
def test_a_writer_killed_at_any_step_leaves_what_the_next_completes(
    items: list[dict], whole: dict[str, str], kill: int, step: str
) -> None:
    owner: Any = os if step == "replace" else Path
    original, calls = getattr(owner, step), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > kill:
            raise Killed
        return original(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        store = writer(root)
        patch.setattr(owner, step, dying)
        try:
            store.fill(items)
        except Killed:
            assert not any(
                name in whole and digest != whole[name] for name, digest in entries(root).items()
            )
        patch.undo()
        writer(root).fill(items)
        assert entries(root) == whole


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 5), st.integers(0, 20))
def test_a_file_holds_one_of_the_texts_written_to_it_whole(
    texts: list[bytes], kill: int, cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, expected = Path(folder) / "below" / "file", None

        def write(draft: Path, text: bytes, dies: bool) -> None:
            draft.write_bytes(text[:cut] if dies else text)
            if dies:
                raise Killed

        for i, text in enumerate(texts):
            try:
                write_atomic(path, lambda draft, t=text, d=i == kill: write(draft, t, d))
                expected = text
            except Killed:
                assert i == kill
        assert (path.read_bytes() if path.exists() else None) == expected
        assert len(list(Path(folder).rglob("file*"))) == (expected is not None)


@given(st.lists(st.integers(0, 2), max_size=8), st.integers(0, 400))
def test_a_memo_of_hashes_cut_anywhere_never_gives_a_wrong_hash(asked: list[int], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(3)]
        for i, file in enumerate(files):
            file.write_bytes(bytes([i]) * (i + 1))
        right = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        path = Path(folder) / "files.jsonl"
        memos = [HashMemo(path), HashMemo(path)]
        for i, number in enumerate(asked):
            assert memos[i % 2](files[number]) == right[number]
        if path.exists():
            path.write_bytes(path.read_bytes()[:cut])
        again = HashMemo(path)
        assert [again(file) for file in files] == right
        kept = HashMemo(path)
        assert all(kept.get(file) for file in files)
