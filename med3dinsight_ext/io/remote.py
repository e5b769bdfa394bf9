"""Addresses such as s3://bucket/a.nii.gz: fsspec fetches volumes once into a local folder."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.io.packages import NotHere, package

COPY = "copy to and from there with the lines of docs/guides/scale.md"
VERSION = (
    "size",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modified",
    "Content-MD5",
    "mtime",
    "created",
    "generation",
)


def is_remote(path: object) -> bool:
    """Whether a path is an address, as s3://bucket/a.nii.gz is."""
    return "://" in str(path)


def local_path(path: str | Path, name: str, remedy: str = COPY) -> Path:
    """A path that is no address; pathlib takes one for a folder named ``s3:``.

    Args:
        path: to check.
        name: of its key, for the message.
        remedy: for the message.

    Raises:
        ValueError: it is an address.
    """
    if is_remote(path):
        raise ValueError(f"{name} must be a path on this machine, got {path}; {remedy}")
    return Path(path)


def cache_folder() -> Path:
    """Where fetched volumes stay: the environment variable MED3D_CACHE, or a folder of the user."""
    return Path(os.environ.get("MED3D_CACHE") or Path.home() / ".cache" / "med3dinsight")


def version(url: str) -> tuple[int, str]:
    """Size in bytes, and a hash of what the server tells of an object's version.

    Raises:
        NotHere: the object, bucket or server is gone, or refuses the credentials.
    """
    fsspec = package("fsspec", url, "remote")
    try:
        files, path = fsspec.core.url_to_fs(url)
        _list_folder(str(files.protocol), url.rpartition("/")[0], os.getpid())
        about = files.info(path)
    except Exception as error:  # each protocol has its own
        raise _gone(url, error) from error
    told = {key: str(about[key]) for key in VERSION if about.get(key) is not None}
    text = json.dumps([url, told], sort_keys=True)
    return int(about.get("size") or 0), hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4096)
def _list_folder(protocol: str, folder: str, process: int) -> None:
    """List an object store's folder once a process: fsspec then has the facts of all in it."""
    if "http" in protocol:  # whose lists are pages
        return
    files, path = package("fsspec", folder).core.url_to_fs(folder)
    files.ls(path, detail=True)


def fetched(path: str) -> str:
    """A local file with the content of an address; a local path itself.

    Another version of an object is another file; earlier ones stay.

    Raises:
        NotHere: as ``version``.
    """
    if not is_remote(path):
        return path
    if path.endswith(".mhd"):
        raise NotHere(f"volume must be one file, got {path}; write it as .mha")
    _, digest = version(path)
    local = cache_folder() / digest[:2] / digest / Path(path).name
    if not local.exists():
        from med3dinsight_ext.io.files import write_atomic  # which looks at versions itself

        try:
            files, name = package("fsspec", path).core.url_to_fs(path)
            write_atomic(local, partial(_get, files, name))
        except Exception as error:
            raise _gone(path, error) from error
    return str(local)


def _get(files: Any, name: str, draft: Path) -> None:
    files.get_file(name, str(draft))


def check_servers(urls: list[str]) -> None:
    """Ask each bucket or server for one of its objects, before all are asked one by one.

    Raises:
        NotHere: as ``version``; the object alone may be gone.
    """
    first: dict[str, str] = {}
    for url in urls:
        first.setdefault("/".join(url.split("/", 3)[:3]), url)
    for url in first.values():
        version(url.partition("::")[0])


def _gone(url: str, error: Exception) -> NotHere:
    return NotHere(
        f"volume must be reachable, got {type(error).__name__}: {first_line(error)[:200]} for "
        f"{url}; check the address, the bucket and the credentials"
    )
