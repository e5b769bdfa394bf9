"""Write the table of docs/security.md from the tests' own lists.

python tests/hostile/table.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ("tests/hostile", "tests", "benchmarks", "")
sys.path[:0] = [str(ROOT / part) for part in HERE]

from cases import CASES  # noqa: E402
from faults import FAULTS  # noqa: E402
from readers import READERS  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402

PAGE = ROOT / "docs" / "security.md"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
START, END = "<!-- table: tests/hostile/table.py -->\n", "<!-- end of table -->\n"
TEST = "tests/hostile/test_hostile.py"
WHAT = {
    "kill": "is killed (kill -9) at", "ENOSPC": "finds the disk full from", "EIO": "gets EIO at",
    "EINTR": "is interrupted (EINTR) at", "EROFS": "finds the disk read-only from",
    "EACCES": "loses its permission from",
}  # fmt: skip

CLOCKS = {
    "files of 1901 to 2400, another one of the same size and time": (
        "test_another_file_with_the_same_size_and_time_is_hashed_again"
    ),
    "a store whose images lie in the past or the future": (
        "test_a_store_is_filled_once_whatever_the_time_of_its_files"
    ),
    "a clock that jumps back before a training is resumed": (
        "test_a_training_is_resumed_after_the_clock_jumped"
    ),
}


def rows() -> list[tuple[str, str, str]]:
    """Input, behaviour and test of every case, reader, and fault in results/faults.json."""
    found = []
    for name, case in CASES.items():
        behaviour = "ValueError or TypeError that names it"
        if "value" in case.kind:
            behaviour = "read; nothing runs, nothing is written elsewhere"
        found.append((case.title, behaviour, f"`test_hostile_input_ends_as_it_must[{name}]`"))
    for name in READERS:
        behaviour = "the value, or ValueError or TypeError that names the file"
        test = f"`test_mutants_are_read_or_refused[{name}]`"
        found.append((f"mutants of a valid `{name}`", behaviour, test))
    run = json.loads(RESULTS.read_text())["scenarios"]
    for name in SCENARIOS:
        for fault in (fault for fault in FAULTS if f"{name}: {fault}" in run):
            behaviour = "the next run's results equal an undisturbed run's, or it says what to do"
            short = name in ("evidence", "store") and fault in ("kill", "ENOSPC")
            test = "`test_faults_lose_nothing`" if short else "`faults.py` (nightly)"
            row = run[f"{name}: {fault}"]
            tried, calls, bad = row["tried"], row["calls"], len(row["open"])
            where = "any write" if tried == calls else f"{tried} of its {calls} writes"
            behaviour = f"OPEN: {bad} of {tried} end otherwise" if bad else behaviour
            found.append((f"`{name}` {WHAT[fault]} {where}", behaviour, test))
    for name in SCENARIOS:
        behaviour = "the results equal one run's, or an error says what to do"
        test = "`test_two_processes_at_once_lose_nothing`"
        test = test if name in ("evidence", "store") else "`two.py` (nightly)"
        found.append((f"two processes run `{name}` on one folder", behaviour, test))
    for what, test in CLOCKS.items():
        found.append((what, "as if the clock were right", f"`test_clocks.py::{test}`"))
    return found


def table() -> str:
    """The table as Markdown."""
    lines = ["| input | behaviour | test |", "|---|---|---|"]
    for row in rows():
        cells = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/security.md with the table of now."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} must have the lines {START.strip()} and {END.strip()}")
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"{len(rows())} rows in {PAGE}")
