"""One training at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ignite.distributed as idist

logger = logging.getLogger(__name__)
NAME = ".running"  # in the folder, while a training writes there
TAKEN = (errno.EACCES, errno.EAGAIN)  # by another process
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system
_held: set[tuple[int, Path]] = set()  # process and file


@contextmanager
def only_training(folder: str | Path) -> Iterator[None]:
    """Hold a folder while a training writes to it.

    Rank 0 holds a record lock (POSIX): worker processes do not inherit it, it ends with the
    process however that ends, and NFS has it too. A block within another one of the same folder
    does nothing.

    Args:
        folder: of the weights; made if there is none.

    Raises:
        ValueError: another process holds it; on all ranks.
    """
    path = Path(folder).resolve() / NAME
    key = os.getpid(), path
    if key in _held:
        yield
        return
    descriptor, error = None, None
    if idist.get_rank() == 0:
        try:
            descriptor = _locked(path)
        except (OSError, ValueError) as found:
            error = found
    if idist.all_reduce(float(error is not None)):  # no rank waits for one that has stopped
        raise error or ValueError(f"{folder} must be free, got an error of rank 0; see its message")
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """Descriptor of a file that this process has locked; None where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)  # its last holder removed it meanwhile
        except OSError as error:
            holder = os.read(descriptor, 300).decode(errors="replace")
            os.close(descriptor)
            if error.errno in TAKEN:
                raise ValueError(
                    f"ckpt_dir must be of one training at a time, got {path.parent}, where "
                    f"{holder or 'another process'} trains; wait for its end, or name another "
                    "folder (--out, bundle_root or ckpt_dir)"
                ) from None
            if error.errno not in WITHOUT_LOCKS:
                raise
            logger.warning(f"{path.parent} is on a file system without locks; train once in it")
            return None
