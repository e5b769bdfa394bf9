"""pretrain with volume.yaml: a network learns the pooled features of the 2D encoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_volumes
from running import NETWORKS, run, settings

OVERLAYS = ["train.json", "volume.yaml"]
BACKBONE = NETWORKS["seg-finetune"]["backbone"] | {"channels": [8, 16]}


def given(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    own = {"teacher": {"_target_": "test_dense.teacher"}, "backbone": BACKBONE}
    return settings("pretrain", root, volumes) | own | changes


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"), 6)


def test_a_network_learns_the_features_of_its_volumes(tmp_path: Path, volumes: Path) -> None:
    settings = given(tmp_path, volumes, max_epochs=30, learning_rate=0.01, val_fraction=0.34)
    run("pretrain", OVERLAYS, **settings)
    history = (tmp_path / "eval" / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in history]
    assert "r2" in rows[-1]
    assert rows[-1]["total"] < 0.5 * rows[0]["total"]
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert state and not any(name.startswith("head") for name in state)
    record = json.loads((tmp_path / "models" / "run.json").read_text())
    assert record["data"]["training"]["cases"] == 4
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    assert len(files) == 6
    run("pretrain", OVERLAYS, **settings | {"max_epochs": 31})
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())
    run("pretrain", OVERLAYS, **settings | {"per_plane": 3, "max_epochs": 1})
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 12


def test_its_weights_start_a_classifier(tmp_path: Path, volumes: Path) -> None:
    run("pretrain", OVERLAYS, **given(tmp_path / "a", volumes, max_epochs=1, val_fraction=0.0))
    about = settings("cls-finetune", tmp_path / "b", volumes) | {
        "backbone": BACKBONE,
        "class_names": ["even", "odd"],
        "pretrained": str(tmp_path / "a" / "models" / "model.pt"),
        "mode": "linear",
    }
    run("cls-finetune", ["train.json"], **about)
    report = json.loads((tmp_path / "b" / "eval" / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0


def test_one_volume_is_too_few(tmp_path: Path) -> None:
    alone = write_volumes(tmp_path / "volumes", 1)
    with pytest.raises(RuntimeError) as error:
        run("pretrain", OVERLAYS, **given(tmp_path, alone, val_fraction=0.0))
    assert "volumes must be two or more for volume-level teaching, got 1" in str(
        error.getrepr(chain=True)
    )
