"""Manifests: a dataset split by patient into lists of files, by hashing, copies together."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.layouts import bids_subject, read_dataset
from med3dinsight_ext.data.patients import joined, patient_name, place
from med3dinsight_ext.data.splits import FEW
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.files import HashMemo, write_atomic
from med3dinsight_ext.io.reading import pyarrow_of

log = logging.getLogger(__name__)
LISTS, READERS = ("development", "test"), 4


def split(
    data: str, out: str, test_share: float = 0.2, seed: int = 0, hashes: str | None = None
) -> None:
    """Split a dataset by patient into development.jsonl and test.jsonl.

    A hash of the patient decides, so that new volumes move no other. Patients who share a file of
    the same content become one. Voxels are not decoded.

    Args:
        data: folder, whose labels are found as for ``plan``, or list (Decathlon JSON, JSON, JSONL,
            CSV, Parquet, npz).
        out: folder for the lists, Parquet if ``data`` is, and for the report split_report.json.
        test_share: of the patients, in (0, 1).
        seed: part of the hash.
        hashes: folder of a prepared copy or a store, whose content hashes of files are used and
            added to; by default ``out``.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {test_share}; 0.2 is a fifth")
    items, folder = datalist(data), Path(out)
    if Path(data).is_dir():
        _add_labels_and_subjects(items, Path(data))
    contents, unreadable = hashed(items, HashMemo(Path(hashes or out) / "files.jsonl"))
    items = [item for item in items if item["image"] in contents]
    given = [patient_name(item, contents[item["image"]][:32]) for item in items]
    patients = joined(given, [contents[item["image"]] for item in items])
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in LISTS}
    for item, patient in zip(items, patients, strict=True):
        lists[LISTS[place(patient, seed) < test_share]].append({**item, "patient": patient})
    if empty := [name for name in LISTS if not lists[name]]:
        raise ValueError(
            f"both lists must have patients, got none for {empty[0]} of {len(set(patients))}; "
            "choose another seed or test_share"
        )
    report = {
        "seed": seed,
        "test_share": test_share,
        "lists": {name: _counts(rows) for name, rows in lists.items()},
        "without_patient": sum(not patient_name(item, "") for item in items),
        **_copies(items, given, patients, contents),
        "unreadable": unreadable,
    }
    ending = ".parquet" if Path(data).suffix == ".parquet" else ".jsonl"
    for name, rows in lists.items():
        write_manifest(folder / f"{name}{ending}", rows)
    text = json.dumps(report, indent=1) + "\n"
    write_atomic(folder / "split_report.json", lambda draft: draft.write_text(text))
    _print(report, patients, folder)


def _add_labels_and_subjects(items: list[dict[str, Any]], folder: Path) -> None:
    """What a folder has for its images: labels, modality of dataset.json, BIDS subjects.

    Other folders may become patients, or cease to be, with new volumes.
    """
    for item in items:
        subject = bids_subject(Path(os.path.relpath(item["image"], folder)).parts)
        item |= {"patient": patient_name(item, subject)} if subject else {}
    try:
        dataset = read_dataset(folder)
    except ValueError as error:
        log.warning(f"the lists have no labels: {error}")
        return
    for note in dataset.notes:
        log.info(note)
    if dataset.names:
        log.warning(f'the lists do not name the classes: give --label_names "{dataset.names}"')
    found = {item["image"]: item for item in dataset.items}
    for item in items:
        known = found.get(item["image"], {})
        item |= {key: known[key] for key in ("label", "modality") if key in known}


def hashed(items: Sequence[dict], memo: HashMemo) -> tuple[dict[str, str], dict[str, str]]:
    """Content hash of each image, and what is wrong with those that cannot be read."""

    def content(item: dict) -> str | Exception:
        file, _, member = item["image"].partition("::")
        try:
            return memo(file) + member
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        found = list(Bar(pool.map(content, items), "Hashing volumes", len(items)))
    pairs = [(item["image"], content) for item, content in zip(items, found, strict=True)]
    bad = {image: str(content) for image, content in pairs if isinstance(content, Exception)}
    return {image: content for image, content in pairs if isinstance(content, str)}, bad


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write items as JSONL, or as Parquet by the ending."""

    def write(draft: Path) -> None:
        if path.suffix == ".parquet":
            pyarrow = pyarrow_of(path)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), draft)
        else:
            lines = (json.dumps(row, default=str) + "\n" for row in rows)
            draft.write_text("".join(lines), "utf-8")

    write_atomic(path, write)


def _counts(rows: Sequence[dict]) -> dict[str, int]:
    return {"volumes": len(rows), "patients": len({row["patient"] for row in rows})}


def _copies(
    items: Sequence[dict], given: Sequence[str], patients: Sequence[str], contents: dict[str, str]
) -> dict[str, Any]:
    """Files of the same content, and patients who became one by them."""
    same: dict[str, list[str]] = {}
    people: dict[str, set[str]] = {}
    for item, own, patient in zip(items, given, patients, strict=True):
        same.setdefault(contents[item["image"]], []).append(item["image"])
        people.setdefault(patient, set()).add(own)
    return {
        "copies": [files for files in same.values() if files[1:]],
        "joined_patients": [sorted(names) for names in people.values() if len(names) > 1],
    }


def _print(report: dict[str, Any], patients: Sequence[str], folder: Path) -> None:
    """One line on what was found, and a warning of what is no patient."""
    parts = [
        f"{name} {count['volumes']:,} of {count['patients']:,} patients"
        for name, count in report["lists"].items()
    ]
    copies = sum(len(files) - 1 for files in report["copies"])
    joins, bad = len(report["joined_patients"]), len(report["unreadable"])
    print(
        f"{len(patients):,} volumes: {', '.join(parts)}; {copies:,} copies of others; {joins:,} "
        f"patients under several names; {report['without_patient']:,} volumes without a patient, "
        f"each its own; {bad:,} unreadable, in no list; see {folder / 'split_report.json'}"
    )
    (name, most), *_ = Counter(patients).most_common(1)
    if most > len(patients) / 2 and len(patients) >= FEW:
        log.warning(f"{most} of {len(patients)} volumes have the patient {name!r}: no real one?")
