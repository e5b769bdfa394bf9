"""Splits: development and test lists of a split file, validation cases, subsets of cases."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from med3dinsight_ext.data.patients import patient_name, patients_of
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.reading import read_json

logger = logging.getLogger(__name__)
VAL_FRACTION, FEW = 0.2, 10  # held out by default, of at least so many cases


def split_lists(split: str | Path) -> dict[str, list[str]]:
    """The lists of ids of a split file by their names."""
    lists = read_json(split, "split", "correct it")
    if not isinstance(lists, dict):
        raise ValueError(f"split must name lists of ids, got {told(lists)} in {split}; correct it")
    return {name: ids for name, ids in lists.items() if isinstance(ids, list)}


def item_ids(item: dict, root: Path) -> set[str]:
    """What a split file may call an item: its patient, file name or a folder on its path."""
    path = Path(os.path.relpath(item["image"], os.path.abspath(root)))
    return {str(item.get("patient")), volume_stem(path), *path.parts[:-1]}


def split_items(
    items: list[dict], root: Path, split: Path, subset: str | None, whole: bool = True
) -> list[dict]:
    """The items of one list of a split file.

    Args:
        items: to choose from.
        root: folder of relative paths.
        split: file.
        subset: name of the list.
        whole: whether an id without an item is an error.
    """
    lists = split_lists(split)
    if subset not in lists:
        raise ValueError(f"subset must be one of {told(list(lists))} in {split}, got {subset!r}")
    count = Counter(id_ for ids in lists.values() for id_ in ids)
    if twice := [id_ for id_, times in count.items() if times > 1]:
        raise ValueError(f"split must name each id once, got {told(twice)} again in {split}")
    chosen, found, people = [], set(), dict[str, set[str]]()
    for item in items:
        ids = count.keys() & item_ids(item, root)
        found |= ids
        if len(homes := {name for name, members in lists.items() if ids & set(members)}) > 1:
            path = os.path.relpath(item["image"], os.path.abspath(root))
            raise ValueError(
                f"split must keep an image in one list, got {path} in {told(sorted(homes))}"
            )
        people.setdefault(patient_name(item, item["image"]), set()).update(homes)
        if subset in homes:
            chosen.append({"patient": min(ids), **item})
    if whole and (lost := sorted(count.keys() - found)):
        raise ValueError(
            f"split must name ids of the source, got {told(lost)} of {split} that match no "
            "patient, file name or folder; correct the split"
        )
    if torn := sorted(name for name, homes in people.items() if len(homes) > 1):
        logger.warning(
            f"{len(torn)} patients are in two lists of {split}, like {told(torn[0])}: scores would "
            "be of cases that the network knows; name the patients there, not their images"
        )
    return chosen


def hold_out(items: list[dict], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split items into training and validation; a patient's images stay together.

    Args:
        items: those with the same ``patient``, or the same content where it is known, are one
            patient's; without it each is its own. See ``patients_of``.
        share: of the patients to hold out, in [0, 1); rounded, at least one unless it is 0.
        seed: the same seed gives the same parts.

    Examples:
        >>> train, val = hold_out([{"image": f"{i}.nii"} for i in range(5)], share=0.2)
        >>> len(train), len(val)
        (4, 1)

    Where labels are numbers, each class keeps its share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {share}; 0 holds nothing out")
    patients = patients_of(items)
    names = sorted(set(patients))
    if len(names) < 2 and len(items) > 1 and share:
        logger.warning(
            f"nothing is held out: all {len(items)} items are of one patient, {names[0]}; write "
            "the patient of each into a list"
        )
    if len(names) < 2 or share == 0:
        return list(items), []
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held = _drawn(dict(zip(patients, items, strict=True)), names, count, seed)
    train = [item for item, name in zip(items, patients, strict=True) if name not in held]
    return train, [item for item, name in zip(items, patients, strict=True) if name in held]


def _drawn(patients: dict[str, dict], names: list[str], count: int, seed: int) -> set[str]:
    """Patients to hold out; classes keep their shares, and one with a single patient stays."""
    rows = [{"patient": name, "label": patients[name].get("label")} for name in names]
    classes = Counter[Any](row["label"] for row in rows if isinstance(row["label"], int))
    rows = [row for row in rows if classes.get(row["label"]) != 1]
    count = min(count, len(rows) - 1)
    if count < 1:
        logger.warning("nothing is held out: each class has one patient")
        return set()
    return {row["patient"] for row in take(rows, count, seed)}


def take(items: list[dict], count: int | None, seed: int = 0) -> list[dict]:
    """The first items in a seeded order: a smaller ``count`` gives a subset of a larger one.

    Classes keep their shares, and each has one item before any has two.

    Args:
        items: to choose from; kept in their order. Labels that are numbers are classes.
        count: how many, at least 1; None for all.
        seed: of the order.
    """
    if count is None or count >= len(items):
        return items
    if count < 1:
        raise ValueError(f"max_cases must be at least 1, got {count}; null takes all")
    random = [int(i) for i in np.random.RandomState(seed).permutation(len(items))]
    classes: dict[Any, list[int]] = {}
    for i in random:
        label = items[i].get("label")
        classes.setdefault(label if isinstance(label, int) else None, []).append(i)
    turn = {i: n / len(same) for same in classes.values() for n, i in enumerate(same)}
    chosen = sorted(random, key=turn.__getitem__)[:count]
    return [items[i] for i in sorted(chosen)]


def partition(
    items: list[dict], val_fraction: float | None, max_cases: int | None, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """Labelled cases for training and for validation, at most ``max_cases`` in all.

    What is held out of all items is never trained on, whatever ``max_cases`` is.

    Args:
        items: with labels.
        val_fraction: share for validation, in [0, 1). With None it is ``VAL_FRACTION``, or 0 if
            fewer than ``FEW`` cases are used or one class would be held out alone.
        max_cases: cases to use, at least 1; None for all.
        seed: of the draws.

    Raises:
        ValueError: ``val_fraction`` holds out one class alone, of which no AUROC is defined.

    >>> items = [{"image": f"{i}.nii"} for i in range(40)]
    >>> [[len(part) for part in partition(items, None, n)] for n in (None, 20, 5)]
    [[32, 8], [16, 4], [5, 0]]
    """
    share = VAL_FRACTION if val_fraction is None else val_fraction
    train, val = hold_out(
        items, share if val_fraction is not None or len(items) >= FEW else 0, seed
    )
    if max_cases is not None and max_cases < len(items):
        few = val_fraction is None and max_cases < FEW
        held = 0 if few else min(round(share * max_cases) or 1, max_cases - 1, len(val))
        train, val = take(train, max_cases - held, seed), take(val, held, seed) if held else []
    classes = {item["label"] for item in val if isinstance(item.get("label"), int)}
    if len(classes) != 1:
        return train, val
    if val_fraction is not None:
        raise ValueError(
            f"val_fraction must hold out cases of two classes, got {val_fraction}, which holds out "
            f"{len(val)} of class {min(classes)} alone; give a larger val_fraction, or "
            "val_fraction 0"
        )
    logger.warning(f"nothing is held out: validation would see class {min(classes)} alone")
    return take(items, max_cases, seed), []
