"""The patient of each volume, one for all patients who share a copy."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from med3dinsight_ext.io.dicom import series_header
from med3dinsight_ext.io.volume_files import VOLUME_ENDINGS

log = logging.getLogger(__name__)
MISSING = ("na", "n/a", "nan")  # texts of tables that stand for nothing
CONTENT = ("content", "targets", "prepared", "grids")  # a volume's hash, or entries named by it


def joined(names: Sequence[str], contents: Sequence[str | None]) -> list[str]:
    """Patient of each volume; patients with a volume of the same content become one.

    Args:
        names: of the patients, one for each volume.
        contents: hash of each volume, None where it is not known.

    Returns:
        For each volume the least name among the patients that are joined.

    Examples:
        >>> joined(["b", "a", "c", "b"], ["1", "1", "2", "3"])
        ['a', 'a', 'c', 'a']
    """
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[str, str] = {}
    for name, content in zip(names, contents, strict=True):
        if content is not None:
            low, high = sorted((root(name), root(first.setdefault(content, name))))
            parent[high] = low
    return [root(name) for name in names]


def patient_name(item: dict[str, Any], default: str) -> str:
    """The ``patient`` of an item; tables have an empty text or NA where there is none."""
    given = item.get("patient")
    name = "" if given is None else str(given).strip()
    return default if not name or name.lower() in MISSING else name


def name_series(items: Sequence[dict[str, Any]]) -> None:
    """Give DICOM series the patient and modality of their header, where the item has none."""
    for item in items:
        known = patient_name(item, ""), item.get("modality") != "auto"
        if all(known) or item["image"].endswith(VOLUME_ENDINGS):
            continue
        patient, modality = series_header(item["image"])
        item |= {"patient": patient} if patient and not known[0] else {}
        item |= {"modality": modality} if modality and not known[1] else {}


def patients_of(items: Sequence[dict[str, Any]]) -> list[str]:
    """Patient of each item, without one its ``image``; copies by ``CONTENT`` have one patient."""
    names = [patient_name(item, item["image"]) for item in items]
    contents = [next((item[key] for key in CONTENT if key in item), None) for item in items]
    known = [content for content in contents if content is not None]
    if copies := len(known) - len(set(known)):
        log.info(f"{copies} of {len(items)} volumes are copies of others; they stay in one part")
    return joined(names, contents)


def place(patient: str, seed: int = 0) -> float:
    """A patient's place in [0, 1): a hash, which other patients do not change.

    Examples:
        >>> 0 <= place("P1") < 1 and place("P1") == place("P1") != place("P1", seed=1)
        True
    """
    text = f"{seed} {patient}".encode("utf-8", "backslashreplace")
    return int(hashlib.sha256(text).hexdigest()[:13], 16) / 16**13
