"""Pairing of images and labels by their names, with nnU-Net's numbers of channels."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from med3dinsight_ext.data.datalists import LABEL_ENDINGS
from med3dinsight_ext.io.files import volume_stem

CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net's number of a channel
Key = tuple[tuple[str, ...], str]  # folders and name of a file


def naming_key(path: Path, root: Path) -> Key:
    """Folders and name without what differs between an image and its label."""
    parts = Path(os.path.relpath(path, root)).parts[:-1]
    folders = tuple(part for part in parts if not part.startswith(("images", "labels")))
    stem = volume_stem(path)
    ending = next((end for end in LABEL_ENDINGS if stem.endswith(end)), "")
    return folders, stem.removesuffix(ending)


class NamingRule(NamedTuple):
    """How images and labels may be named alike."""

    bare: bool  # whatever their folders
    channels: bool  # but for nnU-Net's number of a channel in an image's name

    def label(self, key: Key) -> Key:
        """What of a label is compared."""
        return () if self.bare else key[0], key[1]

    def image(self, key: Key) -> Key:
        """What of an image is compared."""
        return self.label(without_channel(key) if self.channels else key)

    def matches(self, images: Collection[Key], labels: Collection[Key]) -> int:
        """How many labels an image is named like; none if two labels become alike."""
        compared = {self.label(key) for key in labels}
        found = compared & {self.image(key) for key in images}
        return len(found) if len(compared) == len(labels) else 0


NAMING_RULES = [NamingRule(bare, channels) for bare in (False, True) for channels in (False, True)]


def without_channel(key: Key) -> Key:
    """The key without nnU-Net's number of a channel."""
    return key[0], CHANNEL.sub("", key[1])


def numbers_channels(keys: Collection[Key], kinds: Mapping[int, str]) -> bool:
    """Whether the numbers of four digits in the names of unlabelled images are those of channels.

    They are if there are several cases with the same numbers, from 0000 on; or if all are numbers
    of several ``kinds``.
    """
    if len(kinds) > 1:
        found = (CHANNEL.search(stem) for _, stem in keys)
        return all(number and int(number[0][1:]) in kinds for number in found)
    numbers: dict[Key, list[str]] = {}
    for key in keys:
        case = without_channel(key)
        numbers.setdefault(case, []).append(key[1].removeprefix(case[1]))
    alike = {tuple(sorted(found)) for found in numbers.values()}
    counted = tuple(f"_{n:04d}" for n in range(len(next(iter(numbers.values())))))
    return len(numbers) > 1 and alike == {counted}


def channel_number(image: str) -> int:
    """Number of an image's channel in nnU-Net's names; 0 without one."""
    found = CHANNEL.search(volume_stem(image))
    return int(found[0][1:]) if found else 0
