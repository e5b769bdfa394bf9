"""Classes of the segments in a label that a viewer or a DICOM segmentation numbers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from med3dinsight_ext.io.reading import readable


def class_value(segment: object, names: Sequence[str]) -> int | None:
    """Value of the class with a segment's name, whatever its capitals; None if there is none."""
    values = {name.lower(): value for value, name in enumerate(names)}
    return values.get(str(segment).strip().lower())


def named(segments: Any) -> list[dict[str, Any]] | None:
    """Segments of a request, names or mappings with a name, as mappings; None if they have none."""
    if not isinstance(segments, list):
        return None
    found = [{"name": part} if isinstance(part, str) else part for part in segments]
    return found if all(isinstance(part, dict) and "name" in part for part in found) else None


def described(segments: list[dict[str, Any]], given: Any) -> list[dict[str, Any]]:
    """Segments with what a request says beside their names: colour, description.

    Args:
        segments: with the names of classes.
        given: segments of the request, as for ``named``.
    """
    known = {str(part["name"]).strip().lower(): part for part in named(given) or ()}
    found = []
    for segment in segments:
        more = known.get(segment["name"].lower(), {})
        kept = {key: x for key, x in more.items() if key not in ("idx", "segmentAttribute")}
        found.append(kept | segment)  # those two number the segment
    return found


def renumber(label: str | Path, segments: Any, names: Sequence[str], target: Path) -> bool:
    """Write a label with the values of the classes that its segments name.

    3D Slicer numbers the segments that it saves from 1 on, in the order of its own list; the
    ``idx`` that it sends beside a name also counts segments that it does not save.

    Args:
        label: NIfTI file.
        segments: of the request, as for ``named``; the nth has the value n.
        names: of the classes; the label value is the index.
        target: NIfTI file to write.

    Returns:
        Whether the values differ; only then ``target`` is written.

    Raises:
        ValueError: a value of the label has no name, or one that is no class.
    """
    given = named(segments)
    if given is None:
        return False
    with readable("label", label):
        stored: Any = nib.load(label)
        array = np.asarray(stored.dataobj)
    values = {0: 0}
    for value in np.unique(array).tolist():
        if value == 0:
            continue
        if value not in range(1, len(given) + 1):
            raise ValueError(
                f"label_info must name every value of the label, got {len(given)} names and the "
                f"value {value:g}; send the segments in the order of their values"
            )
        name = given[int(value) - 1]["name"]
        found = class_value(name, names)
        if found is None:
            raise ValueError(
                f"segments must be classes of the model ({', '.join(names)}), got "
                f"{str(name)[:80]!r}; rename or delete that segment"
            )
        values[int(value)] = found
    if all(value == found for value, found in values.items()):
        return False
    table: np.ndarray = np.zeros(max(values) + 1, np.min_scalar_type(len(names) - 1))
    table[list(values)] = list(values.values())
    nib.save(nib.Nifti1Image(table[array.astype(int)], stored.affine), target)
    return True
