"""Training from a prepared copy, which reads no file of the dataset again."""

from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import ROOT, run, settings

from med3dinsight_ext.training.history import read_history

PREPARE = ROOT / "bundles" / "shared" / "prepare.json"


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["pretrain", "seg-finetune", "cls-finetune"])
def test_a_run_trains_from_the_prepared_copy_alone(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    volumes = fakes.write_volumes(tmp_path / "volumes", 6)
    copy = str(tmp_path / "copy")
    changes: dict[str, Any] = {"val_fraction": 0.5, "backbone::init_filters": 8, "max_epochs": 2}
    if bundle == "cls-finetune":
        changes["class_names"] = ["even", "odd"]
    run(bundle, ["train.json", PREPARE], **settings(bundle, tmp_path, volumes, prepared=copy))
    assert f"6 of 6 volumes are in {copy}" in capsys.readouterr().out
    direct, ours = tmp_path / "direct", tmp_path / "ours"
    run(bundle, ["train.json"], **settings(bundle, direct, volumes, **changes))
    if bundle == "pretrain":
        changes["store_dir"] = str(direct / "store")
    for name in ("data.volumes.read_volume", "data.labels.read_volume", "io.files.sha256"):
        monkeypatch.setattr(f"med3dinsight_ext.{name}", None)  # whoever reads fails
    run(bundle, ["train.json"], **settings(bundle, ours, volumes, prepared=copy, **changes))
    one, other = (read_history(root / "eval" / "history.jsonl")[0] for root in (direct, ours))
    assert one.keys() == other.keys()
    assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    assert torch.load(ours / "models" / "model.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["pretrain", "seg-finetune"])
def test_an_epoch_may_be_a_number_of_steps(bundle: str, tmp_path: Path) -> None:
    volumes = fakes.write_volumes(tmp_path / "volumes", 5)
    changes = {"steps_per_epoch": 4, "max_epochs": 2, "backbone::init_filters": 8}
    run(bundle, ["train.json"], **settings(bundle, tmp_path, volumes, **changes))
    assert [row["steps"] for row in read_history(tmp_path / "eval" / "history.jsonl")] == [4, 4]
