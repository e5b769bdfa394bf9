"""Reading of files that may be broken or hostile: every fault is one ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.errors import first_line


@contextmanager
def readable(name: str, path: str | Path, fix: str = "repair it") -> Iterator[None]:
    """Turn whatever a library raises on a broken file into a ValueError that names the file.

    Parsers of archives, pickles and JSON each have their own errors, and raise KeyError,
    RecursionError or MemoryError on some inputs.

    Args:
        name: of the argument or file, for the message.
        path: of the file.
        fix: end of the message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # from a check of ours
        cause = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise ValueError(f"{name} must be readable, got {path}: {cause}; {fix}") from error


def parse_json(text: str) -> Any:
    """Content of a JSON text whose objects name each key once; Python's parser keeps the last.

    Raises:
        ValueError: it is not JSON, or a key occurs twice.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key occurs twice among {[key for key, _ in pairs][:10]}")
    return found


def read_json(path: str | Path, name: str, fix: str = "repair it") -> Any:
    """Content of a JSON file in UTF-8.

    Raises:
        ValueError: it is missing, not UTF-8, not JSON, or nested too deeply.
    """
    with readable(name, path, fix):
        return json.loads(Path(path).read_text("utf-8"))
