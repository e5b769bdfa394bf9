"""Files of finished runs."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from evidence import results


def add_runs(folder: Path, process: int) -> None:
    for i in range(5):
        results.add("cpu", {"name": f"run-{process}-{i}", "seconds": 0.1 * i}, folder)


def test_runs_read_back_equal_and_sorted_by_name(tmp_path: Path) -> None:
    runs = [{"name": name, "cases": [{"dice": 0.1 + 0.2, "ε": None}]} for name in ("b", "a", "c")]
    for run in runs:
        results.add("cpu", run, tmp_path)
    assert list(results.read("cpu", tmp_path)) == ["a", "b", "c"]
    assert results.read("cpu", tmp_path)["b"] == runs[0]
    assert results.budgets(tmp_path) == ["cpu"]


def test_a_file_holds_one_run_a_line_and_the_same_runs_are_the_same_bytes(tmp_path: Path) -> None:
    for folder, names in ((tmp_path / "one", "abc"), (tmp_path / "two", "cabb")):
        for name in names:
            results.add("cpu", {"name": name}, folder)
    one, two = ((tmp_path / part / "cpu.jsonl.gz").read_bytes() for part in ("one", "two"))
    assert one == two
    lines = gzip.decompress(one).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"name": name} for name in "abc"]


def test_a_budget_without_a_file_has_no_runs(tmp_path: Path) -> None:
    assert results.read("cpu", tmp_path) == {} and results.budgets(tmp_path / "none") == []
    assert results.remove("cpu", ["a"], tmp_path) == []


def test_removed_runs_are_returned_and_gone(tmp_path: Path) -> None:
    for name in "ab":
        results.add("cpu", {"name": name}, tmp_path)
    assert results.remove("cpu", ["b", "other"], tmp_path) == [{"name": "b"}]
    assert list(results.read("cpu", tmp_path)) == ["a"]


def test_runs_that_processes_add_at_once_are_all_kept(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        list(pool.map(partial(add_runs, tmp_path), range(3)))
    assert len(results.read("cpu", tmp_path)) == 15


def test_a_write_that_is_cut_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.add("cpu", {"name": "a"}, tmp_path)

    def cut(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", cut)
        results.add("cpu", {"name": "b"}, tmp_path)
    assert list(results.read("cpu", tmp_path)) == ["a"]
    results.add("cpu", {"name": "b"}, tmp_path)  # the lock is free
    assert list(results.read("cpu", tmp_path)) == ["a", "b"]


def test_a_draft_of_a_killed_process_is_no_budget(tmp_path: Path) -> None:
    results.add("cpu", {"name": "a"}, tmp_path)
    (tmp_path / ".cpu.jsonl.gz.0123").write_bytes(b"cut")
    (tmp_path / ".draft.jsonl.gz").write_bytes(b"cut")
    assert results.budgets(tmp_path) == ["cpu"]


def test_every_budget_in_the_repository_can_be_read() -> None:
    counts = {budget: len(results.read(budget)) for budget in results.budgets()}
    assert counts == {"choice": 40, "cpu": 199, "parts": 217, "pilot": 100, "schedule": 3}
