"""Memory of this machine or container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def total_memory() -> int:
    """Bytes that the machine has, within the limit of its control group."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _limit() or total)


def free_memory() -> int:
    """Bytes that are not in use, within the limit of the control group."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in MEMINFO.read_text().splitlines() if MEMINFO.is_file() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _limit()
    if limit is not None:
        with suppress(OSError, ValueError):
            free = min(free, limit - int((CGROUP / "memory.current").read_text()))
    return free


def _limit() -> int | None:
    with suppress(OSError, ValueError):  # no control group, or "max"
        return int((CGROUP / "memory.max").read_text())
    return None
