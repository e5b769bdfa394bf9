"""Tiny stand-ins that several tests share."""

from __future__ import annotations

import fakes
import hypothesis
import pytest

from med3dinsight_ext.teachers.teacher import Teacher

hypothesis.settings.register_profile("short", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("short")  # more examples: pytest --hypothesis-profile=nightly


@pytest.fixture
def teacher() -> Teacher:
    return fakes.teacher()
