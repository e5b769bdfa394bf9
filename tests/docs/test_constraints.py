"""The pinned set of dependencies."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from running import ROOT

sys.path.insert(0, str(ROOT / "docs" / "release"))
import constraints

PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
)  # fmt: skip


@pytest.mark.parametrize("text", constraints.requirements())
def test_every_requirement_and_extra_is_pinned_within_its_bounds(text: str) -> None:
    need = Requirement(text)
    assert need.specifier.contains(PINS[constraints.normal(need.name)])


def test_what_the_pinned_packages_require_is_pinned_within_its_bounds() -> None:
    open_, checked = [], 0
    for name, version in PINS.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] != version:
            continue  # another version may require something else
        checked += 1
        for need in map(Requirement, installed.requires or []):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            pin = PINS.get(constraints.normal(need.name))
            if pin is None or not need.specifier.contains(pin, prereleases=True):
                open_.append(f"{name} requires {need}, pinned is {pin}")
    assert not open_ and checked > 5
