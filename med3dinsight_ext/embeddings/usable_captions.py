"""The share of a store's captions that training can use."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist

logger = logging.getLogger(__name__)
SAMPLE = 2000  # entries that are counted
DISSIMILAR = "below min_similarity"


def caption_statuses(
    items: Sequence[dict[str, Any]], min_similarity: float | None = None
) -> Counter[str]:
    """Number of requested captions by status: "ok", or the reason why it is not used.

    Args:
        items: from ``Store.fill``.
        min_similarity: as in ``SampleTargetsd``.
    """
    found: Counter[str] = Counter()
    for path in {Path(item["targets"]).with_suffix(".json") for item in items}:
        for row in json.loads(path.read_text("utf-8"))["slices"] if path.exists() else ():
            similarity = row["similarity"]
            alike = None in (min_similarity, similarity) or similarity >= min_similarity
            found[row["status"] if alike else DISSIMILAR] += row["status"] is not None
    return +found


def shown(statuses: Counter[str]) -> str:
    """One line, such as "30 of 36 captions (83%) are usable: 30 ok, 6 refused"."""
    listed = ", ".join(f"{count:,} {status}" for status, count in statuses.most_common())
    share = statuses["ok"] / max(statuses.total(), 1)
    return (
        f"{statuses['ok']:,} of {statuses.total():,} captions ({share:.0%}) are usable: "
        f"{listed or 'none was requested'}"
    )


def check_captions(
    items: Sequence[dict[str, Any]], text_weight: float, min_similarity: float | None = None
) -> None:
    """Log how many captions training can use; an error if it needs some and there are none.

    Of many entries, evenly spaced ones are read.

    Args:
        items: from ``Store.fill``.
        text_weight: of the loss.
        min_similarity: as in ``SampleTargetsd``.

    Raises:
        ValueError: all captions were refused or are dissimilar, and ``text_weight`` is not 0.
    """
    step = -(-len(items) // SAMPLE)
    chosen = items[::step] if step > 1 else items
    statuses = caption_statuses(chosen, min_similarity)
    if not statuses["ok"] and len(chosen) < len(items):
        chosen, statuses = items, caption_statuses(items, min_similarity)
    if idist.get_rank() == 0:
        counted = f" (in {len(chosen):,} of {len(items):,} volumes)" if chosen is not items else ""
        logger.info(shown(statuses) + counted)
    if text_weight and statuses and not statuses["ok"]:
        store = Path(items[0]["targets"]).parents[1]
        raise ValueError(
            f"captions must be usable, got {shown(statuses)}; read the answers with python -m "
            f"med3dinsight_ext captions {store} and change captioner or min_similarity, or train "
            "on images alone with --loss::text_weight 0"
        )
