"""Fail or kill small runs at every call that changes a file, then run them again.

python tests/hostile/faults.py all|SCENARIO[,SCENARIO] [--faults kill,ENOSPC] [--every 1]
    [--out benchmarks/results/faults.json]

A library that is loaded before libc's (faults.c, so a C compiler is needed) counts the calls below
the run's folder: files opened for writing, writes, renames, removals. For each of them and each
fault a process runs the command, and a second one runs it again without faults. Both are forked
from one that has run the command before, and write to memory (/dev/shm) where there is such a
folder, so that a try costs neither imports nor flushes of a disk. Allowed are a second run whose
results equal those of an undisturbed run, or an error whose text says what to do. ENOSPC, EROFS and
EACCES last from the chosen call on; kill writes half of the data first. benchmarks/tables.py and
tests/hostile/table.py write the pages of the results.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from scenarios import SCENARIOS, Scenario

FAULTS = ("kill", "ENOSPC", "EIO", "EINTR", "EROFS", "EACCES")
SEEN = "MED3D_FAULTS"  # path of the library, in the process that has loaded it
MEMORY = Path("/dev/shm")


class Ended(NamedTuple):
    """How a run ended: "done", "error" or "killed", the error's text, the number of calls."""

    state: str
    why: str = ""
    calls: int = 0


def library(folder: Path) -> Path:
    """Compile the library; FileNotFoundError where there is no compiler."""
    path = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(path), "-ldl"], check=True
    )
    return path


def start(
    call: Callable[[Path], Any], folder: Path, k: int = 0, fault: str = "kill", delay: float = 0.0
) -> tuple[int, int]:
    """Begin a call in a fork: its process, and a pipe that will hold how it ended.

    Args:
        call: of the folder.
        folder: whose changes are counted if the library is loaded.
        k: number of the change that fails; 0 for none.
        fault: of ``FAULTS``.
        delay: seconds before it begins.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        shim = ctypes.CDLL(os.environ[SEEN]) if SEEN in os.environ else None
        state, why = "done", ""
        time.sleep(delay)
        if shim:
            shim.fault_arm(f"{folder}/".encode(), k, getattr(errno, fault, 0))
        try:
            call(folder)
        except BaseException as error:
            state, why = "error", f"{type(error).__name__}: {_chain(error)}"[:20_000]
        calls = shim.fault_seen() if shim else 0
        os.write(write, json.dumps([state, why, calls]).encode())
        os._exit(0)
    os.close(write)
    return pid, read


def end(process: tuple[int, int]) -> Ended:
    """Wait for a call."""
    pid, read = process
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return Ended(*json.loads(text)) if text else Ended("killed")


@contextmanager
def undisturbed(name: str) -> Iterator[tuple[Scenario, Path, Callable[[], None], dict[str, Any]]]:
    """A scenario, its folder, a call that renews the folder, and the results that are wanted."""
    scenario, home = SCENARIOS[name], os.getcwd()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        work, kept = Path(place) / "work", Path(place) / "kept"

        def renew() -> None:
            shutil.rmtree(work)
            shutil.copytree(kept, work)

        work.mkdir()
        scenario.prepare(work)
        shutil.copytree(work, kept)
        scenario.run(work)  # children inherit what it imports
        gc.freeze()  # and would copy its pages to look for garbage
        os.chdir(home)
        renew()
        alone = end(start(scenario.run, work))
        if alone.state != "done":
            raise ValueError(f"{name} must run without faults, got {alone.why}")
        yield scenario, work, renew, scenario.results(work)
        gc.unfreeze()


def _chain(error: BaseException) -> str:
    texts = []
    while error is not None:
        texts.append(str(error)[:500])
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " <- ".join(texts)


def told(text: str) -> bool:
    """Whether an error says what is wrong with the disk, or what to do."""
    return any(os.strerror(getattr(errno, name)) in text for name in FAULTS[1:]) or (
        "must" in text and ";" in text
    )


def inject(
    name: str, faults: Iterable[str], every: int = 1, most: float = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Outcomes of one scenario, for each fault.

    Args:
        name: of ``SCENARIOS``.
        faults: of ``FAULTS``.
        every: which calls, 1 for all.
        most: seconds a fault, after which no further call is tried; 0 for no limit. Those that are
            tried lie in all parts of the run.
    """
    with undisturbed(name) as (scenario, work, renew, wanted):
        renew()
        calls = end(start(scenario.run, work)).calls
        for fault in faults:
            counts, open_ = Counter[str](), []
            begin = time.monotonic()
            order = sorted(range(1, calls + 1, every), key=lambda k: f"{k:016b}"[::-1])
            for k in order:  # from all parts of the run, however soon time is over
                if most and time.monotonic() - begin > most:
                    break
                renew()
                first = end(start(scenario.run, work, k, fault))
                second = end(start(scenario.run, work))
                verdict = _verdict(scenario, work, wanted, first, second)
                counts[verdict] += 1
                if verdict.startswith("OPEN"):
                    texts = {"first": first.why[-300:], "second": second.why[-300:]}  # the cause
                    open_.append({"call": k, "verdict": verdict, **texts})
            yield (
                f"{name}: {fault}",
                {
                    "calls": calls,
                    "tried": counts.total(),
                    "seconds": round(time.monotonic() - begin, 1),
                    "outcomes": dict(sorted(counts.items())),
                    "open": open_,
                },
            )


def _verdict(
    scenario: Scenario, work: Path, wanted: dict[str, Any], first: Ended, second: Ended
) -> str:
    if first.state == "error" and not told(first.why):
        return "OPEN: the first error does not say what to do"
    refused = second.state != "done"
    if refused and not told(second.why):
        return "OPEN: the second run fails"
    if not refused or first.state == "done":
        found = compared(scenario, work, wanted)
        if found != "equal":
            return found
    return "the second run says what to do" if refused else f"{first.state}, then equal"


def compared(scenario: Scenario, work: Path, wanted: dict[str, Any]) -> str:
    """What is wrong with the results, or "equal"."""
    try:
        found = scenario.results(work)
    except Exception as fault:
        return f"OPEN: results are broken: {type(fault).__name__}: {fault}"
    names = [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]
    return f"OPEN: results differ: {sorted(names)[:4]}" if names else "equal"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Parser of a command that tries scenarios."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", help="all, or names with commas: " + ", ".join(SCENARIOS))
    parser.add_argument("--out", type=Path, help="JSON file; other rows in it are kept")
    return parser


def names(given: argparse.Namespace) -> list[str]:
    """The scenarios that are asked for."""
    return list(SCENARIOS) if given.scenario == "all" else given.scenario.split(",")


def record(rows: Iterable[tuple[str, dict[str, Any]]], out: Path | None) -> int:
    """Print outcomes by name and write them as they come; 1 if one is not allowed."""
    from common import machine

    bad = 0
    for name, row in rows:
        bad += len(row["open"])
        print(f"{name}: {row['tried']} tried in {row['seconds']} s", flush=True)
        for outcome, count in row["outcomes"].items():
            print(f"    {count:>5} {outcome}", flush=True)
        for fault in row["open"][:12]:
            print(f"    {fault}", flush=True)
        if out:
            before = json.loads(out.read_text())["scenarios"] if out.exists() else {}
            here = machine()
            row |= {"commit": here["commit"]}
            text = json.dumps(here | {"scenarios": before | {name: row}}, indent=1)
            out.write_text(text.replace(sys.prefix, "PREFIX") + "\n")
    return int(bad > 0)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--most", type=float, default=0.0, help="seconds a fault")
    given = parser.parse_args()
    if SEEN not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            path = str(library(Path(folder)))
            more = {SEEN: path, "LD_PRELOAD": path, "OMP_NUM_THREADS": "1"}
            return subprocess.run(
                [sys.executable, *sys.argv], env={**os.environ, **more}
            ).returncode
    how = given.faults.split(","), given.every, given.most
    return record((row for name in names(given) for row in inject(name, *how)), given.out)


if __name__ == "__main__":
    sys.exit(main())
