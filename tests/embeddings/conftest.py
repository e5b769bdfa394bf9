from __future__ import annotations

from pathlib import Path

import pytest
from fakes import volume

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.teachers.teacher import Teacher


@pytest.fixture
def items(tmp_path: Path) -> list[dict]:
    return [volume(tmp_path / f"{i}.nii.gz", i) for i in range(3)]


@pytest.fixture
def store(tmp_path: Path, teacher: Teacher) -> Store:
    return Store(tmp_path / "store", teacher, TemplateCaptions(), per_plane=4)
