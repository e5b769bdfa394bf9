"""Published bundles repeat the training that models/run.json records."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
import yaml
from running import ROOT, merged, run, settings

from med3dinsight_ext.monailabel.label_bundle import label_bundle
from med3dinsight_ext.publishing.checks.documents import check_record
from med3dinsight_ext.publishing.checks.folder import PublishedFolder, Skipped
from med3dinsight_ext.publishing.publish import publish
from med3dinsight_ext.publishing.verify import file_checks
from med3dinsight_ext.reports.run_facts import ROWS

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [2, 4], "strides": [2]}  # fmt: skip
NAME = "ball_segmentation"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 5)


def overrides(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    return settings(
        "seg-finetune",
        root,
        volumes,
        backbone=UNET,
        max_epochs=2,
        label_names=["background", "Ball"],
        seed=7,
        **changes,
    )


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Path:
    """bundle_root of a run with two epochs; train.json says 200."""
    root = tmp_path_factory.mktemp("training")
    assert merged("seg-finetune", "train.json")["max_epochs"] == 200
    run("seg-finetune", ["train.json"], **overrides(root, volumes))
    return root


def published(training: Path, out: Path, **changes: Any) -> Path:
    given = {
        "bundle": str(ROOT / "bundles" / "seg-finetune"),
        "name": NAME,
        "out": str(out),
        "weights": str(training / "models" / "model.pt"),
    }
    publish(**given | changes)
    return out / str(changes.get("name", NAME))


@pytest.fixture(scope="module")
def folder(training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(training, tmp_path_factory.mktemp("out"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / NAME))


def row(folder: Path, key: str) -> str:
    text = (folder / "docs" / "README.md").read_text()
    (found,) = re.findall(rf"^\| {re.escape(key)} \| (.*) \|$", text, re.MULTILINE)
    return found


def test_the_card_has_the_epochs_that_ran(folder: Path, training: Path) -> None:
    record = json.loads((training / "models" / "run.json").read_text())
    assert row(folder, "epochs").startswith(f"2; the weights are of epoch {record['best_epoch']}, ")
    assert "200 epochs" not in (folder / "docs" / "README.md").read_text()


def test_inference_of_an_edited_copy_reads_volumes_as_its_training_did(
    training: Path, tmp_path: Path
) -> None:
    """As after ``init``: the shared settings of training are edited, those of inference not."""
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles")
    record = json.loads((training / "models" / "run.json").read_text())["config"]
    shared = tmp_path / "bundles" / "shared" / "train.json"
    edited = json.loads(shared.read_text()) | {"spacing": record["spacing"], "ct_range": [-99, 99]}
    shared.write_text(json.dumps(edited))
    copied = shutil.copytree(training, tmp_path / "run")
    run_file = copied / "models" / "run.json"
    content = json.loads(run_file.read_text())
    content["config"]["ct_range"] = [-99, 99]
    run_file.write_text(json.dumps(content))
    out = published(copied, tmp_path, bundle=str(tmp_path / "bundles" / "seg-finetune"))
    inference = json.loads((out / "configs" / "inference.json").read_text())
    assert (inference["spacing"], inference["ct_range"]) == (record["spacing"], [-99, 99])


def test_inference_mirrors_as_training_decided_from_the_labels(
    folder: Path, training: Path
) -> None:
    record = json.loads((training / "models" / "run.json").read_text())
    config = json.loads((folder / "configs" / "inference.json").read_text())
    assert record["evaluated"]["mirror"][:2] == [config["mirror_axes"], config["mirror_pairs"]]
    assert record["config"]["mirror_axes"] == "auto"


@pytest.mark.parametrize(
    ("key", "start"),
    [
        ("cases", "4 for training (fingerprint "),
        ("seed", "7"),
        ("batch size", "2"),
        ("learning rate", "0.002"),
        ("device", "cpu"),
        ("pre-trained from", "nothing, from scratch"),
    ],
)
def test_the_card_has_what_ran(key: str, start: str, folder: Path) -> None:
    assert row(folder, key).startswith(start)


def test_published_configs_repeat_the_run(folder: Path) -> None:
    train, inference = (
        json.loads((folder / "configs" / f"{name}.json").read_text())
        for name in ("train", "inference")
    )
    plain = merged("seg-finetune", "train.json")
    assert (train["max_epochs"], train["seed"], train["num_workers"]) == (2, 7, 0)
    for config in (train, inference):
        assert config["backbone"] == UNET and config["patch_size"] == [32, 32, 32]
        assert config["label_names"] == ["background", "Ball"]
        assert config["device"] == plain["device"] and config["dataset_dir"] == "data"
    assert "max_epochs" not in inference


def test_a_recorded_bundle_passes_the_file_checks(folder: Path) -> None:
    found = {check.name: check for check in file_checks(folder)}
    assert {name: c.state for name, c in found.items() if c.state != "ok"} == {"schema": "skip"}
    assert found["record"].text == "2 epochs, 4 cases"


def test_nothing_personal_travels(folder: Path, training: Path, volumes: Path) -> None:
    texts = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert folder / "models" / "run.json" in texts
    for place in (training, volumes, ROOT, Path.home()):
        assert not [path for path, data in texts.items() if f"{place}/".encode() in data]
    published = json.loads(texts[folder / "models" / "run.json"])
    assert "command" not in published and published["data"]["training"].keys() == {
        "cases",
        "sha256",
    }


def test_weights_of_another_training_are_refused(training: Path, tmp_path: Path) -> None:
    models = shutil.copytree(training / "models", tmp_path / "models")
    state = torch.load(models / "model.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, models / "model.pt")
    with pytest.raises(ValueError, match=r"models/run.json must be the record of .*/model.pt"):
        published(tmp_path, tmp_path / "out")


def test_weights_without_a_record_are_published_as_such(training: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(training / "models" / "model.pt", tmp_path / "models")
    overlay = tmp_path / "overlay.yaml"
    kept = ("spacing", "patch_size", "backbone", "label_names")
    given = overrides(tmp_path, tmp_path)
    overlay.write_text(yaml.safe_dump({key: given[key] for key in kept}))
    found = published(tmp_path, tmp_path / "out", overlays=str(overlay))
    assert {row(found, key) for key in ROWS} == {"not recorded"}
    assert not (found / "models" / "run.json").exists()
    with pytest.raises(Skipped, match=r"models/run.json is missing"):
        check_record(PublishedFolder(found))


def test_overlays_may_repeat_the_record_but_not_contradict_it(
    training: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"max_epochs": 2, "backbone": UNET, "dataset_dir": "x"}))
    assert published(training, tmp_path / "out", overlays=str(overlay)).is_dir()
    overlay.write_text(yaml.safe_dump({"max_epochs": 14}))
    with pytest.raises(ValueError, match=r"overlays must agree .* got max_epochs 14, trained wi"):
        published(training, tmp_path / "other", overlays=str(overlay))


def test_a_click_network_must_have_been_trained_with_clicks(training: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="click must agree with run.json, got True"):
        published(training, tmp_path / "out", name="ball_deepedit", click=True)


def test_verify_finds_other_weights(copy: Path) -> None:
    state = torch.load(copy / "models" / "model.pt", weights_only=True)
    state[next(iter(state))] += 1
    torch.save(state, copy / "models" / "model.pt")
    with pytest.raises(ValueError, match=r"run.json must be the record of .*/models/model.pt"):
        check_record(PublishedFolder(copy))


def test_verify_finds_another_training_config(copy: Path) -> None:
    path = copy / "configs" / "train.json"
    path.write_text(path.read_text().replace('"max_epochs": 2,', '"max_epochs": 200,'))
    with pytest.raises(ValueError, match=r"train.json has max_epochs 200, models/run.json 2"):
        check_record(PublishedFolder(copy))


@pytest.mark.parametrize(("old", "new"), [("| epochs | 2;", "| epochs | 9;"), ("| 4 for", "| 5 f")])
def test_verify_finds_another_card(old: str, new: str, copy: Path) -> None:
    path = copy / "docs" / "README.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"docs/README.md lacks the line \| (epochs|cases) \|"):
        check_record(PublishedFolder(copy))


def test_a_round_of_monai_label_is_published_without_its_files(
    training: Path, volumes: Path, tmp_path: Path
) -> None:
    shutil.copytree(training, tmp_path, dirs_exist_ok=True)
    items = [
        {"image": str(volumes / f"v{i}.nii.gz"), "label": str(volumes / "labels" / f"v{i}.nii.gz")}
        for i in range(3)
    ]
    plain = merged("seg-finetune", "train.json")["train"]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(tmp_path / "models" / "model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    given = overrides(tmp_path, volumes) | {
        "train#handlers": [loader, *plain["handlers"]],
        "train#dataset#data": items,
        "validate#dataset#data": [],
        "train#trainer#max_epochs": 1,
        "datalist": None,
    }
    run("seg-finetune", ["train.json"], **given)
    found = published(tmp_path, tmp_path / "out")
    train = json.loads((found / "configs" / "train.json").read_text())["train"]
    assert train["dataset"]["data"] == plain["dataset"]["data"]
    assert train["handlers"] == plain["handlers"] and train["trainer"]["max_epochs"] == 1
    assert row(found, "epochs") == "1; the weights are of epoch 1; after a round of 2 epochs"
    assert row(found, "cases").startswith("3 for training")
    assert str(volumes) not in (found / "models" / "run.json").read_text()


def test_clicks_are_published_from_the_record(volumes: Path, tmp_path: Path) -> None:
    given = overrides(tmp_path, volumes, val_fraction=0) | {"max_epochs": 1}
    del given["backbone"]
    overlay = tmp_path / "overlay.yaml"
    small = {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "out_channels": "@out_channels",
        "init_filters": 8,
        "blocks_down": [1, 1],
        "blocks_up": [1],
    }
    overlay.write_text(yaml.safe_dump({"backbone": small}))
    run("seg-finetune", ["train.json", overlay, "click.yaml"], **given)
    with pytest.raises(ValueError, match="name must have a name with deepedit"):
        published(tmp_path, tmp_path / "out")
    found = published(tmp_path, tmp_path / "out", name="ball_deepedit", overlays=str(overlay))
    inference = json.loads((found / "configs" / "inference.json").read_text())
    assert inference["backbone"]["in_channels"] == "@click_channels"
    assert "AddClicksd" in str(inference["preprocessing"]) and "max_clicks" not in inference
    assert check_record(PublishedFolder(found)) == "1 epochs, 5 cases"


def changed(training: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the training's weights whose record has another config."""
    shutil.copytree(training / "models", folder / "models")
    path = folder / "models" / "run.json"
    record = json.loads(path.read_text())
    change(record["config"])
    path.write_text(json.dumps(record))
    return folder


def test_inference_takes_imports_and_new_keys_and_keeps_its_own_run(
    training: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["run"].append("$print(1)")
        config["imports"].append("$import math")
        config["width"] = 3

    own = json.loads((ROOT / "bundles/seg-finetune/configs/inference.json").read_text())
    found = published(changed(training, tmp_path, change), tmp_path / "out")
    inference = json.loads((found / "configs" / "inference.json").read_text())
    assert inference["run"] == own["run"] and inference["width"] == 3
    assert inference["imports"] == [*own["imports"], "$import math"]


def test_volumes_read_in_another_way_than_inference_does_are_not_published(
    training: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["load_transforms"][1] = {"_target_": "NormalizeIntensityd", "keys": "image"}

    changed(training, tmp_path, change)
    with pytest.raises(ValueError, match="load_transforms must be the bundle's own, got others"):
        published(tmp_path, tmp_path / "out")


def test_pretrained_weights_stand_in_the_card_without_their_place(
    training: Path, volumes: Path, tmp_path: Path
) -> None:
    split = {"development": [f"v{i}" for i in range(4)], "test": ["v4"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    more = {"split": str(tmp_path / "split.json"), "pretrained": str(training / "models/model.pt")}
    run("seg-finetune", ["train.json"], **overrides(tmp_path, volumes, **more))
    found = published(tmp_path, tmp_path / "out")
    start = row(found, "pre-trained from")
    assert re.fullmatch(r"`model.pt`, sha256 `[0-9a-f]{64}`, 100 % of the encoder", start)
    assert str(tmp_path) not in (found / "models" / "run.json").read_text()
    assert check_record(PublishedFolder(found)) == "2 epochs, 3 cases"


@pytest.mark.parametrize(
    ("bundle", "task", "changes", "said"),
    [
        ("pretrain", "pretraining", {}, "1; the weights are of epoch 1, image_within_r1 "),
        ("cls-finetune", "classification", {"mode": "knn"}, "none, the head was fitted"),
        ("cls-finetune", "classification", {"mode": "linear"}, "none, the head was fitted"),
        ("cls-finetune", "classification", {"val_fraction": 0}, "1; the weights are of epoch 1"),
    ],
)
def test_every_bundle_is_published_from_its_record(
    bundle: str, task: str, changes: dict[str, Any], said: str, volumes: Path, tmp_path: Path
) -> None:
    names = {"class_names": ["even", "odd"]} if bundle == "cls-finetune" else {}
    given = settings(bundle, tmp_path, volumes, backbone=UNET, **names, **changes)
    run(bundle, ["train.json"], **given)
    path = tmp_path / "models" / "run.json"
    record = json.loads(path.read_text())
    if bundle == "pretrain":  # a fake of the tests cannot be published
        record["config"]["teacher"] = merged(bundle, "train.json")["teacher"]
        path.write_text(json.dumps(record))
    source = str(ROOT / "bundles" / bundle)
    found = published(tmp_path, tmp_path / "out", bundle=source, name=f"ball_{task}")
    assert row(found, "epochs").startswith(said)
    assert check_record(PublishedFolder(found)).startswith(f"{record['epochs']} epochs, ")


def test_a_bundle_for_monai_label_keeps_the_record(training: Path, tmp_path: Path) -> None:
    label_bundle(str(tmp_path / NAME), str(training / "models" / "model.pt"))
    config = json.loads((tmp_path / NAME / "configs" / "train.json").read_text())
    assert config["max_epochs"] == 2 and config["backbone"] == UNET
    copied = tmp_path / NAME / "models" / "run.json"
    assert copied.read_bytes() == (training / "models" / "run.json").read_bytes()


def test_a_training_on_several_processes_is_published_for_one(
    training: Path, tmp_path: Path
) -> None:
    shutil.copytree(training / "models", tmp_path / "models")
    path = tmp_path / "models" / "run.json"
    record = json.loads(path.read_text())
    own = merged("seg-finetune", "train.json", "multi_gpu_train.json")
    launched = ("device", "network", "initialize", "finalize")
    record["config"] |= {key: own[key] for key in launched}
    record["config"]["train"]["sampler"] = own["train"]["sampler"]
    path.write_text(json.dumps(record))
    train = json.loads((published(tmp_path, tmp_path / "out") / "configs/train.json").read_text())
    plain = merged("seg-finetune", "train.json")
    assert {key: train[key] for key in launched} == {key: plain[key] for key in launched}
    assert train["train"]["sampler"] == plain["train"]["sampler"]
