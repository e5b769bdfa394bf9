"""Atomic files and cached content hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any
from uuid import uuid4

from med3dinsight_ext.io.reading import whole_lines
from med3dinsight_ext.io.remote import fetched, is_remote, version
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS, files_of

logger = logging.getLogger(__name__)


def volume_stem(path: str | Path) -> str:
    """Name of a volume's file or folder without the folders above and ``VOLUME_ENDINGS``."""
    name = Path(path).name
    return next((name.removesuffix(end) for end in VOLUME_ENDINGS if name.endswith(end)), name)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def key_of(parts: Any) -> str:
    """Hash of a JSON value, to name a file by all that it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def keyed_path(folder: Path, parts: Any, ending: str) -> Path:
    """``folder/ab/abcd….ending``, by the ``key_of`` its parts."""
    key = key_of(parts)
    return folder / key[:2] / f"{key}{ending}"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(draft: Path, path: Path) -> None:
    """Flush a file, or a folder with its files, to the disk and rename it in one step.

    Without the flush a power cut may leave the new name with an empty file.

    Raises:
        ValueError: another process has written a folder of that name meanwhile.
    """
    for part in (*draft.rglob("*"), draft):
        sync(part)
    try:
        os.replace(draft, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ValueError(
            f"folder must be new, got {path} by another process; choose another"
        ) from (error)
    with suppress(OSError):  # some network file systems flush no folders
        sync(path.parent)


def write_atomic(path: Path, write: Any, ending: str = "") -> None:
    """Call ``write(draft)`` on a name beside ``path``, then ``move`` it there.

    Args:
        path: of the file.
        write: called with the draft's path.
        ending: of the draft, for writers that take the format from it. Readers of folders could
            take what a killed process left of such a draft for a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}{ending}")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # safetensors would leave it to the owner alone
        write(draft)
        draft.chmod(mode)
        move(draft, path)
    except OSError as error:
        unnamed = error.filename is None and error.errno is not None
        if unnamed or Path(str(error.filename)) == draft:
            error.filename = str(path)  # which a write to a full disk does not name
        raise
    finally:
        draft.unlink(missing_ok=True)


class HashMemo:
    """Content hashes of files, cached by path, size and times of change.

    The time of the last write can be set, and archives often set one for all their files; that of
    the last change of the file's entry on the disk cannot.

    Args:
        path: JSONL file; each hash is written there at once, as hashing many scans takes hours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, int, int], str] = {}
        self._warned = False
        for row in whole_lines(path):
            if isinstance(row, list) and [type(x) for x in row] == [str, int, int, str]:
                self._known[row[0], row[1], row[2]] = row[3]

    def get(self, file: str | Path) -> str | None:
        """The hash if it is cached."""
        return self._known.get(_identity(file))

    def content(self, image: str) -> list[str]:
        """Hash of an image's file, and its member of an archive: ``file.npz::array::index``."""
        file, _, member = image.partition("::")
        return [self(file), member]

    def __call__(self, file: str | Path) -> str:
        key = _identity(file)
        if key not in self._known:
            files = files_of(fetched(str(file)))
            found = sorted(sha256(Path(part)) for part in files)  # whatever slices are called
            together = hashlib.sha256("".join(found).encode()).hexdigest()
            self._known[key] = found[0] if len(found) == 1 else together
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as memo:
                    memo.write("\n" + json.dumps([*key, self._known[key]]))
            except OSError as error:  # a read-only store
                if not self._warned:
                    logger.warning(f"hashes of files are not cached: {error}")
                self._warned = True
        return self._known[key]


def _identity(file: str | Path) -> tuple[str, int, int]:
    """Absolute path, size and time of change; of several files their sum and a hash of all."""
    if is_remote(file):
        size, digest = version(str(file))
        return str(file), size, int(digest[:15], 16)
    path = os.path.abspath(file)
    try:
        stat = os.stat(file)
        if S_ISREG(stat.st_mode) and not str(file).endswith((".mhd", ".hdr")):  # of many
            return path, stat.st_size, stat.st_mtime_ns + stat.st_ctime_ns
        files = files_of(str(file))
        stats = [os.stat(part) for part in files]
        if not all(S_ISREG(stat.st_mode) for stat in stats):
            raise OSError("a pipe or device")  # would be read without an end
    except OSError as error:
        raise ValueError(f"image must be a file, got {file}; correct the datalist") from error
    sizes = [stat.st_size for stat in stats]
    changed = [stat.st_mtime_ns + stat.st_ctime_ns for stat in stats]
    text = repr(list(zip(files, sizes, changed, strict=True)))
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return path, sum(sizes), int(digest[:15], 16)
