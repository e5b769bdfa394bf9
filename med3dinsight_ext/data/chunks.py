"""Chunked, compressed arrays on disk, read by region, with a checksum for each block."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from med3dinsight_ext.io.files import write_atomic

CHUNK, BLOCK = 64, 32  # voxels a side: of what is compressed in one piece, of what is checked
FIELD = "about"


class BrokenChunks(ValueError):
    """A file of chunks is missing, cut or changed."""


class CannotWrite(ValueError):
    """The folder of a prepared copy is read-only, or its disk is full."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk and a read-only folder raise into a ``CannotWrite``."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # blosc2 has only the latter
        raise CannotWrite(
            f"prepared must be a folder that can be written, got {error} in {folder}; free space "
            "or correct its rights, and start again: it goes on with the next volume"
        ) from error


def _blosc2() -> Any:
    """An extra: published bundles do not need it, as only a prepared copy does."""
    return import_module("blosc2")


def write_chunks(
    path: Path, array: np.ndarray, about: Mapping[str, Any], low: float = 0.0, step: float = 1.0
) -> None:
    """Write an array in one step.

    Args:
        path: of the file, in Blosc2's b2nd format (zstd after a bit shuffle).
        array: (x, y, z) integers.
        about: JSON-like values and bytes to store with it.
        low: value that the integer 0 stands for.
        step: value between two integers.
    """
    blosc2 = _blosc2()
    crc = [zlib.crc32(np.ascontiguousarray(array[block])) for block in _blocks(array.shape)]
    about = {**about, "low": low, "step": step, "crc": np.array(crc, "<u4").tobytes()}

    def write(draft: Path) -> None:
        stored = blosc2.asarray(
            np.ascontiguousarray(array),
            chunks=(CHUNK,) * 3,
            blocks=(BLOCK,) * 3,
            cparams=blosc2.CParams(
                codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1
            ),
            urlpath=str(draft),
            mode="w",
        )
        stored.schunk.vlmeta[FIELD] = about

    write_atomic(path, write)


class ChunkFile:
    """An open file of ``write_chunks``.

    Raises:
        BrokenChunks: it is missing or unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        blosc2 = _blosc2()
        self.path = path
        try:
            # One thread: workers read beside each other, and threads do not survive a fork.
            self.array: Any = blosc2.open(str(path), "r", dparams=blosc2.DParams(nthreads=1))
            self.about: dict[str, Any] = self.array.schunk.vlmeta[FIELD]
            self.shape: tuple[int, ...] = self.array.shape
            self._crc = np.frombuffer(self.about["crc"], "<u4").reshape(_grid(self.shape))
        except Exception as error:  # blosc2, msgpack and numpy each have their own
            raise BrokenChunks(f"chunks must be readable, got {path}: {error}") from error

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A region as float32, zero outside the array.

        Args:
            start: first voxel along x, y, z; may be negative.
            size: voxels along x, y, z.

        Raises:
            BrokenChunks: the stored bytes have changed.
        """
        low = [max(0, a) for a in start]
        high = [min(n, a + s) for n, a, s in zip(self.shape, start, size, strict=True)]
        region: np.ndarray = np.zeros(size, np.float32)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return region
        first = [a // BLOCK for a in low]
        wide = tuple(
            slice(a * BLOCK, -(-b // BLOCK) * BLOCK) for a, b in zip(first, high, strict=True)
        )
        try:
            found = self.array[wide]
        except Exception as error:
            raise BrokenChunks(f"chunks must be readable, got {self.path}: {error}") from error
        for block in _blocks(found.shape):
            place = tuple(a + part.start // BLOCK for a, part in zip(first, block, strict=True))
            if zlib.crc32(np.ascontiguousarray(found[block])) != self._crc[place]:
                raise BrokenChunks(f"chunks must match their checksums, got {self.path}")
        inner = tuple(
            slice(a - b.start, c - b.start) for a, b, c in zip(low, wide, high, strict=True)
        )
        outer = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        region[outer] = found[inner] * np.float32(self.about["step"]) + np.float32(
            self.about["low"]
        )
        return region


def _grid(shape: Sequence[int]) -> list[int]:
    return [-(-n // BLOCK) for n in shape]


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    for place in np.ndindex(*_grid(shape)):
        yield tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in place)
