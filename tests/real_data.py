"""Real datasets, where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MED3D_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """Folder of a real dataset; the test is skipped where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; set MED3D_DATA to the folder that holds {name}")
    return DATA / name
