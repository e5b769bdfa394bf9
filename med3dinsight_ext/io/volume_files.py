"""Which files are volumes, and which files a volume consists of: by names, without reading them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
DICOM_ENDINGS = (".dcm", ".ima")
NEVER_DICOM = (*VOLUME_ENDINGS, ".csv", ".html", ".jpg", ".json", ".jsonl", ".md", ".npz", ".pdf",
               ".png", ".py", ".raw", ".tsv", ".txt", ".xml", ".yaml", ".zip", ".zraw",
               "dicomdir")  # fmt: skip
DATA_FILE = re.compile(rb"^ElementDataFile[ \t]*=(.*)$", re.MULTILINE)
LOOKED_AT = 20  # files of a folder, of unknown kinds
MHD_HEADER = 2**16  # bytes; a header has a few hundred


def find_volumes(root: Path) -> list[Path]:
    """Files with one of ``VOLUME_ENDINGS`` and folders with a DICOM series, sorted; none hidden.

    DICOM files beside other volumes are left out: they are often what these were converted from.
    """
    found = []
    for folder, names in _folders(root):
        shown = sorted(name for name in names if name[0] != ".")
        files = [Path(folder, name) for name in shown if name.endswith(VOLUME_ENDINGS)]
        found += files or ([Path(folder)] if _holds_series(folder, shown) else [])
    return sorted(path for path in found if path.exists())  # a link may lead nowhere


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders with the names of their files: first all in ``root``, then where links lead.

    No folder comes twice, and none that ``root`` lies in.
    """
    seen, above = set[str](), {str(path) for path in Path(os.path.realpath(root)).parents}
    waiting = [str(root)]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(folder)) in seen or real in above:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            paths = (os.path.join(folder, name) for name in folders)
            waiting += filter(os.path.islink, paths)
            yield folder, names


def _holds_series(folder: str, names: Sequence[str]) -> bool:
    """Whether a name ends as DICOM's do, or one of the first files of no other kind begins so."""
    if any(name.lower().endswith(DICOM_ENDINGS) for name in names):
        return True
    other = (name for name in names if not name.lower().endswith(NEVER_DICOM))
    return any(is_dicom(os.path.join(folder, name)) for name in islice(other, LOOKED_AT))


def is_dicom(path: str) -> bool:
    """Whether a file is DICOM, by its ending or its first bytes."""
    if not os.path.isfile(path) or path.lower().endswith(NEVER_DICOM):
        return False
    if path.lower().endswith(DICOM_ENDINGS):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def iterate_series(folder: str) -> Iterator[str]:
    """The DICOM files of a folder, sorted by name; not those of folders in it."""
    paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name[0] != ".")
    return filter(is_dicom, paths)


def series_files(folder: str) -> list[str]:
    """The list of ``iterate_series``."""
    return list(iterate_series(folder))


def files_of(path: str) -> list[str]:
    """All files that a volume consists of: several for a DICOM series, .mhd, and .hdr."""
    if os.path.isdir(path):
        return series_files(path) or [path]
    if path.endswith(".hdr"):
        voxels = path.removesuffix("hdr") + "img"
        return [path, voxels] if os.path.isfile(voxels) else [path]
    if path.endswith(".mhd") and os.path.isfile(path):
        with open(path, "rb") as file:
            named = DATA_FILE.search(file.read(MHD_HEADER))
        name = os.fsdecode(named.group(1).strip()) if named else ""
        beside = os.path.join(os.path.dirname(path), name)
        if name and os.path.basename(name) == name and os.path.isfile(beside):
            return [path, beside]
    return [path]


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def real_path(path: str) -> str:
    """``os.path.realpath``, which looks at each folder of a path anew for each file."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else f"{_real_folder(folder)}/{name}"
