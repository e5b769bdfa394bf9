"""From pre-training to fine-tuning, for every backbone, and what comes out of it."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import fakes
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from running import BACKBONES, ROOT, inference_settings, run, settings, suits

from med3dinsight_ext.data import datalists as data
from med3dinsight_ext.data import splits
from med3dinsight_ext.data.volumes import check_parts
from med3dinsight_ext.training.transfer_report import TransferReport

SMALL: dict[str, dict[str, Any]] = {  # sizes at which a step takes a second; same wiring
    "swinunetr": {"feature_size": 12},
    "swinunetr_v2": {"feature_size": 12},
    "unetr": {"hidden_size": 48, "mlp_dim": 48, "num_heads": 4, "feature_size": 4},
    "segresnet": {"init_filters": 8},
    "segresnetds": {"init_filters": 8},
    "unet": {"channels": [4, 8, 8, 16, 16]},
    "basicunet": {"features": [4, 4, 8, 8, 8, 4]},
    "attentionunet": {"channels": [4, 8, 8, 8]},
    "dynunet": {"filters": [4, 8, 8, 16, 16]},
    "mednext": {"_target_": "MedNeXt", "init_filters": 4},
    "densenet121": {"_target_": "DenseNet", "block_config": [2, 2, 2], "init_features": 16},
    "seresnet": {"layers": [1, 1, 1, 1]},
    "vit": {"hidden_size": 48, "mlp_dim": 48, "num_layers": 2, "num_heads": 4},
    "resenc": {"features_per_stage": [4, 8, 8, 8, 16, 16], "n_blocks_per_stage": 1},
}
PATCH = {"swinunetr": [64, 32, 32], "swinunetr_v2": [64, 32, 32], "flexibleunet": [64, 32, 32],
         "resenc": [64, 32, 32],
         "efficientnet": [64, 32, 32], "vnet": [32, 32, 32]}  # fmt: skip
CLASSIFIERS = {"densenet121", "resnet", "seresnet", "efficientnet", "vit"}
REQUIRED = {
    "unet", "basicunet", "attentionunet", "dynunet", "segresnet", "segresnetds", "vnet", "unetr",
    "swinunetr", "swinunetr_v2", "mednext", "flexibleunet", "resenc", *CLASSIFIERS,
}  # fmt: skip
NO_RESENC = "resenc.yaml needs pip install --no-deps dynamic-network-architectures"
MATRIX: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 4)


@pytest.fixture(scope="module", autouse=True)
def matrix_file() -> Any:
    """Writes what the docs show, if asked to: MED3D_WRITE=1 pytest on this file."""
    yield
    if os.environ.get("MED3D_WRITE") and MATRIX:
        path = ROOT / "benchmarks" / "results" / "backbones.json"
        rows = {name: row for name, row in json.loads(path.read_text()).items() if name in REQUIRED}
        path.write_text(json.dumps(dict(sorted((rows | MATRIX).items())), indent=1) + "\n")


def test_the_backbones_promised_have_overlays() -> None:
    assert set(BACKBONES) == set(suits("pretrain")) == set(suits("cls-finetune")) == REQUIRED
    assert set(suits("seg-finetune")) == REQUIRED - CLASSIFIERS


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_backbone_overlay_sets_nothing_else(name: str) -> None:
    assert list(ConfigParser.load_config_file(BACKBONES[name])) == ["backbone"]


@pytest.fixture(scope="module", params=sorted(REQUIRED))
def pretrained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, volumes: Path
) -> tuple[str, Path, dict[str, float]]:
    """A backbone that has been pre-trained for two steps: its name, model.pt, and history row."""
    name = request.param
    if name == "resenc":
        pytest.importorskip("dynamic_network_architectures", reason=NO_RESENC)
    root = tmp_path_factory.mktemp(name)
    small = {f"backbone::{key}": value for key, value in SMALL.get(name, {}).items()}
    changes = settings("pretrain", root, volumes, val_fraction=0, **small)
    changes["patch_size"] = PATCH.get(name, changes["patch_size"])
    run("pretrain", ["train.json", BACKBONES[name]], **changes)
    row = json.loads((root / "eval" / "history.jsonl").read_text())
    return name, root / "models" / "model.pt", row


def finetuned(
    bundle: str, name: str, weights: Path, root: Path, volumes: Path
) -> tuple[Any, dict[str, Any]]:
    """Two steps from these weights, then inference; returns the training and its overrides."""
    small = {f"backbone::{k}": v for k, v in SMALL.get(name, {}).items()}
    if bundle == "cls-finetune":
        small["class_names"] = ["even", "odd"]
    patch = PATCH.get(name, [32, 32, 32])
    overlay = BACKBONES[name]
    changes = settings(bundle, root, volumes, val_fraction=0, pretrained=str(weights), **small)
    changes["patch_size"] = patch
    changes["learning_rate"] = 0.0  # so that what arrived is still there afterwards
    workflow = run(bundle, ["train.json", overlay], **changes)
    given = inference_settings(bundle, root, volumes, **small, **{"patch_size": patch})
    run(bundle, ["inference.json", overlay], **given)
    return workflow, changes


def arrived(workflow: Any, weights: Path) -> TransferReport:
    """The report, once every encoder tensor has been compared with the file."""
    source = torch.load(weights, weights_only=True)
    network = workflow.parser.get_parsed_content("backbone")
    encoder = workflow.parser.get_parsed_content("encoder")
    report = workflow.parser.get_parsed_content("transfer").report
    assert report.encoder_share == 1 and encoder
    state = network.state_dict()
    assert all(torch.equal(state[n], source[n]) for n in {*encoder, *report.loaded} - norms(state))
    return report


def norms(state: dict[str, Any]) -> set[str]:
    """Running statistics move while the weights stay."""
    return {n for n in state if n.endswith(("running_mean", "running_var", "batches_tracked"))}


@pytest.mark.slow
def test_every_backbone_pretrains_arrives_trains_and_infers(
    pretrained: tuple[str, Path, dict[str, float]], tmp_path: Path, volumes: Path
) -> None:
    name, weights, row = pretrained
    assert row["steps"] == 2 and row["image"] > 0 and row["text"] > 0
    assert (row["reconstruction"] > 0) == (name not in CLASSIFIERS)
    line = {"pretrain": "yes" if row["reconstruction"] > 0 else "yes, no reconstruction"}

    workflow, _ = finetuned("cls-finetune", name, weights, tmp_path / "cls", volumes)
    report = arrived(workflow, weights)
    assert not set(report.skipped) & set(workflow.parser.get_parsed_content("encoder"))
    rows = list(csv.DictReader((tmp_path / "cls" / "predictions" / "cases.csv").open()))
    assert len(rows) == 4 and abs(float(rows[0]["p_even"]) + float(rows[0]["p_odd"]) - 1) < 1e-3
    line["cls-finetune"] = "encoder 100 %"

    if name not in CLASSIFIERS:
        workflow, _ = finetuned("seg-finetune", name, weights, tmp_path / "seg", volumes)
        report = arrived(workflow, weights)
        parameters = dict(workflow.parser.get_parsed_content("network_def").named_parameters())
        left = [n for n in report.skipped if n in parameters]
        # all but the last layer's: those that give one channel a class, at each level
        assert all(parameters[n].shape[0] == 2 or 2 in parameters[n].shape[:2] for n in left), left
        assert report.share > 0.6
        image = nib.load(tmp_path / "seg" / "eval" / "v0_seg.nii.gz")
        assert image.shape == (28, 32, 26) and image.get_data_dtype() == np.uint8
        line["seg-finetune"] = f"encoder 100 %, all but {len(left)} tensors of the last layers"
    else:
        line["seg-finetune"] = "–"
    MATRIX[name] = line


ORIENTATIONS = {
    "ras": np.diag([1.0, 1, 1, 1]),
    "lps": np.diag([-1.0, -1, 1, 1]),
    "permuted": np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    "anisotropic": np.diag([0.8, 0.8, 3.0, 1]),
}


def oblique() -> np.ndarray:
    a, b = 0.4, 0.3
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = x @ z @ np.diag([1.2, 1.0, 2.0])
    affine[:3, 3] = (-31, 12, 7)
    return affine


def centroid(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.argwhere(array).mean(0))


@pytest.mark.parametrize("tta_axes", [[], [0, 1]], ids=["plain", "flipped"])
@pytest.mark.parametrize("kind", [*ORIENTATIONS, "oblique"])
def test_a_segmentation_lies_where_the_image_shows_it(
    kind: str, tta_axes: list[int], tmp_path: Path
) -> None:
    affine = ORIENTATIONS.get(kind, oblique())
    shape = (34, 26, 22)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    ball = (
        np.linalg.norm((grid - (22, 9, 12)) * np.linalg.norm(affine[:3, :3], axis=0), axis=-1) < 7
    )
    noise = np.random.default_rng(0).random(shape)
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image((1000 * ball + 100 * noise).astype(np.float32), affine)
    nib.save(image, tmp_path / "in" / "a.nii.gz")
    (tmp_path / "models").mkdir()
    torch.save(fakes.Bright().state_dict(), tmp_path / "models" / "model.pt")
    given = inference_settings(
        "seg-finetune",
        tmp_path,
        tmp_path / "in",
        datalist=None,
        tta_axes=tta_axes,
        backbone={"_target_": "fakes.Bright"},
        spacing=[1.3, 1.3, 1.3],
    )
    given["patch_size"] = [24, 24, 24]
    run("seg-finetune", ["inference.json"], **given)
    found = nib.load(tmp_path / "eval" / "a_seg.nii.gz")
    assert found.shape == shape and np.allclose(found.affine, affine, atol=1e-4)
    mask = np.asarray(found.dataobj)
    shift = centroid(mask, found.affine) - centroid(ball, affine)
    assert np.linalg.norm(shift) < 0.2, shift  # mm
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.9


@pytest.mark.parametrize(("val_fraction", "cases"), [(0.5, 2), (0, 4)])
def test_evaluation_scores_held_out_cases_or_all_on_the_labels_own_grid(
    val_fraction: float, cases: int, tmp_path: Path, volumes: Path
) -> None:
    (tmp_path / "models").mkdir()
    torch.save(fakes.Bright().state_dict(), tmp_path / "models" / "model.pt")
    changes = settings(
        "seg-finetune", tmp_path, volumes, val_fraction=val_fraction, spacing=[2.3] * 3
    )
    changes["backbone"] = {"_target_": "fakes.Bright"}
    run("seg-finetune", ["train.json", "evaluate.json"], **changes)
    results = tmp_path / "eval"
    rows = list(csv.DictReader((results / "cases.csv").open()))
    assert len(rows) == cases and all(0.5 < float(row["dice"]) < 1 for row in rows)
    names = {"cases.csv", "metrics.json", "report.html", "overlays.png", "boxes.png"}
    assert names <= {p.name for p in results.iterdir()}
    used = json.loads((results / "metrics.json").read_text())["inference"]
    assert used == {"ct_range": [-200, 300], "overlap": 0.5, "tta_axes": []} | {
        key: changes[key] for key in ("spacing", "patch_size")
    }
    assert "none of these weights beside" in (results / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("val_fraction", "message"),
    [
        (0.2, "weights must be finite, got NaN or infinity in "),  # one step an epoch
        (0, "loss must be finite, got nan in epoch 1 at step 2 on "),
    ],
)
def test_what_is_not_finite_stops_the_run_at_once(
    val_fraction: float, message: str, tmp_path: Path, volumes: Path
) -> None:
    changes = {"learning_rate": float("inf"), "max_epochs": 3, "backbone::init_filters": 8}
    changes |= {"val_fraction": val_fraction}
    with pytest.raises(RuntimeError) as caught:
        run(
            "seg-finetune", ["train.json"], **settings("seg-finetune", tmp_path, volumes, **changes)
        )
    cause: BaseException = caught.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, ValueError) and str(cause).startswith(message)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["run.json"]


def test_a_volume_smaller_than_the_patch_is_padded(tmp_path: Path, volumes: Path) -> None:
    given = settings("seg-finetune", tmp_path, volumes, val_fraction=0)
    given |= {"patch_size": [48, 40, 48], "backbone::init_filters": 8}
    run("seg-finetune", ["train.json"], **given)
    assert (tmp_path / "models" / "model.pt").exists()  # also without validation cases


@pytest.mark.parametrize(
    ("bundle", "network"),
    [
        ("pretrain", "$torch.compile(@student.to(@device), backend='eager')"),
        ("seg-finetune", "$torch.compile(@network_def.to(@device), backend='eager')"),
        ("seg-finetune", "$@network_def.to(@device, memory_format=torch.channels_last_3d)"),
    ],
)
def test_a_compiled_network_and_another_memory_format_train_the_same_weights(
    bundle: str, network: str, tmp_path: Path, volumes: Path
) -> None:
    found = []
    for name, more in (("plain", {}), ("other", {"network": network})):
        run(bundle, ["train.json"], **settings(bundle, tmp_path / name, volumes, **more))
        found.append(torch.load(tmp_path / name / "models" / "model.pt", weights_only=True))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        off = (found[1][name] - value).abs().float()  # Adam's first steps have the rate's size
        assert off.mean() < 1e-4, name


def test_a_frozen_encoder_and_layer_rates_are_wired(tmp_path: Path, volumes: Path) -> None:
    given = settings("seg-finetune", tmp_path, volumes, val_fraction=0, freeze_epochs=-1)
    given |= {"backbone::init_filters": 8, "layer_decay": 0.1, "accumulation_steps": 2}
    workflow = run("seg-finetune", ["train.json"], **given)
    torch.manual_seed(0)
    encoder = workflow.parser.get_parsed_content("encoder")
    saved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    given["bundle_root"], given["max_epochs"] = str(tmp_path / "other"), 2
    other = run("seg-finetune", ["train.json"], **given)
    more = other.parser.get_parsed_content("network_def").state_dict()
    moved = {name for name in saved if not torch.equal(saved[name], more[name])}
    assert moved and not moved & set(encoder)
    assert len(other.parser.get_parsed_content("optimizer").param_groups) > 3


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_probing_modes_write_a_model_that_evaluates(
    mode: str, tmp_path: Path, volumes: Path
) -> None:
    given = settings("cls-finetune", tmp_path, volumes, mode=mode, val_fraction=0.5)
    given |= {"backbone": {"_target_": "fakes.PlainNet"}, "seed": 1}
    given["class_names"] = ["even", "odd"]
    run("cls-finetune", ["train.json"], **given)
    run("cls-finetune", ["train.json", "evaluate.json"], **given)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == 2
    assert metrics["inference"] == {"ct_range": [-200, 300]} | {
        key: given[key] for key in ("spacing", "patch_size")
    }
    page = (tmp_path / "eval" / "report.html").read_text("utf-8")
    assert "Training run</h2>" in page and "none, the head was fitted" in page


def pretrained_on(archive: Path, root: Path) -> Path:
    """Weights from an archive's images."""
    given = settings("pretrain", root, archive, subset="train", val_fraction=0)
    given |= {"spacing": [1.0] * 3, "patch_size": [16] * 3}
    run("pretrain", ["train.json"], **given, backbone={"_target_": "fakes.PlainNet"})
    return root / "models" / "model.pt"


def test_a_medmnist_archive_is_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 6), ("val", 2), ("test", 4)):
        label = np.arange(count)[:, None] % 2
        images = random.integers(0, 100, (count, 16, 16, 16)) + 100 * label[..., None, None]
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": label}
    np.savez(tmp_path / "a.npz", **arrays)
    given = settings("cls-finetune", tmp_path, tmp_path / "a.npz", val_fraction=0, subset="train")
    given |= {"datalist": None, "spacing": [1.0] * 3, "patch_size": [16] * 3}
    given |= {"backbone": {"_target_": "fakes.PlainNet"}}
    given["pretrained"] = str(pretrained_on(tmp_path / "a.npz", tmp_path / "pre"))
    run("cls-finetune", ["train.json"], **given)
    given["subset"] = "test"
    run("cls-finetune", ["train.json", "evaluate.json"], **given)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == 4


def test_folders_named_by_class_are_labels(tmp_path: Path, volumes: Path) -> None:
    for i in range(4):
        folder = tmp_path / "data" / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"v{i}.nii.gz").write_bytes((volumes / f"v{i}.nii.gz").read_bytes())
    given = settings("cls-finetune", tmp_path, tmp_path / "data", val_fraction=0, datalist=None)
    given |= {"backbone": {"_target_": "fakes.PlainNet"}}
    given["class_names"] = ["even", "odd"]
    workflow = run("cls-finetune", ["train.json"], **given)
    labels = {
        Path(item["image"]).name: item["label"]
        for item in workflow.parser.get_parsed_content("train_items")
    }
    assert labels == {f"v{i}.nii.gz": i % 2 for i in range(4)}


def test_volumes_beyond_max_cases_are_not_read(tmp_path: Path, volumes: Path) -> None:
    given = settings("cls-finetune", tmp_path, volumes, val_fraction=0, max_cases=2)
    given |= {"backbone": {"_target_": "fakes.PlainNet"}, "class_names": ["even", "odd"]}
    items = data.class_items(data.datalist(given["datalist"], volumes), given["class_names"])
    chosen = splits.take(items, 2)
    rows = [{**item, "image": str(tmp_path / f"{i}.nii.gz")} for i, item in enumerate(items)]
    for item, row in zip(items, rows, strict=True):
        good = Path(item["image"]).read_bytes()
        Path(row["image"]).write_bytes(good if item in chosen else b"no volume")
    given["datalist"] = str(tmp_path / "rows.json")
    Path(given["datalist"]).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"got {len(items) - 2} bad of {len(items)}"):
        check_parts([rows])
    parser = run("cls-finetune", ["train.json"], **given).parser
    assert len(parser.get_parsed_content("train_items")) == 2
