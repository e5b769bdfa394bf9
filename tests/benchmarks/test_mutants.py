"""Mutants of a file, and the verdict on each."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

import mutation
from mutants import mutants

SOURCE = """
LIMIT = 3

def inside(n, low=0):
    \"\"\"Docstring 1.\"\"\"
    if n < low:
        raise ValueError(f"n must be at least {low}, got {n - 0}")
    return low <= n and n * 2 < LIMIT
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text(SOURCE)
    return tmp_path / "a.py"


def test_a_mutant_differs_in_one_place(file: Path) -> None:
    found = {mutant.key for mutant in mutants(file)}
    assert {
        ": LIMIT = 3 → LIMIT = 4",
        "inside: if n < low: → if n <= low:",
        "inside: if n < low: → if not n < low:",
        "inside: raise ValueError(f'n must be at least {low}, got {n - 0}') → pass",
        "inside: 0 → 1",
        "inside: return low <= n and n * 2 < LIMIT → return None",
        "inside: low <= n and n * 2 < LIMIT → low <= n or n * 2 < LIMIT",
        "inside: low <= n and n * 2 < LIMIT → low <= n and n / 2 < LIMIT",
        "inside: low <= n and n * 2 < LIMIT → low <= n and n * 3 < LIMIT",
        "inside: low <= n and n * 2 < LIMIT → low < n and n * 2 < LIMIT",
        "inside: low <= n and n * 2 < LIMIT → low <= n and n * 2 <= LIMIT",
    } == found  # neither the message nor the docstring


def test_every_mutant_behaves_otherwise_and_the_file_stays(file: Path) -> None:
    def outcome(code: object, n: float, low: int | None) -> object:
        names: dict = {}
        exec(code, names)  # type: ignore[call-overload]
        try:
            return names["inside"](n) if low is None else names["inside"](n, low)
        except ValueError:
            return "error"

    calls = [(0, None), (0.75, None), (1, 1), (1.5, None), (1.75, 1), (2, 3), (0, 0), (-1, -1)]
    expected = [outcome(compile(SOURCE, "a.py", "exec"), *call) for call in calls]
    for mutant in mutants(file):
        assert [outcome(mutant.code, *call) for call in calls] != expected, mutant.key
    assert file.read_text() == SOURCE


def test_a_mutant_is_tried_again_when_its_own_function_changes(file: Path) -> None:
    before = {mutant.key: mutant.source for mutant in mutants(file)}
    file.write_text("# moved\n" + SOURCE.replace("LIMIT = 3", "LIMIT  =  5"))
    same = {mutant.key: mutant.source for mutant in mutants(file)}
    assert {key for key in same if same[key] == before.get(key)} == {
        key for key in before if key.startswith("inside")
    }
    file.write_text(SOURCE.replace("n * 2", "2 * n"))
    other = {mutant.key: mutant.source for mutant in mutants(file)}
    assert {key for key in other if other[key] == before.get(key)} == {": LIMIT = 3 → LIMIT = 4"}


def test_the_layout_of_a_test_does_not_count(tmp_path: Path) -> None:
    path, found = tmp_path / "test_a.py", []
    for text in ("a = (1,\n     2)\n", "a = (1, 2)  # two\n", "a = (2, 1)\n"):
        path.write_text(text)
        found.append(mutation.digest([path]))
    assert found[0] == found[1] != found[2]


def test_a_child_that_passes_survived_and_one_that_fails_or_hangs_did_not() -> None:
    assert mutation.forked(lambda: True, 60) == "survived"
    assert mutation.forked(lambda: False, 60) == "killed"
    assert mutation.forked(lambda: bool(1 / 0), 60) == "killed"
    assert mutation.forked(lambda: bool(time.sleep(60)), 0.05) == "timeout"
    assert mutation.forked(lambda: all(itertools.repeat(True)), 0.5) == "timeout"
    begin = time.monotonic()
    assert mutation.forked(lambda: not time.sleep(0.3), 0.1) == "survived"  # the machine was busy
    assert time.monotonic() - begin >= 0.3
