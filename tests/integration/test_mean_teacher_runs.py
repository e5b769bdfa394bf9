"""seg-finetune with mean_teacher.yaml: unlabelled volumes beside the labelled ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import NETWORKS, ROOT, Killed, run, settings
from torch import Tensor

from med3dinsight_ext.publishing.bundle import merged_configs
from med3dinsight_ext.publishing.publish import publish
from med3dinsight_ext.publishing.verify import file_checks
from med3dinsight_ext.training import engine

OVERLAYS = ["train.json", "mean_teacher.yaml"]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("labelled"), 5)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("more"), 3, (30, 28, 36))


def given(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    own = {"max_epochs": 2, "label_names": ["background", "Ball"], "ema_decay": 0.9}
    small = {"patch_size": [16, 16, 16], "patches_per_volume": 2}
    return (
        settings("seg-finetune", root, volumes) | NETWORKS["seg-finetune"] | own | small | changes
    )


def state(root: Path) -> dict[str, Tensor]:
    """Weights and their mean after the last step."""
    saved = torch.load(root / "models" / "last.ckpt", weights_only=True)
    return {**saved["network"], **saved["average"]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Path:
    root = tmp_path_factory.mktemp("plain")
    run("seg-finetune", ["train.json"], **given(root, volumes))
    return root


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, volumes: Path, more: Path) -> Path:
    root = tmp_path_factory.mktemp("taught")
    run("seg-finetune", OVERLAYS, **given(root, volumes, unlabelled=str(more)))
    return root


def test_unlabelled_volumes_change_the_weights(
    taught: Path, plain: Path, volumes: Path, more: Path, tmp_path: Path
) -> None:
    assert not same(state(taught), state(plain))
    data = json.loads((taught / "models" / "run.json").read_text())["data"]
    assert (data["training"]["cases"], data["unlabelled"]["cases"]) == (4, 3)
    assert len(data["unlabelled"]["images"].split()) == 3
    one = tmp_path / "one.json"
    one.write_text(json.dumps([{"image": str(more / "v0.nii.gz")}]))
    run("seg-finetune", OVERLAYS, **given(tmp_path / "run", volumes, unlabelled=str(one)))
    assert not same(state(taught), state(tmp_path / "run"))


def test_a_weight_of_zero_is_the_plain_training(
    plain: Path, volumes: Path, more: Path, tmp_path: Path
) -> None:
    changes = {"unlabelled": str(more), "consistency_weight": 0}
    run("seg-finetune", OVERLAYS, **given(tmp_path, volumes, **changes))
    assert same(state(plain), state(tmp_path))


@pytest.mark.parametrize("step", [3, 4])
def test_a_killed_run_ends_where_another_ends(
    step: int,
    taught: Path,
    volumes: Path,
    more: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "CHECK_STEPS", 1)
    cut = given(tmp_path, volumes, unlabelled=str(more), checkpoint_minutes=1e-9)
    kill = {"_target_": "running.KillAt", "step": step}
    with pytest.raises(Killed):
        run("seg-finetune", OVERLAYS, **cut, **{"train_handlers::kill": kill})
    run("seg-finetune", OVERLAYS, **cut)
    assert same(state(taught), state(tmp_path))


@pytest.mark.parametrize("part", ["labelled or validation", "test"])
@pytest.mark.parametrize("weight", [0, 1])
def test_known_cases_are_refused(part: str, weight: float, volumes: Path, tmp_path: Path) -> None:
    split, listed = tmp_path / "split.json", tmp_path / "list.json"
    split.write_text(json.dumps({"development": ["v0", "v1", "v2"], "test": ["v3", "v4"]}))
    name = "v4" if part == "test" else "v0"
    listed.write_text(json.dumps([{"image": str(volumes / f"{name}.nii.gz")}]))
    changes = {"split": str(split), "unlabelled": str(listed), "consistency_weight": weight}
    with pytest.raises(RuntimeError) as error:
        run("seg-finetune", OVERLAYS, **given(tmp_path / "run", volumes, **changes))
    message = "unlabelled must hold no labelled, validation or test case, got 1: "
    assert message in str(error.getrepr(chain=True))


def test_a_mean_of_the_weights_is_needed(volumes: Path, more: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as error:
        run("seg-finetune", OVERLAYS, **given(tmp_path, volumes, unlabelled=str(more), ema_decay=0))
    assert "ema_decay must be above 0 for a mean teacher, got 0" in str(error.getrepr(chain=True))


def test_an_adapted_teacher_is_not_published(tmp_path: Path) -> None:
    overlay = tmp_path / "teacher.yaml"
    overlay.write_text("teacher:\n  weights: adapted.safetensors\n")
    with pytest.raises(ValueError, match=r"teacher::weights must be none .*, got adapted\.safet"):
        merged_configs(ROOT / "bundles" / "seg-finetune", str(overlay))


def test_it_is_published_without_its_list(taught: Path, more: Path, tmp_path: Path) -> None:
    weights = str(taught / "models" / "model.pt")
    publish(str(ROOT / "bundles" / "seg-finetune"), weights, "ball_segmentation", str(tmp_path))
    folder = tmp_path / "ball_segmentation"
    train = json.loads((folder / "configs" / "train.json").read_text())
    assert train["unlabelled"] is None and "mean_teacher" in train["train_handlers"]
    found = {check.name: check.state for check in file_checks(folder)}
    assert {name: s for name, s in found.items() if s != "ok"} == {"schema": "skip"}
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert texts and not [text for text in texts if str(more).encode() in text]
