"""Tiny stand-ins that several tests share."""

from __future__ import annotations

from pathlib import Path

import fakes
import hypothesis
import pytest
import torch
from running import SMALL_MACHINE

from med3dinsight_ext.planning import plan as planning
from med3dinsight_ext.teachers.teacher import Teacher

hypothesis.settings.register_profile("short", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("short")  # more examples: pytest --hypothesis-profile=nightly


@pytest.fixture
def teacher() -> Teacher:
    return fakes.teacher()


@pytest.fixture
def small_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory, and plans that take a second to train."""
    monkeypatch.setattr(planning, "CPU", SMALL_MACHINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
