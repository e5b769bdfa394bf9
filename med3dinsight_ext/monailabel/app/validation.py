"""Which of the labelled cases a round of training is validated on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from med3dinsight_ext.data.patients import place

logger = logging.getLogger(__name__)
Items = list[dict[str, Any]]


def validation_split(items: Sequence[dict[str, Any]], share: float) -> tuple[Items, Items]:
    """Cases for training and for validation, by a hash of the patient.

    The patients below ``share`` are for validation, or the lowest one where there is none. A new
    label moves no case from training to validation, unless all patients so far are below ``share``.

    Args:
        items: with "patient" and "values", those that the label holds.
        share: of the patients, in [0, 1).

    Returns:
        Both parts. The second is empty for a share of 0, for a single patient, and where no label
        of it has a class, which would give every network the same score.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_split must be in [0, 1), or -1 for the bundle's own, got {share}")
    places = {item["patient"]: place(item["patient"]) for item in items}
    least = min(places.values())
    held = {patient for patient, found in places.items() if found <= max(share, least)}
    if len(held) == len(places) > 1:
        held = {min(places, key=places.__getitem__)}
    if not share or len(places) == 1:
        held = set()
    parts: tuple[Items, Items] = ([], [])
    for item in items:
        parts[item["patient"] in held].append(item)
    if any(set(item["values"]) - {0} for item in parts[1]):
        return parts
    why = "no label for validation has a class" if parts[1] else "no case is for validation"
    logger.warning("%s; the last epoch will be kept, whether better or not", why)
    return parts[0], []
