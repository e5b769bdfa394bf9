"""Counts over the captions of a store, and a sample of its slices."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from med3dinsight_ext.data.slicing import PLANES, plane_number

NOT_REQUESTED = "not requested"  # status of a slice for which no caption was requested


class SliceRecord(NamedTuple):
    """A slice of the store and its caption; ``source`` is JSON: captioner and teacher.

    position: in [0, 1]. number: of the slice along its axis. raw: the answer, if rejected.
    """

    image: str
    modality: str
    source: str
    plane: int
    number: int
    position: float
    caption: str | None
    status: str
    raw: str
    similarity: float | None


class Counts:
    """Counts over slices; words and thousandths of similarity as value to frequency."""

    def __init__(self) -> None:
        self.slices = 0
        self.words: Counter[int] = Counter()
        self.similarity: Counter[int] = Counter()
        self.statuses: Counter[str] = Counter()

    def add(self, row: SliceRecord) -> None:
        self.slices += 1
        self.statuses[row.status] += 1
        if row.caption is not None:
            self.words[len(row.caption.split())] += 1
        if row.similarity is not None:
            self.similarity[round(1000 * row.similarity)] += 1

    @property
    def captions(self) -> int:
        return self.words.total()

    @property
    def rejected(self) -> list[str]:
        """Statuses of slices whose answer is no caption, the most frequent first."""
        every = (status for status, _ in self.statuses.most_common())
        return [status for status in every if status not in ("ok", NOT_REQUESTED)]

    @property
    def word_range(self) -> tuple[str, str]:
        """Median of the words a caption, and their 5th to 95th percentile."""
        if not self.words:
            return "–", ""
        low, middle, high = (percentile(self.words, share) for share in (0.05, 0.5, 0.95))
        return f"{middle}", f"{low} to {high}"

    @property
    def median_similarity(self) -> float:
        """NaN without any."""
        return percentile(self.similarity, 0.5) / 1000 if self.similarity else math.nan


class Summary:
    """Counts over a store, and a sample of slices of each captioner, plane and status.

    Of the texts only repeated ones and those of the sample stay in memory.

    Args:
        sample: slices to keep of each captioner, plane and status.
        seed: of their draw.
    """

    def __init__(self, sample: int, seed: int) -> None:
        self.sample, self.seed = sample, seed
        self.total = Counts()
        self.planes: defaultdict[str, Counts] = defaultdict(Counts)
        self.modalities: defaultdict[str, Counts] = defaultdict(Counts)
        self.sources: defaultdict[str, Counts] = defaultdict(Counts)
        self.images: set[str] = set()
        self.captions_each: Counter[int] = Counter()  # captions of a volume to number of volumes
        self.texts: Counter[int] = Counter()  # by hash of source and text
        self.again: dict[int, tuple[str, str]] = {}  # source and text of repeated ones
        self.skipped = 0
        self.repeats = 0  # entries of a volume and source that have one already
        self._entries: set[int] = set()
        self._kept: dict[tuple[str, int, str], list[tuple[int, float, int, SliceRecord]]] = {}
        self._order = count()  # so that no two slices tie
        self._seen: Counter[tuple[str, int, str]] = Counter()

    def add(self, rows: Sequence[SliceRecord]) -> None:
        """Count the slices of one entry, and sample some."""
        self.images.add(rows[0].image)
        entry = hash((rows[0].image, rows[0].source))
        self.repeats += entry in self._entries
        self._entries.add(entry)
        self.captions_each[sum(row.caption is not None for row in rows)] += 1
        for row in rows:
            groups = self.planes[PLANES[row.plane]], self.modalities[row.modality]
            for counts in (self.total, *groups, self.sources[row.source]):
                counts.add(row)
            if row.caption is not None:
                key = hash((row.source, row.caption))
                self.texts[key] += 1
                if self.texts[key] == 2:
                    self.again[key] = row.source, row.caption
        self._keep(rows)

    def _keep(self, rows: Sequence[SliceRecord]) -> None:
        """Sample few slices a volume from many volumes; all kinds share the volumes."""
        random = Random(f"{self.seed} {rows[0].image}")
        priority = random.random()
        taken: Counter[tuple[str, int, str]] = Counter()
        for row in random.sample(rows, len(rows)):
            kind = row.source, row.plane, row.status
            item = (-taken[kind], -priority, next(self._order), row)
            taken[kind] += 1
            kept = self._kept.setdefault(kind, [])
            (heapq.heappushpop if len(kept) == self.sample else heapq.heappush)(kept, item)
        self._seen.update(taken)

    def drawn(self) -> list[SliceRecord]:
        """At most ``sample`` slices: some of each kind, more of frequent kinds.

        Slices without a requested caption are few, unless there are no others.
        """
        kept = {
            kind: [item[-1] for item in sorted(self._kept[kind], reverse=True)]
            for kind, _ in self._seen.most_common()
        }
        weight = {
            kind: 1 if kind[2] == NOT_REQUESTED else math.sqrt(self._seen[kind]) for kind in kept
        }
        taken = dict.fromkeys(kept, 0)
        for _ in range(min(self.sample, sum(map(len, kept.values())))):
            left = [kind for kind in kept if taken[kind] < len(kept[kind])]
            taken[min(left, key=lambda kind: taken[kind] / weight[kind])] += 1
        chosen = [row for kind, rows in kept.items() for row in rows[: taken[kind]]]
        return sorted(chosen, key=lambda row: (row.image, row.plane, row.position, row.source))

    def raw(self, status: str) -> list[str]:
        """At most three distinct raw answers of one status."""
        rows = (item[-1] for kind in self._kept if kind[2] == status for item in self._kept[kind])
        return list(dict.fromkeys(row.raw for row in rows))[:3]

    def most_repeated(self, most: int) -> list[tuple[int, str, str]]:
        """Count, source and text of the most frequent captions that are used repeatedly."""
        keys = heapq.nlargest(most, self.again, key=lambda key: self.texts[key])
        return [(self.texts[key], *self.again[key]) for key in keys]

    def repeated(self, source: str | None = None) -> float:
        """Fraction of the captions, of all or of one source, whose text is repeated."""
        keys = [key for key, (by, _) in self.again.items() if source in (None, by)]
        captions = self.total.captions if source is None else self.sources[source].captions
        return sum(self.texts[key] for key in keys) / max(captions, 1)


def read_entry(path: Path) -> list[SliceRecord]:
    """The slices of one entry; ValueError, KeyError or TypeError if it is none."""
    about = json.loads(path.read_text("utf-8"))
    if not (about["slices"] and about["captioner"]["kind"]):
        raise ValueError("an entry has slices and a captioner")
    origin = {name: about[name] for name in ("captioner", "teacher", "joint")}
    source = json.dumps(origin)
    rows = []
    for row in about["slices"]:
        similarity = row["similarity"]
        record = SliceRecord(
            image=str(about["image"]),
            modality=str(about["modality"]),
            source=source,
            plane=plane_number(row["plane"]),
            number=int(row["index"]),
            position=float(row["position"]),
            caption=row["caption"],
            status=str(row["status"] or NOT_REQUESTED),
            raw=row.get("raw") or "",
            similarity=None if similarity is None else float(similarity),
        )
        if not (0 <= record.position <= 1 and abs(record.similarity or 0) < 1.1):
            raise ValueError("a position lies in [0, 1], a similarity in [-1, 1]")
        if not isinstance(record.raw, str) or not isinstance(record.caption, str | None):
            raise TypeError("texts are str")
        rows.append(record)
    return rows


def percentile(counts: Counter[int], share: float) -> int:
    """The smallest value not exceeded by at least this fraction of the counted ones."""
    return int(np.quantile(list(counts.elements()), share, method="inverted_cdf"))
