from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import write_volumes

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.quickstart import fitting_spacing, quickstart, score_prompts


def test_the_median_volume_fits_a_patch(tmp_path: Path) -> None:
    items = datalist(write_volumes(tmp_path, 2) / "segmentation.json")
    assert fitting_spacing(items) == round(32 * 2 / 48, 2)


def test_prompts_are_scored_in_one_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "med3dinsight_ext.quickstart.bundle_run", lambda *words, **more: calls.append((words, more))
    )
    item = {"image": "v.nii", "modality": "MR", "more": 1}
    score_prompts(tmp_path / "eval", item, {"bundle_root": "r", "split": "s"})
    ((words, more),) = calls
    assert words == ("pretrain", ["inference.json", "quickstart.yaml"])
    assert more["bundle_root"] == "r" and "split" not in more and len(more["prompts"]) == 3
    assert Path(more["datalist"]).read_text() == '{"image": "v.nii", "modality": "MR"}\n'


def test_a_quickstart_on_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    models = tmp_path / "out" / "pretrain" / "models"
    models.mkdir(parents=True)
    (models / "run.json").write_text(json.dumps({"config": {"dataset_dir": "/first"}}))
    with pytest.raises(ValueError, match="a quickstart on .*second, got .*out on /first; name ano"):
        quickstart(str(tmp_path / "second"), str(tmp_path / "out"))
