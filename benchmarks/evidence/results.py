"""Finished runs of a budget: ``results/BUDGET.jsonl.gz``, one run a line, sorted by name.

A file is replaced as a whole and under a lock on its folder, so a killed process leaves the file as
it was and several processes may add to it. ``zcat results/cpu.jsonl.gz | head -1`` shows a run.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import readable

RESULTS = Path(__file__).parent / "results"
SUFFIX = ".jsonl.gz"
Record = dict[str, Any]


def budgets(folder: Path = RESULTS) -> list[str]:
    """Names of the budgets that have runs, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"[!.]*{SUFFIX}"))


def read(budget: str, folder: Path = RESULTS) -> dict[str, Record]:
    """The runs of a budget by name, sorted; empty if there are none."""
    path = folder / f"{budget}{SUFFIX}"
    if not path.exists():
        return {}
    with readable("runs", path, "take the committed file"):
        records = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
        return {record["name"]: record for record in records}


def add(budget: str, record: Record, folder: Path = RESULTS) -> None:
    """Add a run, in place of one of the same name."""
    _update(budget, folder, lambda records: records.update({record["name"]: record}))


def remove(budget: str, names: Iterable[str], folder: Path = RESULTS) -> list[Record]:
    """Remove the runs of these names; those that were there."""
    removed: list[Record] = []
    if (folder / f"{budget}{SUFFIX}").exists():
        _update(
            budget,
            folder,
            lambda records: removed.extend(records.pop(name) for name in names if name in records),
        )
    return removed


def _update(budget: str, folder: Path, change: Callable[[dict[str, Record]], None]) -> None:
    with _locked(folder):
        records = read(budget, folder)
        change(records)
        text = "".join(json.dumps(records[name]) + "\n" for name in sorted(records))
        content = gzip.compress(text.encode(), mtime=0)  # the same runs are the same bytes
        write_atomic(folder / f"{budget}{SUFFIX}", lambda draft: draft.write_bytes(content))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it if the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
