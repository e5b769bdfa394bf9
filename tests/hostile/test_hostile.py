"""Hostile files, answers and requests, mutants of valid files, and faults of the disk."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fuzz
import pytest
import two
from cases import CASES
from guard import Outcome, worker
from mutate import mutant, text, zipped
from readers import READERS
from running import environment
from scenarios import SCENARIOS, files
from table import PAGE, page, rows

HERE = Path(__file__).parent
INPUTS = 15  # of each reader; fuzz.py takes minutes


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes of all cases and of a few mutants for each reader, from a process of their own."""
    out = tmp_path_factory.mktemp("short") / "short.json"
    words = [sys.executable, str(HERE / "short.py"), str(out), str(INPUTS)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_ends_as_it_must(name: str, short: dict[str, Any]) -> None:
    kind, found = short["cases"][name]
    assert re.fullmatch(CASES[name].kind, kind), found
    assert re.search(CASES[name].match, found)


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused(name: str, short: dict[str, Any]) -> None:
    row = short["readers"][name]
    assert not row["faults"] and row["inputs"] == INPUTS


@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler makes the library that fails")
@pytest.mark.parametrize(("name", "every"), [("evidence", 2), ("store", 9)])
def test_faults_lose_nothing(name: str, every: int, tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "faults.py"), name, "--faults", "kill,ENOSPC"]
    words += ["--every", str(every), "--out", str(tmp_path / "found.json")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    rows = json.loads((tmp_path / "found.json").read_text())["scenarios"]
    assert list(rows) == [f"{name}: kill", f"{name}: ENOSPC"] and done.returncode == 0
    for row in rows.values():
        assert row["tried"] == len(range(1, row["calls"] + 1, every)) and not row["open"]
    assert rows[f"{name}: kill"]["outcomes"].keys() == {"killed, then equal"}


@pytest.mark.parametrize("name", ["evidence", "store"])
def test_two_processes_at_once_lose_nothing(name: str) -> None:
    row = two.race(name, delays=(0.0,))
    assert row["tried"] == 1 and not row["open"]


def test_two_trainings_are_compared_by_what_they_wrote(tmp_path: Path) -> None:
    results = files("out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "history.jsonl").write_text('{"epoch": 1, "seconds": 2.5}\n')
    first = results(tmp_path)
    assert first == {"out/history.jsonl": [{"epoch": 1}]}
    (tmp_path / "out" / "plan.yaml").write_text("a: 1")
    assert results(tmp_path).keys() == {"out/history.jsonl", "out/plan.yaml"}


def test_the_table_of_the_docs_is_that_of_the_tests() -> None:
    assert PAGE.read_text("utf-8") == page() and len(rows()) >= 60


def test_runs_of_fuzzing_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "fuzz.json"
    words = ["fuzz.py", "nifti_gz", "--inputs", "15", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fuzz.main() == 0 and fuzz.main() == 0
    row, whole = json.loads(out.read_text())["readers"][words[1]], fuzz.fuzz(words[1], inputs=30)
    assert row["inputs"] == 30 and row["kind"] == "headers" and row["outcomes"] == whole["outcomes"]
    assert 0 < row["seconds"] < 60


def test_readers_are_of_the_kinds_that_have_a_goal() -> None:
    named = "headers npz captions datalists overlays checkpoints safetensors answers clicks"
    assert {reader.kind for reader in READERS.values()} == {*named.split(), "records"}


def test_a_reader_with_faults_begins_anew() -> None:
    old = {"inputs": 9, "seconds": 1.5, "outcomes": {"value": 8, "crash": 1}, "faults": [{}]}
    new = {"inputs": 4, "seconds": 0.5, "outcomes": {"value": 4}, "faults": []}
    assert fuzz.joined(old, new) == new == fuzz.joined(None, new)
    assert fuzz.joined(new, new) == new | {"inputs": 8, "seconds": 1.0, "outcomes": {"value": 8}}


# The guard sees what it must see


def evil(name: str) -> Any:
    """Breaks one rule of the guard."""
    if name == "crash":
        os._exit(3)
    if name == "loop":
        while True:
            pass
    if name == "wait":
        return time.sleep(100)
    if name == "memory":
        return len(bytearray(4 << 30))
    if name == "write":
        return Path("/tmp/med3d_outside").write_text("x")
    if name == "program":
        return os.system("true")
    if name == "key":
        raise KeyError(name)
    return json.loads("{")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("crash", "crash"),
        ("loop", "time"),
        ("wait", "time"),
        ("memory", "error"),
        ("write", "effect"),
        ("program", "effect"),
        ("key", "error"),
        ("json", "error"),
    ],
)
def test_the_guard_sees(name: str, kind: str, tmp_path: Path) -> None:
    seconds = 0.5 if name == "wait" else 1
    with worker(evil, tmp_path, seconds=seconds) as made:
        found: Outcome = made(name)
        assert found.kind == kind and not found.allowed
        assert made("json").kind == "error"  # it goes on
        if name == "loop":
            assert 0.9 < made.cpu_seconds() < 3  # of the process that was ended, too
    Path("/tmp/med3d_outside").unlink(missing_ok=True)


@pytest.mark.parametrize("how", [text, zipped])
def test_a_mutant_depends_on_its_seed_alone(how: Any, tmp_path: Path) -> None:
    reader = READERS["weights_pt" if how is zipped else "card"]
    data = reader.make(tmp_path).read_bytes()
    first = [mutant(data, how, seed) for seed in range(20)]
    assert first == [mutant(data, how, seed) for seed in range(20)] and len(set(first)) > 15


def test_commands_that_write_have_a_scenario() -> None:
    written = {"split", "init", "pretrain", "finetune", "predict", "evaluate", "plan", "publish"}
    assert SCENARIOS.keys() >= written | {"export", "store", "answers", "prepare", "probe"}
