"""What a training ran with stands in models/run.json."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
import torch
from monai.bundle import ConfigParser
from running import command, environment, merged, run, settings
from volume_writers import write_dicom

from med3dinsight_ext.data.laterality import Mirror
from med3dinsight_ext.io.errors import wrong_input
from med3dinsight_ext.models import classifier
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.training.history import read_history
from med3dinsight_ext.training.origin import scored
from med3dinsight_ext.training.provenance import cases, running_parser
from med3dinsight_ext.training.provenance import settings as recorded
from med3dinsight_ext.training.record import RunRecord, check_text_teacher, read_record, state_hash

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 4)


def train(bundle: str, root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    """The record of a training."""
    if bundle == "cls-finetune":
        changes = {"class_names": ["even", "odd"], "val_fraction": 0, **changes}
    run(bundle, ["train.json"], **settings(bundle, root, volumes, backbone=UNET, **changes))
    return record(root)


def record(root: Path) -> dict[str, Any]:
    return json.loads((root / "models" / "run.json").read_text())


def hash_of(root: Path, name: str = "model.pt") -> str:
    return state_hash(torch.load(root / "models" / name, weights_only=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> Path:
    """bundle_root of a segmentation training, with a split of which two cases are for testing."""
    root = tmp_path_factory.mktemp("trained")
    split = {"development": ["v0", "v1"], "test": ["v2", "v3"]}
    (root / "split.json").write_text(json.dumps(split))
    train("seg-finetune", root, volumes, max_epochs=2, split=str(root / "split.json"), seed=3)
    return root


def test_a_record_holds_what_ran(trained: Path) -> None:
    found = record(trained)
    expected = {
        "epochs": 2,
        "seed": 3,
        "batch_size": 2,
        "learning_rate": 0.002,
        "device": "cpu",
        "resumed_after": [],
        "rounds": [],
        "pretrained": None,
        "processes": 1,
    }
    assert expected.items() <= found.items()
    assert found["config"]["max_epochs"] == 2 and "_meta_" not in found["config"]
    assert found["evaluated"]["out_channels"] == 2 and found["seconds"] > 0
    assert found["versions"]["torch"] == torch.__version__


def test_cases_for_testing_are_not_among_the_recorded(trained: Path) -> None:
    data = record(trained)["data"]
    assert data["training"]["cases"] == 1 and data["validation"]["cases"] == 1
    assert len(data["split_sha256"]) == 64


def best_of_history(root: Path) -> tuple[int, float]:
    rows = [json.loads(line) for line in (root / "eval" / "history.jsonl").open()]
    dice = [row["val_mean_dice"] for row in rows]
    return 1 + dice.index(max(dice)), pytest.approx(max(dice))


def test_the_best_epoch_is_that_of_the_history(trained: Path) -> None:
    epoch, dice = best_of_history(trained)
    found = record(trained)
    assert found["best_epoch"] == epoch and found["best_metric"] == ["val_mean_dice", dice]


@pytest.mark.slow
def test_the_command_line_gives_the_same_record(
    trained: Path, volumes: Path, tmp_path: Path
) -> None:
    given = settings(
        "seg-finetune",
        tmp_path,
        volumes,
        backbone=UNET,
        max_epochs=2,
        split=str(trained / "split.json"),
        seed=3,
    )
    words = command("seg-finetune", ["train.json"], given)
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = record(trained), record(tmp_path)
    for key in ("started", "seconds", "command"):
        del here[key], there[key]
    here["config"]["bundle_root"] = str(tmp_path)
    assert here == there


def test_names_and_contents_make_the_fingerprint(volumes: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, place: Path) -> str:
        found = train("seg-finetune", tmp_path / name, place, val_fraction=0)
        return found["data"]["training"]["sha256"]

    first = fingerprint("first", volumes)
    copy = fakes.write_volumes(tmp_path / "copy", 4)
    assert fingerprint("moved", copy) == first
    label = copy / "labels" / "v0.nii.gz"
    label.write_bytes((copy / "labels" / "v1.nii.gz").read_bytes())
    assert fingerprint("changed", copy) != first


def test_a_dicom_series_counts_by_its_content(tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        data = [{"image": str(tmp_path / name / "p1"), "label": 1}]
        loader = SimpleNamespace(dataset=SimpleNamespace(data=data))
        return cases({"training": loader}, {}, tmp_path / name, True)["training"]["sha256"]

    for name in ("first", "other"):
        (tmp_path / name).mkdir()
    write_dicom(tmp_path / "first" / "p1", intercept=0.0)
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    assert fingerprint("moved") == fingerprint("first")
    write_dicom(tmp_path / "other" / "p1", intercept=-1000.0)
    assert fingerprint("other") != fingerprint("first")


def test_axes_and_pairs_of_mirroring_are_recorded_whatever_the_classes_are_called() -> None:
    mirror = Mirror((1, 2), ((1, 2),), "spleen/splenule lies on one side")
    parser = ConfigParser({"mirror": "$laterality.mirror()", "store": "$'/srv/x'"})
    evaluated = {"mirror": mirror, "store": "/srv/x"}
    assert recorded(parser, evaluated)["evaluated"] == {"mirror": ((1, 2), ((1, 2),))}


def test_a_resumed_training_keeps_one_record(volumes: Path, tmp_path: Path) -> None:
    first = train("seg-finetune", tmp_path, volumes, max_epochs=2)
    path = tmp_path / "models" / "run.json"
    path.write_text(json.dumps({**first, "started": "once", "seconds": 1000}))
    train("seg-finetune", tmp_path, volumes, max_epochs=3, val_interval=2)
    found = train("seg-finetune", tmp_path, volumes, max_epochs=4)
    assert found["epochs"] == 4 and found["resumed_after"] == [2, 3]
    assert found["started"] == "once" and found["seconds"] > 1000
    assert found["weights_sha256"] == {"model.pt": hash_of(tmp_path)}


def test_a_resumed_training_keeps_the_best_epoch(volumes: Path, tmp_path: Path) -> None:
    first = train("seg-finetune", tmp_path, volumes, max_epochs=2)
    without = {"train_handlers#validation#_disabled_": True}
    found = train("seg-finetune", tmp_path, volumes, max_epochs=3, **without)
    assert (first["epochs"], found["epochs"]) == (2, 3) and first["best_epoch"]
    assert found["best_epoch"] == first["best_epoch"]
    assert found["best_metric"] == first["best_metric"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.5 after 0.002"),
        ({"layer_decay": 0.5}, "layer_decay 0.5 after 1"),
        ({"seed": 4, "val_fraction": 0.5}, "seed 4 after 0, val_fraction 0.5 after"),
    ],
)
def test_other_settings_do_not_resume(
    change: dict[str, Any], message: str, volumes: Path, tmp_path: Path
) -> None:
    train("seg-finetune", tmp_path, volumes)
    for epochs in (1, 2):  # the training is complete, and goes on
        with pytest.raises(Exception) as caught:
            train("seg-finetune", tmp_path, volumes, max_epochs=epochs, **change)
        told = str(wrong_input(caught.value))
        assert re.search(f"last.ckpt: settings must be as before, got {message}", told)


def test_other_cases_are_said_when_a_training_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volumes = fakes.write_volumes(tmp_path / "volumes", 4)
    train("seg-finetune", tmp_path / "run", volumes, val_fraction=0)
    train("seg-finetune", tmp_path / "run", volumes, val_fraction=0, max_epochs=2)
    assert "cases are others" not in caplog.text
    label = volumes / "labels" / "v0.nii.gz"
    label.write_bytes((volumes / "labels" / "v1.nii.gz").read_bytes())
    train("seg-finetune", tmp_path / "run", volumes, val_fraction=0, max_epochs=3)
    assert "training cases are others than before the training was resumed" in caplog.text


def test_cases_before_a_training_was_resumed_with_others_count(
    volumes: Path, tmp_path: Path
) -> None:
    lists = [("v0", "v1"), ("v2", "v3"), ("v2", "v3"), ("v0", "v1")]
    for epochs, names in enumerate(lists, 1):
        split = {"development": names, "test": [f"v{i}" for i in range(4) if f"v{i}" not in names]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        given = {"split": str(tmp_path / "split.json"), "val_fraction": 0, "max_epochs": epochs}
        found = train("seg-finetune", tmp_path / "run", volumes, **given)
        assert len(found["data_before_resuming"]) == (epochs > 1)
        images = [str(volumes / f"{name}.nii.gz") for name in ("v0", "v1", "v2", "v3")]
        known = scored(images, tmp_path / "run/models/model.pt")["cases_from"]
        assert known == {
            "training": min(2 * epochs, 4),
            "validation": 0,
            "others": 4 - known["training"],
        }


def test_volumes_of_a_mean_teacher_before_it_was_resumed_with_others_count(tmp_path: Path) -> None:
    for epoch, name in enumerate("bc"):
        parts = {"training": "a", "unlabelled": name}
        loaders = {
            part: SimpleNamespace(dataset=SimpleNamespace(data=[{"image": image}]))
            for part, image in parts.items()
        }
        record = RunRecord(tmp_path, ["model.pt"], loaders, "cpu", None, epoch)
        torch.save({"weight": torch.full((1,), float(epoch))}, tmp_path / "model.pt")
        record.update(epoch + 1)
        record.finish()
    known = scored(list("abcd"), tmp_path / "model.pt")["cases_from"]
    assert known == {"training": 3, "validation": 0, "others": 1}


def test_a_repeated_case_counts_once_and_soft_labels_apart(tmp_path: Path) -> None:
    items = [{"image": "a"}] * 5 + [{"image": name, "label": "soft"} for name in "bc"]
    loader = SimpleNamespace(dataset=SimpleNamespace(data=items))
    given = {"unlabelled_items": [{"image": "b"}, {"image": "c"}]}
    found = cases({"training": loader}, given, tmp_path, hashed=False)
    assert found["training"] == {"cases": 3, "sha256": None, "unlabelled": 2}


def test_prompts_are_encoded_as_in_the_training(tmp_path: Path) -> None:
    teacher = Teacher(fakes.FakeImages(), fakes.FakeTexts())
    weights = tmp_path / "student.pt"
    assert check_text_teacher(teacher, weights) is teacher
    (tmp_path / "run.json").write_text(json.dumps({"teacher": teacher.fingerprint}))
    assert check_text_teacher(teacher, weights) is teacher and not check_text_teacher(None, weights)
    (tmp_path / "run.json").write_text(json.dumps({"teacher": "image:1|other"}))
    with pytest.raises(ValueError, match="teacher must encode texts as that of .*image:1.other"):
        check_text_teacher(teacher, weights)


@pytest.mark.parametrize("bundle", ["pretrain", "seg-finetune", "cls-finetune"])
def test_the_last_epoch_is_validated_and_can_be_the_best(
    bundle: str, volumes: Path, tmp_path: Path
) -> None:
    found = train(bundle, tmp_path, volumes, max_epochs=3, val_interval=4, val_fraction=0.5)
    rows = read_history(tmp_path / "eval" / "history.jsonl")
    name, value = found["best_metric"]
    assert found["best_epoch"] == 3 and rows[2][name] == value
    assert not any(name in row for row in rows[:2])
    assert found["weights_sha256"]["model.pt"] == hash_of(tmp_path)


def test_pretrained_weights_are_named_by_their_hash(
    trained: Path, volumes: Path, tmp_path: Path
) -> None:
    found = train("seg-finetune", tmp_path, volumes, pretrained=str(trained / "models/model.pt"))
    start = found["pretrained"]
    assert start["file"] == "model.pt" and len(start["sha256"]) == 64
    assert start["encoder_share"] == 1 and start["loaded"] > 0 and start["skipped"] == 0


def test_the_patients_of_the_list_reach_the_choice_of_the_penalty(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(classifier, "select_l2", lambda *_, **given: seen.update(given) or 1.0)
    items = json.loads((volumes / "classification.json").read_text())
    listed = [dict(item, patient=f"p{n // 2}") for n, item in enumerate(items)]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    given = {"datalist": str(tmp_path / "list.json"), "mode": "linear"}
    train("cls-finetune", tmp_path / "run", volumes, **given)
    assert sorted(seen["patients"]) == ["p0", "p0", "p1", "p1"]


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_a_fitted_head_is_recorded_without_epochs(mode: str, volumes: Path, tmp_path: Path) -> None:
    found = train("cls-finetune", tmp_path, volumes, mode=mode)
    assert found["epochs"] == 0 and found["data"]["training"]["cases"] == 4
    assert found["weights_sha256"] == {"model.pt": hash_of(tmp_path)}


@pytest.mark.parametrize(
    ("bundle", "files"),
    [("cls-finetune", ["model.pt"]), ("pretrain", ["model.pt", "student.pt"])],
)
def test_a_record_is_tied_to_all_weights(
    bundle: str, files: list[str], volumes: Path, tmp_path: Path
) -> None:
    found = train(bundle, tmp_path, volumes)
    assert found["weights_sha256"] == {name: hash_of(tmp_path, name) for name in files}
    assert found["epochs"] == 1 and read_record(tmp_path / "models" / "model.pt") == found
    state = torch.load(tmp_path / "models" / files[-1], weights_only=True)
    state[next(iter(state))] += 1
    torch.save(state, tmp_path / "models" / files[-1])
    with pytest.raises(ValueError, match=rf"models/run.json must be .* of .*models/{files[-1]}"):
        read_record(tmp_path / "models" / "model.pt")


def labelled_round(root: Path, volumes: Path, held_out: int, **changes: Any) -> None:
    """Train as MONAI Label does: data and handlers replaced, model.pt loaded by one of them."""
    items = [
        {"image": str(volumes / f"v{i}.nii.gz"), "label": str(volumes / "labels" / f"v{i}.nii.gz")}
        for i in range(4)
    ]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(root / "models" / "model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    handlers = merged("seg-finetune", "train.json")["train"]["handlers"]
    given = settings("seg-finetune", root, volumes, backbone=UNET) | {
        "train#handlers": [loader, *handlers],
        "train#dataset#data": items[held_out:],
        "validate#dataset#data": items[:held_out],
        "train#trainer#max_epochs": 1,
        "datalist": None,
        "dataset_dir": "none",
        **changes,
    }
    run("seg-finetune", ["train.json"], **given)


def test_an_incremental_round_is_recorded_after_the_earlier_ones(
    trained: Path, volumes: Path, tmp_path: Path
) -> None:
    start = str(trained / "models" / "model.pt")
    first = train("seg-finetune", tmp_path, volumes, val_fraction=0, max_epochs=2, pretrained=start)
    labelled_round(tmp_path, volumes, 0)
    found = record(tmp_path)
    assert found["epochs"] == 1 and [row["epochs"] for row in found["rounds"]] == [2]
    assert found["data"]["training"] == first["data"]["training"]
    assert found["pretrained"] == first["pretrained"] and found["pretrained"]["file"] == "model.pt"
    assert found["weights_sha256"] == {"model.pt": hash_of(tmp_path)} != first["weights_sha256"]


def test_a_round_that_keeps_the_weights_keeps_their_record(volumes: Path, tmp_path: Path) -> None:
    first = train("seg-finetune", tmp_path, volumes, val_fraction=0)
    labelled_round(tmp_path, volumes, 1, learning_rate=0.5)
    assert record(tmp_path) == first


def test_what_is_no_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json must be the record of a training"):
        read_record(tmp_path / "model.pt")


def test_outside_of_a_workflow_there_is_no_parser() -> None:
    assert running_parser() is None
