"""Published bundles by the names of their repositories, from a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, fake_hub
from fakes import Bright, write_volumes
from huggingface_hub import snapshot_download

import med3dinsight_ext
from med3dinsight_ext.io.hub import hub_id, local_folder
from med3dinsight_ext.planning.run_folder import weights_of

CONFIGS = Path(__file__).parents[2] / "bundles" / "seg-finetune" / "configs"
OWN = {
    "backbone": {"_target_": "fakes.Bright"},
    "spacing": [2.0, 2.0, 2.0],
    "patch_size": [32, 32, 32],
    "device": "$torch.device('cpu')",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hub has ann/ball; yields the requests. The working directory is empty."""
    for folder in ("configs", "models", "med3dinsight_ext", "work"):
        (tmp_path / "repo" / folder).mkdir(parents=True)
    (tmp_path / "repo" / "work").rmdir()
    config = json.loads((CONFIGS / "inference.json").read_text()) | OWN
    config["dataloader"]["num_workers"] = 0
    (tmp_path / "repo" / "configs" / "inference.json").write_text(json.dumps(config))
    (tmp_path / "repo" / "configs" / "logging.conf").write_text(
        (CONFIGS / "logging.conf").read_text()
    )
    (tmp_path / "repo" / "configs" / "metadata.json").write_text(
        (CONFIGS / "metadata.json").read_text()
    )
    (tmp_path / "repo" / "med3dinsight_ext" / "evil.py").write_text("raise SystemExit")
    torch.save(Bright().state_dict(), tmp_path / "repo" / "models" / "model.pt")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with fake_hub(tmp_path / "repo", "ann/ball") as (url, asked):
        own = partial(snapshot_download, endpoint=url, cache_dir=tmp_path / "cache", token=False)
        monkeypatch.setattr("huggingface_hub.snapshot_download", own)
        yield asked


def test_a_repository_is_downloaded_once_and_without_its_python_files(hub: list[str]) -> None:
    folder = local_folder("ann/ball")
    assert folder.name == COMMIT and (folder / "models" / "model.pt").is_file()
    assert not list(folder.rglob("*.py")) and not [path for path in hub if "evil" in path]
    count = sum("/resolve/" in path for path in hub)
    assert local_folder("ann/ball@main") == folder
    assert sum("/resolve/" in path for path in hub) == count


def test_a_network_of_the_hub_predicts_and_is_a_start_for_fine_tuning(
    hub: list[str], tmp_path: Path
) -> None:
    write_volumes(tmp_path / "scans", 1)
    written = med3dinsight_ext.predict("ann/ball", str(tmp_path / "scans" / "v0.nii.gz"))
    assert written[0] == Path("runs/ball/predictions/v0_seg.nii.gz") and written[0].is_file()
    weights, plan = weights_of("ann/ball")
    assert weights.is_file() and plan is not None
    settings = med3dinsight_ext.plan(str(tmp_path / "scans"), base=plan, out="plan.yaml")
    assert settings["backbone"] == OWN["backbone"] and settings["patch_size"] == [32, 32, 32]
    assert settings["label_names"] == ["background", "class_1"] and "device" not in settings


def test_names_that_are_nothing_are_one_line(hub: list[str]) -> None:
    with pytest.raises(ValueError, match="got ann/bal: no such folder, and Repository.*correct"):
        med3dinsight_ext.load_encoder("ann/bal")
    Path("runs").mkdir()
    assert hub_id("runs/scan") is None and hub_id("a/b/c") is None
    with pytest.raises(ValueError, match="model must be a folder with models/model.pt, got runs/s"):
        med3dinsight_ext.predict("runs/scan", "a.nii")
