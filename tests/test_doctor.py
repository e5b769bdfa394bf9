from __future__ import annotations

from pathlib import Path

import pytest
from fakes import write_volumes

from med3dinsight_ext import doctor as module
from med3dinsight_ext.doctor import doctor


def test_it_lists_requirements_and_checks_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["torch>=2", "never-there>=3", 'other>=1; extra == "test"']
    monkeypatch.setattr(module, "requires", lambda _: needs)
    with pytest.raises(SystemExit, match="pip install 'never-there>=3'"):
        doctor(str(write_volumes(tmp_path / "data", 2) / "segmentation.json"))
    out = capsys.readouterr().out
    assert "2 volumes, all readable; modality" in out and "other" not in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("torch ")] == ["ok"]
