"""Whether scored cases are those of the training, those of its validation, or others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from med3dinsight_ext.training.provenance import UNLABELLED, case_memo, image_key
from med3dinsight_ext.training.record import EARLIER, record_of, weights_hash

TRAINED, HELD, OTHERS = "training", "validation", "others"
KNOWN = (TRAINED, HELD)
# Cases that a record has hashes of. What a mean teacher learns from without labels is trained on.
PARTS = {TRAINED: TRAINED, UNLABELLED: TRAINED, HELD: HELD}


def scored(images: Iterable[str], weights: str | Path | None) -> dict[str, Any]:
    """What scores are of: ``cases_from`` by ``origin``, ``weights_sha256`` by ``state_hash``.

    Args:
        images: as for ``origin``.
        weights: model.pt of the network, beside its run.json; None if it is not known.
    """
    record = record_of(weights) if weights is not None else {}
    known = record.get("weights_sha256", {}).get("model.pt")  # compared with the file, once
    return {
        "cases_from": origin(images, record, Path(str(weights)).parent),
        "weights_sha256": known or weights_hash(weights),
    }


def origin(images: Iterable[str], record: Mapping[str, Any], folder: Path) -> dict[str, int] | None:
    """Number of scored images that a network was trained on, validated on, and has never had.

    Images are compared by the content of their files, so a copy counts and a resampled one does
    not. Those of the rounds before, in incremental training, and those that a training had before
    it was resumed with others count too; those of pre-training do not.

    Args:
        images: files, or members of an .npz.
        record: of its training, from ``record_of``.
        folder: of its weights, as for ``case_memo``.

    Returns:
        ``{"training": n, "validation": n, "others": n}``; None if the record is
        empty, damaged, or of a version that did not keep images.
    """
    known: dict[str, set[str]] = {name: set() for name in KNOWN}
    try:
        rounds = (row["data"] for row in record.get("rounds", ()))
        for data in (record["data"], *record.get(EARLIER, ()), *rounds):
            for name in {TRAINED, *data} & {*PARTS}:
                known[PARTS[name]] |= set(data[name]["images"].split())
    except (KeyError, TypeError, AttributeError):
        return None
    memo = case_memo(folder)
    keys = [image_key(image, memo) for image in images]
    trained = sum(key in known[TRAINED] for key in keys)
    held = sum(key in known[HELD] - known[TRAINED] for key in keys)
    return {TRAINED: trained, HELD: held, OTHERS: len(keys) - trained - held}


def without_images(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record by which nobody can tell whether an image that they have was trained on."""

    def stripped(data: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            name: {k: v for k, v in part.items() if k != "images"} if name in PARTS else part
            for name, part in (data or {}).items()
        }

    rounds = [{**row, "data": stripped(row.get("data"))} for row in record.get("rounds", ())]
    found = {**record, "data": stripped(record.get("data")), "rounds": rounds}
    if EARLIER in record:
        found[EARLIER] = [stripped(data) for data in record[EARLIER]]
    return found


def origin_text(found: Mapping[str, int] | None) -> str:
    """Sentence about ``origin``'s result."""
    if found is None:
        return "Whether the network was trained on these cases is not recorded."
    count = sum(found.values())
    if found[TRAINED]:
        return (
            f"Of the {count} cases the network was trained on {found[TRAINED]}: no measure of "
            "what it does on others."
        )
    if found[HELD]:
        return (
            f"Of the {count} cases {found[HELD]} were held out for validation, which also chose "
            "the epoch; none was trained on."
        )
    return f"Of the {count} cases none was used for training or validation."
