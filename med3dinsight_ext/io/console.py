"""Progress on a terminal and in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30  # between the lines in a file


class Bar(tqdm):
    """tqdm's bar on a terminal; where standard error is a file, a plain line now and then."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            options |= {"mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1}
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """How a state of the bar is written."""
        if file.isatty():
            return tqdm.status_printer(file)

        def line(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return line
