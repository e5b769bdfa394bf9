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

    The patients below ``share`` are for validation; where they show no class, or are all there is,
    the lowest one that shows a class. So new labels seldom move a case from training to validation.

    Args:
        items: with "patient" and "values", those that the label holds.
        share: of the patients, in [0, 1).

    Returns:
        Both parts. The second is empty for a share of 0, for a single patient, and where no label
        has a class, which would give every network the same score.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_split must be in [0, 1), or -1 for the bundle's own, got {share}")
    shown: set[str] = {item["patient"] for item in items if set(item["values"]) - {0}}
    order = sorted({item["patient"] for item in items}, key=place)
    held = {patient for patient in order if place(patient) < share}
    if not held & shown or len(held) == len(order):
        held = set([patient for patient in order if patient in shown][:1])
    if not share or len(order) == 1:
        held = set()
    parts: tuple[Items, Items] = ([], [])
    for item in items:
        parts[item["patient"] in held].append(item)
    if not held:
        logger.warning("no case is for validation; the last epoch is kept, whether better or not")
    return parts
