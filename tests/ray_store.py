"""A store that Ray's workers build: they import this module by its name."""

from __future__ import annotations

import os
from pathlib import Path

import fakes

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store


def build(root: Path, pids: Path | None = None) -> Store:
    """A small store; the process leaves its number in ``pids``."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    return Store(root, fakes.teacher(), TemplateCaptions(), per_plane=2)
