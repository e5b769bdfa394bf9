"""Reading of files that may be broken or hostile: every fault is one ValueError."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from med3dinsight_ext.io.errors import first_line, told
from med3dinsight_ext.io.packages import NotHere

COLUMNS = ("image", "label", "patient", "modality")  # of a list of volumes
LONGEST_LINE = 10_000_000  # characters; no row of an image or a caption is as long


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
        ValueError: it is missing, not UTF-8, not JSON, nested too deeply, or a key occurs twice.
    """
    with readable(name, path, fix):
        return parse_json(Path(path).read_text("utf-8"))


def whole_lines(path: Path) -> Iterator[Any]:
    """JSON values in the lines of a log; one that a kill or a full disk cut short is skipped."""
    # As bytes: a line may be cut within a letter, and texts may hold odd line separators.
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Rows of a JSONL, CSV or Parquet file, each after its place: ("a.jsonl line 3", row)."""
    path = Path(path)
    if path.suffix == ".parquet":
        pyarrow = pyarrow_of(path)
        with readable("source", path):
            rows = pyarrow.parquet.read_table(path).to_pylist()
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", {key: x for key, x in row.items() if x is not None}
        return
    with readable("source", path), open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictReader(_lines(file, path))
            table.fieldnames = _columns(table.fieldnames or (), path)
            for row in table:
                where = f"{path} line {table.line_num}"
                if any(row.pop(None, ())):  # empty cells at the end are Excel's
                    raise ValueError(
                        f"{where} must have {len(table.fieldnames or ())} cells, got more; put "
                        "texts with commas into double quotes"
                    )
                yield where, row
            return
        for number, line in enumerate(_lines(file, path), 1):
            where = f"{path} line {number}"
            try:
                row = parse_json(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} must be JSON, got {error}; correct it") from error
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"{where} must be a JSON object, got {told(row)}; correct it")
            if row:
                yield where, row


def _columns(written: Sequence[str], path: Path) -> list[str]:
    """Names of a table's columns without blanks around them.

    Raises:
        ValueError: one occurs twice, or is one of ``COLUMNS`` in capitals.
    """
    names = [name.strip() for name in written]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"columns must have different names, got {twice} twice in {path}; rename")
    for name in names:
        if name.lower() in COLUMNS and name not in COLUMNS:
            raise ValueError(
                f"columns must be written {', '.join(COLUMNS)}, got {name} in {path}; rename it"
            )
    return names


def pyarrow_of(path: Path) -> Any:
    """The package that reads and writes Parquet, which no extra installs.

    Raises:
        NotHere: it is not installed.
    """
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise NotHere(
            f"{path} must be read and written by pyarrow, got none; pip install pyarrow, or use "
            "JSONL"
        ) from error


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Lines of a text file, none of which fills the memory."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"lines must have at most {LONGEST_LINE} characters, got a longer one in {path}; "
                "write one row a line"
            )
        yield line
