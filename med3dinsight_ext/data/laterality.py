"""Laterality: which classes swap when a volume is mirrored left–right, and whether it may be."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from monai.config import KeysCollection
from monai.transforms import Flip, MapTransform, RandomizableTransform
from torch import Tensor

from med3dinsight_ext.io.images import open_volume, ras_array
from med3dinsight_ext.io.reading import readable

logger = logging.getLogger(__name__)
LEFT_RIGHT = 0  # spatial axis after orientation to RAS
LEFT = {"left", "links", "linke", "linker", "linkes", "gauche", "izquierda", "izquierdo",
        "sinistra", "sinistro", "sinister", "l", "lt", "lh"}  # fmt: skip
RIGHT = {"right", "rechts", "rechte", "rechter", "rechtes", "droite", "droit", "derecha",
         "derecho", "destra", "destro", "dexter", "dextra", "r", "rt", "rh"}  # fmt: skip
HEART = re.compile(r"atri(um|a|al)|auric|ventric|herzkammer|vorhof")  # no mirror images
SHORT = {"l", "lt", "lh", "r", "rt", "rh"}  # name a side only if the other side is named alike
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-zà-ÿ]+|\d+")
CASES = 20  # labels that are measured
SHARE = 0.9  # of the cases with the class on one side
OFFSET = 0.05  # median distance from the middle, as a fraction of the extent
Pair = tuple[int, int]


class Mirror(NamedTuple):
    """How a volume of these classes may be mirrored.

    axes: spatial axes (0 x, 1 y, 2 z) that training may flip.
    pairs: class indices that swap when axis 0 is flipped.
    reason: one line for the log.
    """

    axes: tuple[int, ...]
    pairs: tuple[Pair, ...]
    reason: str

    def allowed(self, axes: Sequence[int]) -> list[int]:
        """The axes of ``axes`` along which a flip keeps the meaning of each class."""
        if LEFT_RIGHT in axes and LEFT_RIGHT not in self.axes:
            logger.info(f"tta_axes {list(axes)} without {LEFT_RIGHT}: {self.reason}")
        return [axis for axis in axes if axis != LEFT_RIGHT or LEFT_RIGHT in self.axes]


def side_words(name: str) -> tuple[int, tuple[str, ...]]:
    """The side that a class name gives (-1 left, 1 right, 0 none) and its other words, sorted."""
    words = [word.lower() for word in WORDS.findall(name)]
    left, right = ([word for word in words if word in side] for side in (LEFT, RIGHT))
    side = bool(right) - bool(left)
    rest = [word for word in words if not side or word not in LEFT | RIGHT]
    return side, tuple(sorted(rest))


def name_pairs(names: Sequence[str]) -> list[Pair]:
    """Classes whose names differ in the side alone: "kidney_left" and "kidney_right".

    Args:
        names: of all classes; the index is the class.

    Returns:
        Pairs (left, right) in the order of the left ones. Of several classes with one side and
        the same other words, none is paired; nor are the chambers of the heart, which no mirror
        turns into each other. Lateral ventricles, of the brain, are.
    """
    sides = [side_words(name) for name in names]
    count = Counter(sides)
    return [
        (i, sides.index((1, rest)))
        for i, (side, rest) in enumerate(sides)
        if side == -1 and count[-1, rest] == count[1, rest] == 1 and not _of_the_heart(rest)
    ]


def _of_the_heart(words: Sequence[str]) -> bool:
    """Whether a class's words name a chamber of the heart."""
    brain = any(word.startswith(("lat", "temporal", "inf", "brain")) for word in words)
    return not brain and any(map(HEART.search, words))


def offsets(path: str, classes: int) -> dict[int, float]:
    """Where a label's classes lie between left and right.

    Args:
        path: NIfTI label map.
        classes: number of classes, the background included.

    Returns:
        For each class but 0 that the label holds, its centroid's distance from the middle of the
        image as a fraction of the extent: -0.5 is the patient's far left, 0.5 the far right.

    Raises:
        ValueError: the file is unreadable, or its affine is.
    """
    with readable("label", path):
        label = ras_array(open_volume(path))
    found = {}
    for number in range(1, classes):
        profile = (label == number).sum((1, 2))
        if total := profile.sum():
            centre = float((profile * (np.arange(len(profile)) + 0.5)).sum() / total)
            found[number] = centre / len(profile) - 0.5
    return found


def one_sided(paths: Sequence[str], classes: int) -> list[int]:
    """Classes that lie on one side of the image in nearly all labels.

    Args:
        paths: NIfTI label maps; at most ``CASES`` of them, evenly spaced, are read.
        classes: number of classes, the background included.
    """
    chosen = np.linspace(0, len(paths) - 1, min(CASES, len(paths))).round().astype(int)
    found = [offsets(paths[i], classes) for i in chosen]
    sided = []
    for number in range(1, classes):
        values = np.array([row[number] for row in found if number in row])
        if not len(values) or np.median(np.abs(values)) < OFFSET:
            continue
        if max((values > 0).mean(), (values < 0).mean()) >= SHARE:
            sided.append(number)
    return sided


def mirror(
    names: Sequence[str],
    items: Sequence[Mapping[str, Any]] = (),
    axes: str | Sequence[int] = "auto",
    pairs: str | Sequence[Sequence[int]] = "auto",
    first: int = 1,
) -> Mirror:
    """Decide how volumes may be mirrored.

    With ``axes`` "auto" the left–right axis is flipped if every class that lies on one side, by its
    name or in the labels, has its partner in ``pairs``.

    Args:
        names: of all classes; the index is the class.
        items: those with a NIfTI file as ``label`` are measured if ``axes`` is "auto".
        axes: spatial axes to flip (0 x, 1 y, 2 z), or "auto".
        pairs: classes that swap when axis 0 is flipped, or "auto" for those that the names give.
        first: class that may be the first of a pair: 1 after a background, 0 in classification.

    Raises:
        ValueError: an axis or a class does not exist, or a class is in two pairs.
    """
    names = list(map(str, names))  # a number on the command line is a name too
    chosen = name_pairs(names) if pairs == "auto" else _checked_pairs(pairs, first, len(names))
    swapped = ", ".join(f"{names[a]} ↔ {names[b]}" for a, b in chosen) or "none"
    if axes != "auto":
        given = _checked_axes(axes)
        reason = f"flips along axes {list(given)}, as configured; swapped classes: {swapped}"
        return Mirror(given, tuple(chosen), reason)
    labels = [str(item["label"]) for item in items if isinstance(item.get("label"), str)]
    named = {i for i, name in enumerate(names) if _names_a_side(name)}
    paired = {number for pair in chosen for number in pair}
    if alone := sorted({*named, *one_sided(labels, len(names))} - paired):
        listed = ", ".join(names[i] for i in alone)
        reason = (
            f"no left–right flips: on one side without a partner: {listed}; set mirror_pairs, or "
            "mirror_axes [0] if the side does not matter"
        )
        return Mirror((), tuple(chosen), reason)
    return Mirror((LEFT_RIGHT,), tuple(chosen), f"left–right flips; swapped classes: {swapped}")


def _names_a_side(name: str) -> bool:
    """Whether a name holds a whole word for one side; a single letter may mean anything."""
    words = {word.lower() for word in WORDS.findall(name)} - SHORT
    return bool(words & LEFT) != bool(words & RIGHT)


def _checked_pairs(pairs: Any, first: int, classes: int) -> list[Pair]:
    rows = [tuple(pair) for pair in pairs] if isinstance(pairs, (list, tuple)) else None
    numbers = [number for row in rows or () for number in row]
    valid = rows is not None and all(len(row) == 2 for row in rows)
    if not valid or len(set(numbers)) < len(numbers) or not {*numbers} <= {*range(first, classes)}:
        raise ValueError(
            f"mirror_pairs must be auto or pairs of different classes from {first} to "
            f"{classes - 1}, got {pairs}; write it like [[1,2]]"
        )
    return [(row[0], row[1]) for row in rows or ()]


def _checked_axes(axes: Any) -> tuple[int, ...]:
    if not isinstance(axes, (list, tuple)) or sorted({*axes} & {0, 1, 2}) != sorted(axes):
        raise ValueError(f"mirror_axes must be auto or some of 0, 1, 2, got {axes}; like [0]")
    return tuple(axes)


def swap(pairs: Sequence[Pair], size: int, first: int = 0) -> list[int]:
    """Channel order with the channels of paired classes exchanged.

    Args:
        pairs: class indices.
        size: number of channels.
        first: channel of class 0.
    """
    order = list(range(size))
    for a, b in pairs:
        order[first + a], order[first + b] = first + b, first + a
    return order


def swap_labels(label: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """A label map with the values of paired classes exchanged; shape and type stay."""
    swapped = label.clone()
    for a, b in pairs:
        swapped[label == a] = b
        swapped[label == b] = a
    return swapped


class RandMirrord(MapTransform, RandomizableTransform):
    """Flips image and label along each axis at random; the left–right flip swaps paired classes.

    Args:
        keys: volumes (c, x, y, z), or numbers of a class.
        label_keys: those of ``keys`` that are label maps, probabilities (classes, x, y, z), or
            numbers of a class.
        mirror: axes and pairs.
        prob: of a flip along each axis, in [0, 1].
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection,
        mirror: Mirror,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)
        self.mirror = mirror
        self.chance = prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for axis in self.mirror.axes:
            if self.R.rand() >= self.chance:
                continue
            flip = Flip(spatial_axis=axis)
            for key in self.key_iterator(result):
                value = result[key]
                if isinstance(value, Tensor) and value.ndim == 4:
                    value = flip(value)
                if key in self.label_keys and axis == LEFT_RIGHT:
                    value = self._swapped(value)
                result[key] = value
        return result

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 4 and len(value) > 1:
            return value[swap(self.mirror.pairs, len(value))]
        if isinstance(value, Tensor):
            return swap_labels(value, self.mirror.pairs)
        partner = {a: b for pair in self.mirror.pairs for a, b in (pair, pair[::-1])}
        return partner.get(value, value)
