"""What a long job will cost, by the time and memory that a few volumes take."""

from __future__ import annotations

import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from med3dinsight_ext.data.prepared import PreparedCopy

log = logging.getLogger(__name__)
SAMPLE = 3  # volumes


class Rate(NamedTuple):
    """Of the volumes that were tried: how many, the median seconds and the memory of one."""

    volumes: int
    seconds: float
    gigabytes: float


def measure(work: Callable[[Any], object], items: Sequence[Any]) -> Rate:
    """Time ``work`` on a few items, evenly spaced; those that raise a ValueError do not count.

    The memory is what this process had at most beyond what it has now.
    """
    chosen = np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).round().astype(int)
    before, seconds = _resident(), []
    for i in chosen:
        begin = time.perf_counter()
        try:
            work(items[i])
        except ValueError as error:
            log.warning(f"not counted: {error}")
            continue
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # KiB on Linux
    return Rate(len(seconds), float(np.median(seconds or [0])), max(0.0, peak - before))


def _resident() -> float:
    """Gigabytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def free_gigabytes(folder: Path) -> float:
    """Free disk where a folder is, or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free / 1e9


def prepare_costs(copy: PreparedCopy, items: Sequence[dict]) -> dict[str, float]:
    """Print and return what ``copy.prepare`` would cost, from a few volumes; nothing is kept.

    Args:
        copy: to make.
        items: from ``datalist``. A volume that no run has read yet counts as missing.

    Returns:
        Numbers of ``volumes`` and ``missing`` ones; ``gigabytes`` of disk and ``hours`` for these,
        gigabytes of ``memory`` of a worker.
    """
    missing = copy.missing(items)
    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        trial = PreparedCopy(folder, copy.transforms)

        def prepare(item: dict) -> None:
            record = trial.make(item)
            if record["fault"]:
                raise ValueError(record["fault"])
            paths = [trial.path(record["entry"], key) for key in trial.keys]
            sizes.append(sum(path.stat().st_size for path in paths))

        rate = measure(prepare, missing)
    workers = max(1, copy.workers)
    found = {
        "volumes": len(items),
        "missing": len(missing),
        "gigabytes": len(missing) * float(np.mean(sizes or [0])) / 1e9,
        "hours": len(missing) * rate.seconds / workers / 3600,
        "memory": rate.gigabytes,
    }
    free = free_gigabytes(copy.root)
    print(
        f"{found['volumes']:,} volumes, {found['missing']:,} of them not in {copy.root}: about "
        f"{found['gigabytes']:.3g} GB of disk ({free:.3g} GB are free), {found['hours']:.2g} hours "
        f"with {workers} workers of {found['memory']:.2g} GB; by {rate.volumes} volumes of "
        f"{rate.seconds:.2g} s, nothing was kept"
    )
    if found["gigabytes"] > free:
        log.warning("the disk is too small for the prepared copy")
    return found
