from __future__ import annotations

from pathlib import Path

import pytest

from med3dinsight_ext.io import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 2000 kB\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    return tmp_path


def test_a_container_has_what_its_control_group_allows(group: Path) -> None:
    (group / "memory.max").write_text("1000000\n")
    assert memory.total_memory() == 1_000_000
    assert memory.free_memory() == 700_000


@pytest.mark.parametrize("limit", ["max", None])
def test_a_machine_without_a_limit_has_its_own_memory(group: Path, limit: str | None) -> None:
    if limit:
        (group / "memory.max").write_text(limit)
    assert memory.total_memory() > 10**8
    assert memory.free_memory() == 2000 * 1024
