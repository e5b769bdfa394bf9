"""Fuzz the readers with seeded mutants of valid files.

python tests/hostile/fuzz.py READER|all [--minutes 30 | --inputs 100] [--out fuzz.json]

Each input is read in a worker with limits on memory and time (see ``guard``). Allowed are a value,
and a ValueError or TypeError that names the file. Anything else is kept under DIR (--keep DIR) and
makes the command fail. Minutes are those of the processor, of the reader and of making its inputs.
Runs accumulate in the file: the next one goes on with the next seeds, except that a reader with
faults begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests"),
    str(ROOT / "benchmarks"),
    str(Path(__file__).parent),
]

import mutate  # noqa: E402
from guard import MEMORY, SECONDS, Outcome, worker  # noqa: E402
from readers import READERS, Reader  # noqa: E402

ISSUE_MINUTES = 30


def verdict(reader: Reader, path: Path, found: Outcome) -> str:
    """The outcome's kind, or "unnamed" for an error that does not name the file."""
    named = (path.name if reader.named is None else reader.named) in found.text
    return "unnamed" if found.kind == "refused" and not named else found.kind


def fuzz(
    name: str, minutes: float = 0.0, inputs: int = 0, seed: int = 0, keep: Path | None = None
) -> dict[str, Any]:
    """Counts of outcomes of one reader.

    Args:
        name: of ``READERS``.
        minutes: of the processor.
        inputs: how many at least.
        seed: of the first input; the next has the next number.
        keep: folder for the inputs with a forbidden outcome, one of each.

    Returns:
        Inputs, seconds of the processor, outcomes by kind, and ``faults``: forbidden outcomes with
        a seed each.
    """
    reader, counts, faults = READERS[name], Counter[str](), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "in"
        folder.mkdir()
        path = reader.make(folder)
        sample = path.read_bytes()
        with worker(lambda text: reader.read(Path(text)), folder) as read:
            first = read(str(path))
            if first.kind != "value":
                raise ValueError(f"the sample of {name} must be readable, got {first}")
            begin = time.process_time() + read.cpu_seconds()
            seconds = 0.0
            while sum(counts.values()) < inputs or seconds < 60 * minutes:
                number = seed + sum(counts.values())
                data = mutate.mutant(sample, reader.how, number)
                path.write_bytes(data)
                found = read(str(path))
                kind = verdict(reader, path, found)
                counts[kind] += 1
                if kind not in ("value", "refused"):
                    key = f"{kind}: {found.text[-60:] if kind == 'error' else found.text[:60]}"
                    if key not in faults and len(faults) < 40:
                        faults[key] = {"seed": number, "text": found.text[:300]}
                        if keep:
                            keep.mkdir(parents=True, exist_ok=True)
                            (keep / f"{name}-{number}-{path.name}").write_bytes(data)
                seconds = time.process_time() + read.cpu_seconds() - begin
    total = sum(counts.values())
    return {
        "inputs": total,
        "seconds": round(seconds, 3),
        "per_second": round(total / seconds, 1),
        "outcomes": dict(sorted(counts.items())),
        "faults": list(faults.values()),
    }


def joined(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """Both runs of a reader as one, with the rate of the later one."""
    if not before or before["faults"]:
        return row
    outcomes = Counter(before["outcomes"]) + Counter(row["outcomes"])
    sums = {key: round(before[key] + row[key], 3) for key in ("inputs", "seconds")}
    return row | sums | {"outcomes": dict(sorted(outcomes.items()))}


def written(path: Path | None) -> dict[str, Any]:
    """The readers' rows in the results."""
    return json.loads(path.read_text())["readers"] if path and path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("reader", help="all, or names with commas: " + ", ".join(READERS))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file; other readers in it are kept")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = []
    for name in list(READERS) if given.reader == "all" else given.reader.split(","):
        path = given.out
        before = written(path).get(name)
        seed = before["inputs"] if before and not before["faults"] else 0
        row = fuzz(name, given.minutes, given.inputs, seed, given.keep)
        found.append(row)
        print(
            f"{name:<24}{row['inputs']:>8} inputs {row['per_second']:>8}/s  {row['outcomes']}",
            flush=True,
        )
        for fault in row["faults"]:
            print(f"    seed {fault['seed']}: {fault['text']}", flush=True)
        if path:
            from common import machine

            limits = {"memory_bytes": MEMORY, "seconds": SECONDS, "issue_minutes": ISSUE_MINUTES}
            rows = written(path)  # again: another reader's run may have ended meanwhile
            rows[name] = joined(before, row)
            rows = {key: {"kind": READERS[key].kind} | value for key, value in rows.items()}
            text = json.dumps(machine() | {"limits": limits, "readers": rows}, indent=1)
            path.write_text(text + "\n")
    return int(any(row["faults"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
