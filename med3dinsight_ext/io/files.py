"""Files that appear whole or not at all, and content hashes that are remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from stat import S_ISREG
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, write: Any) -> None:
    """Call ``write(draft)`` on a name beside ``path``, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # safetensors would leave it to the owner alone
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class HashMemo:
    """Content hashes of files, remembered by path, size and time of change.

    Args:
        path: JSONL file; each hash is written there at once, for hashing many scans takes hours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, int, int], str] = {}
        self._warned = False
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                name, size, mtime, digest = json.loads(line)
            except (ValueError, TypeError, RecursionError):  # a line cut by a full disk
                continue
            if [type(x) for x in (name, size, mtime, digest)] == [str, int, int, str]:
                self._known[name, size, mtime] = digest

    def knows(self, file: str | Path) -> bool:
        """Whether the file need not be read."""
        return _identity(file) in self._known

    def __call__(self, file: str | Path) -> str:
        key = _identity(file)
        if key not in self._known:
            self._known[key] = sha256(Path(file))
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as memo:
                    memo.write("\n" + json.dumps([*key, self._known[key]]))
            except OSError as error:  # a store that may only be read
                if not self._warned:
                    logger.warning(f"hashes of files are not remembered: {error}")
                self._warned = True
        return self._known[key]


def _identity(file: str | Path) -> tuple[str, int, int]:
    try:
        stat = os.stat(file)
        if not S_ISREG(stat.st_mode):
            raise OSError("a pipe or device")  # would be read without an end
    except OSError as error:
        raise ValueError(f"image must be a file, got {file}; correct the datalist") from error
    return os.path.abspath(file), stat.st_size, stat.st_mtime_ns
