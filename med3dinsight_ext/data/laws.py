"""Laws that the data of a cohort must obey, and what breaks them.

A law is a function from a cohort to findings. ``LAWS`` lists all of them; ``findings`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from med3dinsight_ext.data.cohort import HU_BINS, LARGEST, Cohort, Labels, Record
from med3dinsight_ext.data.identity import STROKES
from med3dinsight_ext.data.laterality import OFFSET, SHARE, name_pairs
from med3dinsight_ext.data.likeness import FEWEST, asymmetry, near_pairs, tells

LEVELS = ("error", "warning", "note")
MIRRORED = -0.25  # likeness to the cohort's asymmetry of a volume that is suspect
OTHER_SIDE = 0.6  # of a class's usual distance from the middle; a crop may be off the centre
SPACING = 1.5  # factor from the median
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))


class Finding(NamedTuple):
    """A broken law.

    level: of ``LEVELS``.
    law: its name.
    text: what was found.
    files: names of the records.
    remedy: what to do.
    """

    level: str
    law: str
    text: str
    files: list[str]
    remedy: str


Law = Callable[[Cohort], list[Finding]]


def findings(cohort: Cohort) -> list[Finding]:
    """What breaks a law, errors first."""
    found = [finding for law in LAWS for finding in law(cohort)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def usable_files(cohort: Cohort) -> list[Finding]:
    """Every image and label can be read, and every id of the split has an image."""
    found = []
    for name, message in cohort.faults.items():
        text, _, remedy = message.rpartition("; ")
        if not text:
            text, remedy = message, "repair it, or leave it out"
        remedy = f"{remedy[:1].upper()}{remedy[1:]}."
        found.append(Finding("error", "usable files", text, [name], remedy))
    if cohort.lost:
        text = f"ids of the split match no image: {', '.join(cohort.lost[:10])}"
        found.append(Finding("error", "usable files", text, [], "Correct the split."))
    return found


def one_list_per_patient(cohort: Cohort) -> list[Finding]:
    """No patient and no image is in two lists of the split."""
    patients: dict[str, list[Record]] = {}
    for record in cohort.records:
        patients.setdefault(str(record.item.get("patient", record.name)), []).append(record)
    found = []
    for patient, records in patients.items():
        lists = {name for record in records for name in record.lists}
        if len(lists) > 1:
            text = f"patient {patient} is in {' and '.join(sorted(lists))}"
            remedy = "Keep all images of a patient in one list; scores on the others are too good."
            found.append(Finding("error", "one list per patient", text, _files(records), remedy))
    return found


def no_copies(cohort: Cohort) -> list[Finding]:
    """No two images have the same voxels."""
    same: dict[str, list[Record]] = {}
    for record in cohort.records:
        same.setdefault(record.digest, []).append(record)
    return [_copies(records, "have the same voxels") for records in same.values() if records[1:]]


def no_near_copies(cohort: Cohort) -> list[Finding]:
    """No two images of different patients are the same but for noise, scale or a mirror."""
    found = []
    for first, second, value, mirrored in near_pairs([record.grid for record in cohort.records]):
        pair = [cohort.records[first], cohort.records[second]]
        a, b = (record.item.get("patient", record.name) for record in pair)
        if pair[0].digest != pair[1].digest and a != b:
            turned = " when one is mirrored" if mirrored else ""
            found.append(_copies(pair, f"are nearly the same{turned} (correlation {value:.2f})"))
    return found


def _copies(records: Sequence[Record], text: str) -> Finding:
    lists = {name for record in records for name in record.lists}
    where = f", in {' and '.join(sorted(lists))}" if len(lists) > 1 else ""
    return Finding(
        "error" if where else "warning",
        "no copies",
        f"{len(records)} images {text}{where}",
        _files(records),
        "Remove the copies, or give them one patient and one list.",
    )


def named_values(cohort: Cohort) -> list[Finding]:
    """Every label value has a name."""
    known = range(len(cohort.names)) if cohort.names else range(LARGEST + 1)
    files: dict[str, list[str]] = {}
    for record, labels in _labelled(cohort):
        bad = [*labels.odd, *(float(n) for n in labels.voxels if n not in known)]
        for value in bad:
            files.setdefault(f"{value:g}", []).append(record.name)
    allowed = f"0 to {len(known) - 1}" if cohort.names else "whole numbers"
    remedy = "Name every value in label_names, or map the file's values."
    return [
        Finding(
            "error", "named values", f"label value {value} is not one of {allowed}", names, remedy
        )
        for value, names in files.items()
    ]


def filled_classes(cohort: Cohort) -> list[Finding]:
    """Every class has voxels; a class that nearly all labels have is in all of them."""
    rows = _labelled(cohort)
    if not rows:
        return []
    found = []
    empty = [record for record, labels in rows if not labels.voxels]
    if empty:
        remedy = "Check that the label was drawn; an empty one is right only for a healthy case."
        found.append(
            Finding("warning", "filled classes", "the label is empty", _files(empty), remedy)
        )
    marked = [(record, labels) for record, labels in rows if labels.voxels]
    for number, name in _classes(cohort):
        without = [record for record, labels in marked if number not in labels.voxels]
        if len(without) == len(marked):
            text, remedy = f"no label has the class {name}", "Correct label_names or the labels."
            found.append(Finding("error", "filled classes", text, [], remedy))
        elif without and len(without) <= (1 - SHARE) * len(marked):
            text = f"{name} is missing here, and in {len(marked) - len(without)} others it is there"
            remedy = "Check whether it was forgotten."
            found.append(Finding("warning", "filled classes", text, _files(without), remedy))
    return found


def sides(cohort: Cohort) -> list[Finding]:
    """A class that lies on one side of nearly all images lies there in each."""
    rows = _labelled(cohort)
    paired = {n for pair in name_pairs(cohort.names or ()) for n in pair}
    found = []
    for number, name in _classes(cohort):
        there = [(r, labels.offsets[number]) for r, labels in rows if number in labels.offsets]
        x = np.array([offset for _, offset in there])
        if len(x) < FEWEST or np.median(np.abs(x)) < OFFSET:
            continue
        side = 1 if (x > 0).mean() > 0.5 else -1
        if (x * side > 0).mean() < SHARE:
            continue
        bound = max(OFFSET, OTHER_SIDE * float(np.median(np.abs(x))))
        if wrong := [record for record, offset in there if offset * side < -bound]:
            here, usual = SIDES[0][::side]
            text = f"{name} lies on the {here}, in {len(there) - len(wrong)} others on the {usual}"
            remedy = "Check the header's orientation, and whether left and right are swapped."
            found.append(Finding("error", "sides", text, _files(wrong), remedy))
        if number not in paired:
            text = f"{name} lies on the {SIDES[0][side > 0]} in nearly all labels and has no pair"
            remedy = "Training leaves out left–right flips; mirror_axes [0] allows them."
            found.append(Finding("note", "sides", text, [], remedy))
    return found


def orientation(cohort: Cohort) -> list[Finding]:
    """No volume is more like the mirror image of its cohort than like the cohort.

    By ``likeness.asymmetry``, where the cohort is asymmetric enough (``likeness.tells``); at most
    ``MIRRORED`` is suspect.
    """
    found = []
    for modality, records in cohort.groups().items():
        grids = [record.grid for record in records]
        likeness = np.stack([asymmetry(grids, axis) for axis in range(3)])
        likeness[[not tells(row) for row in likeness]] = 1
        worst = likeness.argmin(0)  # the other axes of a mirrored volume may look odd too
        for axis, (low, high) in enumerate(SIDES):
            suspect = (worst == axis) & (likeness[axis] <= MIRRORED)
            if wrong := [records[i] for i in np.flatnonzero(suspect)]:
                text = f"{modality} is like the cohort with {low} and {high} exchanged"
                remedy = "Look at the image; correct its affine or reorient the voxels."
                found.append(Finding("warning", "orientation", text, _files(wrong), remedy))
    return found


def spacings(cohort: Cohort) -> list[Finding]:
    """No spacing is far from the others of its modality."""
    found = []
    for modality, records in cohort.groups().items():
        if len(records) < FEWEST:
            continue
        logs = np.log([record.spacing for record in records])
        middle = np.median(logs, 0)
        apart = np.abs(logs - middle)
        bound = np.maximum(np.log(SPACING), 5 * 1.4826 * np.median(apart, 0))
        if wrong := [r for r, far in zip(records, apart > bound, strict=True) if far.any()]:
            usual = " x ".join(f"{mm:.2f}" for mm in np.exp(middle))
            values = "; ".join(" x ".join(f"{mm:.2f}" for mm in r.spacing) for r in wrong[:3])
            text = f"{modality} with a spacing of {values} mm, usually {usual} mm"
            remedy = "Check the header; if it is right, resampling makes this case blurred or slow."
            found.append(Finding("warning", "spacings", text, _files(wrong), remedy))
    return found


def hounsfield(cohort: Cohort) -> list[Finding]:
    """CT is in Hounsfield units, and nothing else looks like CT."""
    wrong: dict[tuple[str, str, str], list[Record]] = {}
    for modality, records in cohort.groups().items():
        for record in records:
            if modality == "CT":
                fault = _hu_fault(record)
            elif _share(record, -1200, -200) > 0.05 and _share(record, -200, 200) > 0.05:
                fault = ("warning", f"{modality} has intensities like CT in HU", "Set modality.")
            else:
                fault = None
            if fault:
                wrong.setdefault(fault, []).append(record)
    return [
        Finding(level, "Hounsfield units", text, _files(records), remedy)
        for (level, text, remedy), records in wrong.items()
    ]


def _hu_fault(record: Record) -> tuple[str, str, str] | None:
    """Level, text and remedy of what is wrong with a CT's intensities."""
    if record.low >= 0 and record.high <= 255:
        return "error", "CT is scaled to a range within 0 to 255", "Use the original in HU."
    if _share(record, -4000, -200) < 1e-3:
        if _share(record, 864, 1184) > 0.05:
            return "error", "CT is offset by 1024 (water near 1024)", "Subtract 1024."
        return "note", "CT has no air", "Right for a crop inside the body, else check the units."
    # the denominator leaves out padding, which some scanners set to -2000
    if _share(record, -200, 200) < 0.06 * _share(record, -1500, 4000):
        return (
            "error",
            "CT has no soft tissue between -200 and 200 HU",
            "Check slope and intercept.",
        )
    return None


def _share(record: Record, low: float, high: float) -> float:
    """Share of the voxels with intensities in [low, high), to 32 HU."""
    inside = (HU_BINS[:-1] >= low) & (HU_BINS[:-1] < high)
    return float(record.histogram[inside].sum())


def modalities(cohort: Cohort) -> list[Finding]:
    """All volumes have one modality."""
    groups = cohort.groups()
    found = []
    if len(groups) > 1:
        text = ", ".join(f"{len(records)} {modality}" for modality, records in groups.items())
        remedy = "Right if the network is to see all of them; else leave some out."
        found.append(Finding("note", "modalities", f"several modalities: {text}", [], remedy))
    for modality, records in groups.items():
        auto = [r for r in records if r.item["modality"] == "auto" and r.guess != modality]
        if auto:
            text = f"looks like {auto[0].guess}, most others like {modality}"
            remedy = "Set modality for each item, or correct the intensities."
            found.append(Finding("warning", "modalities", text, _files(auto), remedy))
    return found


def burnt_in_text(cohort: Cohort) -> list[Finding]:
    """No corner holds bright marks that are equal in all slices."""
    wrong = [record for record in cohort.records if record.strokes >= STROKES]
    text, remedy = "possible text burnt into the slices", "Look; blank the corners before sharing."
    return [Finding("warning", "burnt-in text", text, _files(wrong), remedy)] if wrong else []


def faces(cohort: Cohort) -> list[Finding]:
    """No head shows a face."""
    wrong = [record for record in cohort.records if record.head > 0]
    text, remedy = "possible face on the surface of a head", "Deface before sharing."
    return [Finding("warning", "faces", text, _files(wrong), remedy)] if wrong else []


def _files(records: Iterable[Record]) -> list[str]:
    return [record.name for record in records]


def _labelled(cohort: Cohort) -> list[tuple[Record, Labels]]:
    return [(record, record.labels) for record in cohort.records if record.labels]


def _classes(cohort: Cohort) -> list[tuple[int, str]]:
    """Numbers and names of the classes but the background."""
    if cohort.names:
        return list(enumerate(cohort.names))[1:]
    seen = {number for _, labels in _labelled(cohort) for number in labels.voxels}
    return [(number, f"class {number}") for number in sorted(seen)]


LAWS: tuple[Law, ...] = (
    usable_files, one_list_per_patient, no_copies, no_near_copies, named_values, filled_classes,
    sides, orientation, spacings, hounsfield, modalities, burnt_in_text, faces,
)  # fmt: skip
