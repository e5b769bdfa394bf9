"""Tiny stand-ins that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import fakes
import hypothesis
import pytest

from med3dinsight_ext.teachers.teacher import Teacher

ROOT = Path(__file__).parents[1]
hypothesis.settings.register_profile("short", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("short")  # more examples: pytest --hypothesis-profile=nightly
DATA = Path(os.environ.get("MED3D_DATA", ROOT.parent / "shared" / "data"))


def real_data(name: str) -> Path:
    """Folder of a real dataset; the test is skipped where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; set MED3D_DATA to the folder that holds {name}")
    return DATA / name


@pytest.fixture
def teacher() -> Teacher:
    return fakes.teacher()
