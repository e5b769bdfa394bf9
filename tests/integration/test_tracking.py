"""Trainings are tracked in a local MLflow database, from the command line and the front door."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fakes import write_volumes
from monai.bundle import ConfigParser
from running import BUNDLES, ROOT, settings

from med3dinsight_ext.training.launch import launch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
mlflow = pytest.importorskip("mlflow", reason='tracking needs pip install -e ".[tracking]"')
UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_losses_rates_metrics_and_the_config_are_in_the_run(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = write_volumes(tmp_path / "scans", 5)
    classes = {"class_names": ["even", "odd"]} if bundle == "cls-finetune" else {}
    given: dict[str, Any] = settings(
        bundle, tmp_path / "run", volumes, val_fraction=0.4, max_epochs=2, backbone=UNET, seed=1,
        tracking="mlflow", **classes,
    )  # fmt: skip
    launch(bundle, ["train.json"], given)
    assert "--tracking" in (said := capsys.readouterr().out) and "shared/mlflow.json" in said
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/eval/mlruns.db")
    experiment = client.get_experiment_by_name("med3dinsight")
    (found,) = client.search_runs(experiment.experiment_id)
    assert found.info.run_name == f"{tmp_path.name}/run" and found.info.status == "FINISHED"
    assert found.data.params["max_epochs"] == "2" and found.data.metrics["loss"] > 0
    metrics = {"pretrain": "image_within_r1", "seg-finetune": "val_mean_dice"}
    history = client.get_metric_history(found.info.run_id, metrics.get(bundle, "val_auroc"))
    assert [metric.step for metric in history] == [1, 2]
    (artifact,) = client.list_artifacts(found.info.run_id)
    saved = client.download_artifacts(found.info.run_id, artifact.path, str(tmp_path))
    assert ConfigParser.load_config_file(saved)["backbone"]["channels"] == [4, 8]


def test_the_settings_change_nothing_else() -> None:
    found = ConfigParser.load_config_file(str(ROOT / "bundles" / "shared" / "mlflow.json"))
    assert set(found) == {"handlers_id", "configs"}
    assert set(found["handlers_id"]) == {"trainer", "validator"}
