from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import volume, write_volumes

from med3dinsight_ext import doctor as module
from med3dinsight_ext.doctor import doctor


def test_it_lists_requirements_and_checks_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["torch>=2", "never-there>=3", 'other>=1; extra == "test"']
    monkeypatch.setattr(module, "requires", lambda _: needs)
    with pytest.raises(SystemExit, match="pip install 'never-there>=3'"):
        source = write_volumes(tmp_path / "data", 2) / "segmentation.json"
        doctor(str(source), page=str(tmp_path / "page.html"))
    out = capsys.readouterr().out
    assert "2 volumes readable, 0 faults; modality" in out and "other" not in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("torch ")] == ["ok"]


def test_a_broken_law_is_printed_and_makes_the_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "requires", lambda _: [])
    source, page = write_volumes(tmp_path / "data", 2) / "segmentation.json", tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        doctor(str(source), label_names=["background"], page=str(page))
    assert stop.value.code == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("error"))
    assert "named values: label value 1 is not one of 0 to 0 [2:" in line
    assert "named values" in page.read_text(encoding="utf-8")


def test_label_names_must_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_names must be a list, got 'liver'; write it like"):
        doctor(str(tmp_path), label_names="liver")


def test_the_split_beside_a_list_is_checked_as_a_training_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "requires", lambda _: [])
    source = write_volumes(tmp_path / "data", 2) / "segmentation.json"
    (source.parent / "split.json").write_text('{"development": ["v0", "v1"], "test": ["v9"]}')
    with pytest.raises(SystemExit):
        doctor(str(source), page=str(tmp_path / "page.html"))
    assert "v9" in capsys.readouterr().out


def test_labels_and_split_of_a_folder_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "requires", lambda _: [])
    folder = write_volumes(tmp_path / "data", 3)
    volume(folder / "labels" / "v1.nii.gz", 1)
    (folder / "split.json").write_text('{"development": ["v0", "v1"], "test": ["v2", "v9"]}')
    with pytest.raises(SystemExit):
        doctor(str(folder), page=str(tmp_path / "page.html"))
    out = capsys.readouterr().out
    assert "2 volumes readable, 1 faults" in out
    assert "v1.nii.gz" in out and "label must have its image's shape" in out and "v9" in out


WITHOUT = """
import sys

sys.modules.update(dict.fromkeys(["torch", "jinja2", "monai", "nibabel"]))  # not to be imported
from med3dinsight_ext import doctor as module

module.requires = lambda _: ["never-there>=3"]
module.doctor("data")
"""


def test_packages_that_are_missing_do_not_stop_the_list_of_them() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert "device      not known without torch" in ran.stdout and "never-there" in ran.stdout
    assert ran.stderr == "install: pip install 'never-there>=3'\n" and ran.returncode == 1
