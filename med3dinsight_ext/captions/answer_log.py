"""Raw answers of a multimodal model on disk, one file a volume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.files import sync, write_atomic
from med3dinsight_ext.io.reading import whole_lines

Slot = tuple[str, int]  # plane and voxel index along the cut axis


class AnswerLog:
    """Raw answers about one volume, appended and flushed to the disk one at a time.

    A line that a kill or a full disk cut short is skipped; its slice has no answer.

    Args:
        path: JSONL file; its first line is the provenance.
        provenance: model, prompt and decoding.

    Attributes:
        answers: raw answer by slot.
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        self.path = path
        self.provenance = provenance
        self.answers = self._read()

    def _read(self) -> dict[Slot, str]:
        found = {}
        for fields in filter(lambda line: isinstance(line, dict), whole_lines(self.path)):
            row = [fields.get(key) for key in ("plane", "index", "answer")]
            if [type(x) for x in row] == [str, int, str]:
                found[row[0], row[1]] = row[2]
        return found

    def add(self, slot: Slot, answer: str) -> None:
        """Append one answer."""
        if not self.path.exists():
            self.save()
        self.answers[slot] = answer
        # After a new line: a cut one must not swallow this one.
        with self.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write("\n" + self._line(slot))
        sync(self.path)

    def save(self) -> None:
        """Rewrite the file in the order of slots, with the answers of other processes."""
        self.answers = {**self._read(), **self.answers}
        lines = [json.dumps(self.provenance, ensure_ascii=False)]
        lines += [self._line(slot) for slot in sorted(self.answers)]
        text = "\n".join(lines) + "\n"
        write_atomic(self.path, lambda draft: draft.write_text(text, "utf-8", "replace"))

    def _line(self, slot: Slot) -> str:
        fields = {"plane": slot[0], "index": slot[1], "answer": self.answers[slot]}
        return json.dumps(fields, ensure_ascii=False)
