"""A store that Ray's workers build: they import this module by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fakes

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store


class DeadlyStore(Store):
    """A store whose process dies of a volume, except the process ``survivor``."""

    survivor = 0

    def fill(self, items: Any, *args: Any, **options: Any) -> list[dict[str, Any]]:
        if os.getpid() != self.survivor and any("/5.nii" in item["image"] for item in items):
            os._exit(1)
        return super().fill(items, *args, **options)


def deadly(root: Path, survivor: int) -> Store:
    """A ``DeadlyStore``."""
    store = DeadlyStore(root, fakes.teacher(), TemplateCaptions(), per_plane=2)
    store.survivor = survivor
    return store


def build(root: Path, pids: Path | None = None) -> Store:
    """A small store; the process leaves its number in ``pids``."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    return Store(root, fakes.teacher(), TemplateCaptions(), per_plane=2)
