"""Progress on a terminal and in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30  # between the lines in a file


class Bar(tqdm):
    """tqdm's bar on a terminal; where standard error is a file, a plain line now and then."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            options |= {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS}
        super().__init__(*args, **options)


class _Lines:
    """Standard error, each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
