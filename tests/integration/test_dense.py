import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeTexts, write_volumes
from running import run, settings
from torch import nn

from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower

UNET = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
    "channels": [4, 8], "strides": [2],
}  # fmt: skip


class TwoStages(ImageTower):
    size, mean, std, fingerprint = 32, (0.0,) * 3, (1.0,) * 3, "two-stages"

    def load(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 9, 2, 2))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).mean((2, 3))


def teacher() -> Teacher:
    return Teacher(TwoStages(), FakeTexts())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    volumes = write_volumes(tmp_path_factory.mktemp("volumes"), 6)
    root = tmp_path_factory.mktemp("dense")
    given = settings(
        "pretrain",
        root,
        volumes,
        teacher={"_target_": "test_dense.teacher"},
        points=200,
        slices=4,
        max_epochs=2,
    )
    run("pretrain", ["train.json", "dense.yaml"], **given)
    return given, root


def test_the_dense_overlay_trains_and_keeps_the_best(trained: tuple[dict[str, Any], Path]) -> None:
    root = trained[1]
    rows = [json.loads(line) for line in (root / "eval/history.jsonl").read_text().splitlines()]
    assert {"dense", "reconstruction", "explained_variance"} <= rows[-1].keys()
    assert all(0 < row["dense"] < 2 for row in rows)
    state = torch.load(root / "models/model.pt", weights_only=True)
    assert not any(name.startswith("heads") for name in state)


def test_a_finished_dense_run_makes_no_grid_again(trained: tuple[dict[str, Any], Path]) -> None:
    given, root = trained
    files = {p: p.stat().st_mtime_ns for p in (root / "store/grids").rglob("*.safetensors")}
    assert len(files) > 2
    run("pretrain", ["train.json", "dense.yaml"], **given)
    assert files == {p: p.stat().st_mtime_ns for p in (root / "store/grids").rglob("*.safetensors")}


def test_fine_tuning_takes_unlabelled_volumes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    volumes = write_volumes(tmp_path / "labelled", 4)
    more = write_volumes(tmp_path / "more", 3, (30, 28, 32))
    given = settings(
        "seg-finetune",
        tmp_path / "run",
        volumes,
        teacher={"_target_": "test_dense.teacher"},
        unlabelled=str(more),
        backbone=UNET,
    )
    workflow = run("seg-finetune", ["train.json", "unlabelled.yaml"], **given)
    data = workflow.parser.get_parsed_content("train::dataset::data")
    assert len(data) == 6 and len({item["image"] for item in data}) == 6
    assert (tmp_path / "run/models/model.pt").exists()


def test_targets_of_the_crop_train_and_are_evaluated(tmp_path: Path) -> None:
    volumes = write_volumes(tmp_path / "volumes", 6)
    given = settings(
        "pretrain",
        tmp_path,
        volumes,
        teacher={"_target_": "test_dense.teacher"},
        slices=4,
        per_plane=6,
        patch_size=[16, 16, 16],
    )
    run("pretrain", ["train.json", "crop.yaml"], **given)
    (row,) = [json.loads(x) for x in (tmp_path / "eval/history.jsonl").read_text().splitlines()]
    assert row["image"] > 0 and row["text"] == 0 and "image_within_r1" in row
    state = torch.load(tmp_path / "models/student.pt", weights_only=True)
    heads = [name for name in state if name.startswith("heads.")]
    assert heads and all(name.startswith("heads.image") for name in heads)
    files = ["train.json", "crop.yaml", "evaluate.json"]
    run("pretrain", files, **given)
    assert (tmp_path / "eval/retrieval.json").is_file()
