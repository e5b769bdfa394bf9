"""Log of the answers and saved labels, and the effort that a case has taken."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.reading import whole_lines

logger = logging.getLogger(__name__)
NAME = "answers.jsonl"
LOCK = threading.Lock()
PAUSE = 300.0  # seconds without an event that are not counted as work


class AnswerLog:
    """JSON lines, an answer or a saved label each, beside the labels.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **event: Any) -> None:
        """Append a line with the time; a full disk must not cost an answer, so it only warns."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **event}, ensure_ascii=False, default=str) + "\n"
        try:
            with LOCK, self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            logger.warning("not logged: %s", error)

    def events(self) -> list[dict[str, Any]]:
        """All lines that are whole."""
        return [
            event
            for event in whole_lines(self.path)
            if isinstance(event, dict) and {"time", "image"} <= event.keys()
        ]


def clicks_of(request: Mapping[str, Any], labels: Sequence[str]) -> dict[str, int]:
    """Number of clicks of each label in a request, by the label's name in small letters."""
    names = {name.lower() for name in labels}
    return {
        str(key).lower(): len(value)
        for key, value in request.items()
        if str(key).lower() in names and isinstance(value, list) and value
    }


def effort(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case of an annotator, from the first answer to the saved label.

    Args:
        events: lines of ``AnswerLog``.

    Returns:
        In the order of their begin: image, annotator, begin, model and weights of the last answer,
        number of answers, clicks in the last answer, seconds of work without pauses of more than
        ``PAUSE``, seconds of waiting for answers, and whether the label was saved.
    """
    rows: list[dict[str, Any]] = []
    begun: dict[tuple[Any, Any], tuple[dict[str, Any], datetime]] = {}  # row, its last event
    for event in sorted(events, key=lambda event: str(event["time"])):
        known = event.get("annotator")  # whatever a request says
        case = str(event["image"]), None if known is None else str(known)
        time = datetime.fromisoformat(str(event["time"]))
        waited = float(event.get("seconds") or 0)
        if case in begun:
            row, before = begun[case]
            passed = (time - before).total_seconds()
            row["seconds"] += passed if passed <= PAUSE else 0
        elif "saved" in event:  # a label that was drawn elsewhere
            continue
        else:
            row = {
                "image": case[0],
                "annotator": case[1],
                "begin": str(event["time"]),
                "answers": 0,
                "seconds": waited,
                "waited": 0.0,
                "saved": False,
            }
            rows.append(row)
        begun[case] = row, time
        if "saved" in event:
            row["saved"] = True
            del begun[case]
            continue
        row["answers"] += 1
        row["waited"] += waited
        row |= {
            "model": event.get("model"),
            "weights": event.get("weights"),
            "clicks": sum((event.get("clicks") or {}).values()),
        }
    return rows
