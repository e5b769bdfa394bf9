"""Trainings are tracked in a local MLflow database, or by Weights & Biases offline."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fakes import write_volumes
from monai.bundle import ConfigParser
from running import BUNDLES, ROOT, settings

from med3dinsight_ext.io.overrides import TRACKING
from med3dinsight_ext.training.launch import launch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


METRICS = {"pretrain": "image_within_r1", "seg-finetune": "val_mean_dice",
           "cls-finetune": "val_auroc"}  # fmt: skip


def package(name: str) -> Any:
    """A package, or a skipped test."""
    return pytest.importorskip(name, reason='tracking needs pip install -e ".[tracking]"')


def train(bundle: str, folder: Path, tracking: str) -> None:
    """Train for two epochs with tracking, in ``folder``/run."""
    volumes = write_volumes(folder / "scans", 5)
    classes = {"class_names": ["even", "odd"]} if bundle == "cls-finetune" else {}
    given = settings(
        bundle, folder / "run", volumes, val_fraction=0.4, max_epochs=2, backbone=UNET, seed=1,
        tracking=tracking, **classes,
    )  # fmt: skip
    launch(bundle, ["train.json"], given)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_losses_rates_metrics_and_the_config_are_in_the_run(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = package("mlflow")
    train(bundle, tmp_path, "mlflow")
    assert "--tracking" in (said := capsys.readouterr().out) and "shared/mlflow.json" in said
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/eval/mlruns.db")
    experiment = client.get_experiment_by_name("med3dinsight")
    (found,) = client.search_runs(experiment.experiment_id)
    assert found.info.run_name == f"{tmp_path.name}/run" and found.info.status == "FINISHED"
    assert found.data.params["max_epochs"] == "2" and found.data.metrics["loss"] > 0
    history = client.get_metric_history(found.info.run_id, METRICS[bundle])
    assert [metric.step for metric in history] == [1, 2]
    (artifact,) = client.list_artifacts(found.info.run_id)
    saved = client.download_artifacts(found.info.run_id, artifact.path, str(tmp_path))
    assert ConfigParser.load_config_file(saved)["backbone"]["channels"] == [4, 8]


def messages(path: Path) -> Iterator[bytes]:
    """Messages of a file of W&B: LevelDB's log format, in blocks of 32 KiB, after 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole message, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_wandb_has_them_too_and_stays_offline(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("wandb")
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(bundle, tmp_path, "wandb")
    (path,) = (tmp_path / "run" / "eval" / "wandb").glob("offline-run-*/*.wandb")
    records = [record_type.FromString(message) for message in messages(path)]
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name) == ("med3dinsight", f"{tmp_path.name}/run")
    assert config["backbone"]["channels"] == [4, 8]
    history: dict[str, list[float]] = {}
    for record in records:
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            history.setdefault(key, []).append(json.loads(item.value_json))
    assert len(history[f"validation/{METRICS[bundle]}"]) == 2 and history["train/loss"][0] > 0
    assert history["lr/group_0"][0] > 0 and any(record.HasField("exit") for record in records)


@pytest.mark.parametrize("name", TRACKING)
def test_the_settings_change_nothing_else(name: str) -> None:
    found = ConfigParser.load_config_file(str(ROOT / "bundles" / TRACKING[name]))
    assert set(found) == {"handlers_id", "configs"}
    assert set(found["handlers_id"]) <= {"trainer", "validator"}
