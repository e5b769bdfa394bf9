"""Config files that bundles share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SHARED = {"train.json": "sampler", "finetune.json": "trainer"}  # a key of ``train`` in each file
EVALUATED = ("$", "@", "%")  # how a text begins that a config would evaluate
CHANGED = "#"  # MONAI writes :: in its place, in any text


def check_plain(name: str, texts: Iterable[str], fix: str) -> None:
    """Stop if a config would evaluate one of the texts, which may be code, or change it.

    Args:
        name: of the texts, for the message.
        texts: from data, not from who runs it.
        fix: end of the message.
    """
    for text in texts:
        if text.startswith(EVALUATED) or CHANGED in text:
            signs = ", ".join(EVALUATED)
            raise ValueError(
                f"{name} must not begin with {signs} or contain {CHANGED}, got {text!r:.200}; {fix}"
            )


def missing_shared(config: Mapping[str, Any]) -> list[str]:
    """Files of ``bundles/shared`` that a config needs and has not been merged with.

    Args:
        config: only a bundle's ``train.json`` needs any.
    """
    if "train_handlers" not in config:
        return []
    return [name for name, key in SHARED.items() if key not in config["train"]]


def with_shared(path: str | Path) -> list[str]:
    """Paths of a config file and of the shared files to merge after it.

    Args:
        path: file in ``configs`` of a bundle; for a published ``train.json``, which has the shared
            keys, and for a YAML overlay the result is the path alone.
    """
    shared = Path(path).resolve().parents[2] / "shared"
    is_json = Path(path).suffix == ".json"
    missing = missing_shared(json.loads(Path(path).read_text("utf-8"))) if is_json else []
    return [str(path), *(str(shared / name) for name in missing)]
