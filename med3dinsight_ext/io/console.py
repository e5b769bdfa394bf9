"""Progress on a terminal and in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between the lines in a file


class Bar(tqdm):
    """tqdm's bar on a terminal; where standard error is a file, a plain line every SECONDS."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            intervals = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS)
            options |= {"file": _Lines(), **intervals}  # short work writes nothing
        super().__init__(*args, **options)


class _Lines:
    """Standard error, each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
