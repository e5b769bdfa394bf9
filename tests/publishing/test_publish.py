"""Published folders: what is in them, that they run alone, and what cannot be published."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fakes import write_volumes
from huggingface_hub import ModelCard
from monai.bundle import ConfigParser
from running import ROOT, configs
from torch import Tensor, nn

from med3dinsight_ext.publishing import publish as publishing
from med3dinsight_ext.publishing import vendoring as vendor
from med3dinsight_ext.publishing.card import read_card
from med3dinsight_ext.publishing.publish import check_places, publish, traces, without_reports
from med3dinsight_ext.publishing.push import push
from med3dinsight_ext.publishing.scores import read_scores
from med3dinsight_ext.publishing.verify import file_checks
from med3dinsight_ext.publishing.zoo import BUNDLED, TEACHER_PINS, imports, teacher_pins
from med3dinsight_ext.training.record import weights_hash

SMALL: dict[str, Any] = {
    "spacing": [2.0] * 3, "patch_size": [32, 16, 24],
    "backbone": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1,
                 "out_channels": "@out_channels", "channels": [2, 4], "strides": [2]},
}  # fmt: skip
NAMES = {
    "ball_segmentation": ("seg-finetune", {"label_names": ["background", "Ball"]}),
    "ball_deepedit": ("seg-finetune", {"label_names": ["background", "Ball"]}),
    "ball_classification": ("cls-finetune", {"class_names": ["even", "odd", "none"]}),
    "ball_pretraining": ("pretrain", {}),
}
TIED = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 7, "std": None, "median": None}
SEGMENTATION: dict[str, Any] = {
    "cases": 7, "tolerance_mm": 1.0, "mean": dict.fromkeys(("dice", "nsd", "hd95"), TIED),
    "classes": {"Ball": {"dice": {**TIED, "mean": 0.25}, "nsd": TIED,
                         "hd95": {**TIED, "mean": None, "low": None, "high": None}}},
}  # fmt: skip
CLASSIFICATION: dict[str, Any] = {
    **{f"{key}{end}": 0.75 for key in ("auroc", "balanced_accuracy", "f1", "ece")
       for end in ("", "_low", "_high")},
    "accuracy": 0.5, "n": 9, "confusion": [[1]],
    "per_class": {name: {"auroc": 0.7, "sensitivity": 0.6, "specificity": 0.5, "f1": 0.4, "n": 3}
                  for name in ("even", "odd", "none")},
}  # fmt: skip
RETRIEVAL = {
    "student": {"image_within_r1": 0.3, "image_within_r1_low": 0.2, "image_within_r1_high": 0.4,
                "image_within_r1_chance": 0.1, "image_within_queries": 48.0},
    "volume_zero": {"image_within_r1": 0.11},
}  # fmt: skip


def overlay(folder: Path, name: str, **changes: Any) -> str:
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **NAMES[name][1], **changes}))
    return str(path)


def trained(folder: Path, name: str) -> dict[str, Any]:
    """What publish takes: the bundle, weights in folder/models, the overlay."""
    bundle, click = NAMES[name][0], "deepedit" in name
    folder.mkdir(parents=True, exist_ok=True)
    files = [configs(bundle) / "inference.json", overlay(folder, name)]
    files += [configs(bundle) / "click_inference.yaml"] if click else []
    config = dict(ConfigParser.load_config_files(list(map(str, files))))
    torch.manual_seed(0)
    network = "student" if bundle == "pretrain" else "network_def"
    built = ConfigParser({**config, "embedding_dims": {"image": 8}}).get_parsed_content(network)
    (folder / "models").mkdir()
    if bundle == "pretrain":
        torch.save(built.state_dict(), folder / "models" / "student.pt")
        built = built.network
    torch.save(built.state_dict(), folder / "models" / "model.pt")
    return {
        "bundle": str(ROOT / "bundles" / bundle),
        "weights": str(folder / "models" / "model.pt"),
        "name": name,
        "overlays": str(folder / "overlay.yaml"),
        "click": click,
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one published folder of each kind."""
    place = tmp_path_factory.mktemp("published")
    for name in NAMES:
        publish(**trained(place / f"training_{name}", name), out=str(place / "out"))
    return place / "out"


@pytest.fixture
def ball(tmp_path: Path) -> dict[str, Any]:
    return trained(tmp_path / "training", "ball_segmentation") | {"out": str(tmp_path / "out")}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_what_the_zoo_asks_and_no_overlay(name: str, published: Path) -> None:
    found = {path for path in files_of(published / name) if not path.startswith("med3d")}
    expected = {
        "LICENSE",
        "README.md",
        "docs/README.md",
        "docs/data_license.txt",
        "models/model.pt",
        "configs/logging.conf",
    }
    stems = ("metadata", "train", "inference", "evaluate", "multi_gpu_train")
    expected |= {f"configs/{stem}.json" for stem in stems}
    if name == "ball_pretraining":
        expected |= {"configs/embed.json", "models/student.pt"}
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_zip_holds_the_folder(name: str, published: Path) -> None:
    with zipfile.ZipFile(published / f"{name}.zip") as archive:
        packed = {entry: archive.read(entry) for entry in archive.namelist()}
    assert packed == {f"{name}/{p}": data for p, data in files_of(published / name).items()}


ALONE = """
import importlib.util, runpy, sys
from pathlib import Path
sys.path[:] = [p for p in sys.path if not (Path(p) / "med3dinsight_ext").is_dir()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
sys.path_hooks[:] = [h for h in sys.path_hooks if "editable" not in repr(h)]
assert importlib.util.find_spec("med3dinsight_ext") is None
sys.argv = ["monai.bundle", *sys.argv[1:]]
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
print("CODE", sys.modules["med3dinsight_ext.training.engine"].__file__)
"""


def inference_words(folder: Path, root: Path) -> list[str]:
    """Arguments of a published bundle's inference on a volume that is written below ``root``."""
    volumes, listed = write_volumes(root / "volumes", 1), root / "list.json"
    listed.write_text(json.dumps([{"image": "v0.nii.gz"}]))
    given = {
        "config_file": folder / "configs" / "inference.json",
        "bundle_root": folder,
        "dataset_dir": volumes,
        "datalist": listed,
        "output_dir": root / "eval",
        "dataloader::num_workers": 0,
    }
    return ["run", *(str(x) for key, value in given.items() for x in (f"--{key}", value))]


def test_inference_runs_elsewhere_without_the_package(published: Path, tmp_path: Path) -> None:
    folder = published / "ball_segmentation"
    words = [*inference_words(folder, tmp_path), "--device", "$torch.device('cpu')"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "eval" / "v0_seg.nii.gz").is_file()
    assert f"CODE {folder / 'med3dinsight_ext' / 'training' / 'engine.py'}" in done.stdout


def test_the_same_input_gives_the_same_bytes(ball: dict[str, Any], tmp_path: Path) -> None:
    publish(**ball)
    renamed = Path(ball["weights"]).rename(tmp_path / "other_name.pt")
    publish(**ball | {"weights": str(renamed), "out": str(tmp_path / "again")})
    first, again = files_of(tmp_path / "out"), files_of(tmp_path / "again")
    assert "ball_segmentation.zip" in first and first == again


def test_only_modules_that_the_configs_reach_travel(published: Path) -> None:
    code = {
        name: {path.stem for path in (published / name / "med3dinsight_ext").rglob("*.py")}
        for name in NAMES
    }
    idle = {"multimodal", "local", "store", "quickstart", "server", "publish", "answer_log"}
    assert {"engine", "volumes", "slicing", "segmentation"} <= code["ball_segmentation"]
    assert not idle & code["ball_segmentation"] and "clicks" not in code["ball_segmentation"]
    clicks = {"clicks", "click_simulation", "click_inferer"}
    assert code["ball_deepedit"] == code["ball_segmentation"] | clicks
    assert "classifier" in code["ball_classification"] and not idle & code["ball_classification"]
    assert {"store", "multimodal"} <= code["ball_pretraining"]
    assert not {"local", "served", "quickstart"} & code["ball_pretraining"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_passes_the_zoos_file_checks(name: str, published: Path) -> None:
    found = list(file_checks(published / name))
    assert [check.name for check in found if check.state == "skip"] == ["record", "schema"]
    assert not [check for check in found if check.state == "FAIL"] and len(found) == 12


def test_vendored_code_is_python_3_10(published: Path) -> None:
    sources = list(published.glob("*/med3dinsight_ext/**/*.py"))
    assert len(sources) > 40
    for path in sources:
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


@pytest.mark.parametrize(
    ("name", "channels", "shape", "names"),
    [
        ("ball_segmentation", 1, [32, 16, 24], ["background", "Ball"]),
        ("ball_deepedit", 5, [32, 16, 24], ["background", "Ball"]),
        ("ball_classification", 1, [], ["even", "odd", "none"]),
        ("ball_pretraining", 1, [32, 16, 24], ["reconstruction"]),
    ],
)
def test_metadata_say_what_the_network_takes_and_returns(
    name: str, channels: int, shape: list[int], names: list[str], published: Path
) -> None:
    metadata = json.loads((published / name / "configs" / "metadata.json").read_text())
    data = metadata["network_data_format"]
    image, pred = data["inputs"]["image"], data["outputs"]["pred"]
    assert (image["num_channels"], image["spatial_shape"]) == (channels, [32, 16, 24])
    assert (pred["num_channels"], pred["spatial_shape"]) == (len(names), shape)
    assert list(pred["channel_def"].values()) == names and pred["dtype"] == "float32"
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    assert metadata["changelog"] == {metadata["version"]: "first version"}


def test_pins_are_those_of_what_is_imported(published: Path) -> None:
    own = json.loads((configs("seg-finetune") / "metadata.json").read_text())
    path = published / "ball_segmentation" / "configs" / "metadata.json"
    found = json.loads(path.read_text())["required_packages_version"]
    assert found.items() <= own["required_packages_version"].items()
    assert {"fire", "nibabel", "pytorch-ignite", "scipy", "tensorboard"} <= set(found)
    assert not {"urllib3", "pillow", "packaging"} & set(found)


@pytest.mark.parametrize("name", ["ball_segmentation", "ball_classification"])
def test_a_bundle_is_of_its_kind_whatever_an_overlay_names(name: str, tmp_path: Path) -> None:
    given = trained(tmp_path / "training", name) | {"out": str(tmp_path / "out")}
    ((key, names),) = NAMES[name][1].items()
    other = {"label_names": "class_names", "class_names": "label_names"}[key]
    overlay(tmp_path / "training", name, **{other: ["u", "v", "w", "x"]})
    publish(**given)
    metadata = json.loads((tmp_path / "out" / name / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(channels.values()) == names
    assert (
        f"- {name.removeprefix('ball_')}\n" in (tmp_path / "out" / name / "README.md").read_text()
    )


def test_expressions_in_overlays_are_told_as_their_values(
    ball: dict[str, Any], tmp_path: Path
) -> None:
    told = {
        "spacing": "$[2.0] * 3",
        "ct_range": "$[-50 * 2, 200]",
        "label_names": "$['background'] + ['*Ball* <b>']",
    }
    overlay(Path(ball["overlays"]).parent, ball["name"], **told)
    publish(**ball)
    folder = tmp_path / "out" / "ball_segmentation"
    text = (folder / "docs" / "README.md").read_text()
    assert "at 2.0 × 2.0 × 2.0 mm" in text and "-100..200 HU" in text
    assert r"2 channels (background, \*Ball\* \<b>)." in text
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(channels.values()) == ["background", "*Ball* <b>"]


def test_an_overlays_teacher_is_still_disabled_without_prompts(tmp_path: Path) -> None:
    given = trained(tmp_path / "training", "ball_pretraining") | {"out": str(tmp_path / "out")}
    teacher = {"_target_": "med3dinsight_ext.teachers.teacher.bundled", "size": 128}
    overlay(tmp_path / "training", "ball_pretraining", teacher=teacher)
    publish(**given)
    found = tmp_path / "out" / "ball_pretraining" / "configs"
    inference, train = (
        json.loads((found / f"{name}.json").read_text())["teacher"]
        for name in ("inference", "train")
    )
    assert inference == {**teacher, "_disabled_": "$not @prompts"} and train == teacher


def test_the_readme_says_where_torchscript_fails(published: Path) -> None:
    texts = {name: (published / name / "docs" / "README.md").read_text() for name in NAMES}
    assert "\nTorchScript: not supported by scripting (" in texts["ball_deepedit"]
    assert "--bundle_root . --use_trace True" in texts["ball_deepedit"]
    assert "not supported" not in texts["ball_segmentation"]
    assert "ckpt_export" in texts["ball_segmentation"]


def test_a_trace_that_returns_something_else_does_not_count() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    image = {"num_channels": 1, "spatial_shape": [2, 2, 2]}
    assert traces(nn.Conv3d(1, 1, 1), image) and not traces(Branch(), image)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ball_segmentation", "patches of 32 × 16 × 24 voxels"),
        ("ball_pretraining", "patches of 32 × 16 × 24 voxels"),
        ("ball_classification", "volumes of 32 × 16 × 24 voxels"),
        ("ball_classification", "pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.23.2"),
        ("ball_classification", "Weights: licence not provided."),
    ],
)
def test_the_readme_is_exact(name: str, part: str, published: Path) -> None:
    assert part in (published / name / "docs" / "README.md").read_text()


SECTIONS = ["# Model Overview", "## Data", "## Training configuration", "### Input", "### Output",
            "## Performance", "## MONAI Bundle Commands", "# References", "# License"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_the_zoos_sections_in_order(name: str, published: Path) -> None:
    lines = (published / name / "docs" / "README.md").read_text().splitlines()
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    told = set("\n".join(lines).replace("'", " ").replace("]", " ").split())
    paths = {path for path in told if path.startswith("configs/")}
    assert paths and all((published / name / path).is_file() for path in paths)


@pytest.mark.parametrize(
    ("name", "scores", "classes", "flat", "row"),
    [
        (
            "segmentation",
            SEGMENTATION,
            ["Ball"],
            {"mean_dice": 0.5, "dice_Ball": 0.25},
            "| Ball | 7 | 0.250 (0.400 to 0.600) | 0.500 (0.400 to 0.600) | – |",
        ),
        (
            "classification",
            CLASSIFICATION,
            ["even", "odd", "none"],
            {"auroc": 0.75, "accuracy": 0.5, "auroc_odd": 0.7},
            "| AUROC | 9 | 0.750 (0.750 to 0.750) | 0.700 | 0.700 | 0.700 |",
        ),
        (
            "pretraining",
            RETRIEVAL,
            [],
            {"image_within_r1": 0.3},
            "| image within R@1 | 48 | 0.300 (0.200 to 0.400) | 0.110 | 0.100 |",
        ),
    ],
)
def test_scores_of_evaluate_become_numbers_and_a_table(
    name: str,
    scores: dict[str, Any],
    classes: list[str],
    flat: dict[str, float],
    row: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    found = read_scores(tmp_path / "metrics.json", name, classes)
    assert flat.items() <= found.flat.items() and row in found.table


def test_a_class_name_stays_in_its_cell(tmp_path: Path) -> None:
    name = "tumor|core\n<b>*"
    scores = {**SEGMENTATION, "classes": {name: SEGMENTATION["classes"]["Ball"]}}
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    found = read_scores(tmp_path / "metrics.json", "segmentation", [name])
    assert r"| tumor\|core \<b>\* | " in found.table


def test_of_two_classes_the_auroc_stands_once(tmp_path: Path) -> None:
    rows = {name: CLASSIFICATION["per_class"][name] for name in ("even", "odd")}
    (tmp_path / "metrics.json").write_text(json.dumps({**CLASSIFICATION, "per_class": rows}))
    found = read_scores(tmp_path / "metrics.json", "classification", ["even", "odd"])
    assert "| AUROC | 9 | 0.750 (0.750 to 0.750) | – | – |" in found.table
    assert [key for key in found.flat if key.startswith("auroc")] == ["auroc"]


@pytest.mark.parametrize(
    ("kind", "scores", "message"),
    [
        ("segmentation", SEGMENTATION, r"with the classes \['Cube'\], got \['Ball'\]"),
        ("classification", CLASSIFICATION, r"\['Cube'\], got \['even', 'odd', 'none'\]"),
    ],
)
def test_scores_of_a_model_with_other_classes_are_an_error(
    kind: str, scores: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=f"metrics must be of a model .*{message}"):
        read_scores(tmp_path / "metrics.json", kind, ["Cube"])


def test_the_file_of_scores_is_named_before_a_long_name_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    rows = dict(zip(("even", "o" * 10**5), CLASSIFICATION["per_class"].values(), strict=False))
    path.write_text(json.dumps({**CLASSIFICATION, "per_class": rows}))
    with pytest.raises(ValueError, match="metrics must be of a model") as raised:
        read_scores(path, "classification", ["even", "odd"])
    assert str(path) in str(raised.value)[:300]


def test_scores_of_another_model_are_not_published(ball: dict[str, Any], tmp_path: Path) -> None:
    other = {**SEGMENTATION, "classes": {"Cube": SEGMENTATION["classes"]["Ball"]}}
    (tmp_path / "metrics.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"the classes \['Ball'\], got \['Cube'\]"):
        publish(**ball, metrics=str(tmp_path / "metrics.json"))


def test_scores_of_cases_of_the_training_are_not_published(
    ball: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    counts = {"training": 1, "validation": 0, "others": 1}
    path.write_text(json.dumps({**SEGMENTATION, "cases_from": counts}))
    with pytest.raises(ValueError, match="that the network was not trained on, got 1 of its"):
        publish(**ball, metrics=str(path))


@pytest.mark.parametrize(
    ("counts", "sentence", "split"),
    [
        (None, "Whether the network was trained on these cases is not recorded.", None),
        ((0, 0, 2), "Of the 2 cases none was used for training or validation.", None),
        ((0, 2, 1), "Of the 3 cases 2 were held out for validation", "validation"),
    ],
)
def test_the_card_says_where_the_scored_cases_come_from(
    counts: tuple[int, ...] | None,
    sentence: str,
    split: str | None,
    ball: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = counts and dict(zip(("training", "validation", "others"), counts, strict=True))
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({**SEGMENTATION, "cases_from": found}))
    publish(**ball, metrics=str(path))
    page = (Path(ball["out"]) / ball["name"] / "README.md").read_text()
    dataset = yaml.safe_load(page.split("---")[1])["model-index"][0]["results"][0]["dataset"]
    assert sentence in page and dataset.get("split") == split


def test_scores_of_another_inference_are_not_published(
    ball: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    own = {"overlap": 0.5, "tta_axes": []}
    for key, value in {"overlap": 0.75, "tta_axes": [0], "spacing": [9.0, 9.0, 9.0]}.items():
        path.write_text(json.dumps({**SEGMENTATION, "inference": {**own, key: value}}))
        with pytest.raises(ValueError, match=rf"inference that is published, got {key} "):
            publish(**ball, metrics=str(path))
    path.write_text(json.dumps({**SEGMENTATION, "inference": own}))
    publish(**ball, metrics=str(path))


def test_scores_of_other_weights_are_not_published(
    ball: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({**SEGMENTATION, "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="metrics must be of the weights that are published"):
        publish(**ball, metrics=str(path))
    own = {**SEGMENTATION, "weights_sha256": weights_hash(ball["weights"])}
    path.write_text(json.dumps(own))
    publish(**ball, metrics=str(path))
    assert "does not name the weights" not in caplog.text
    path.write_text(json.dumps(SEGMENTATION))
    publish(**{**ball, "out": str(tmp_path / "again")}, metrics=str(path))
    assert "metrics.json does not name the weights" in caplog.text


def test_the_frozen_encoders_packages_are_pinned_where_the_network_needs_them() -> None:
    teacher = {"_target_": BUNDLED}
    network = {"_target_": "Classifier", "features": {"teacher": "@teacher"}}
    assert teacher_pins({"network_def": network, "teacher": teacher}) == TEACHER_PINS
    assert teacher_pins({"network_def": {"features": {"teacher": teacher}}}) == TEACHER_PINS
    assert teacher_pins({"network_def": {"_target_": "UNet"}, "teacher": teacher}) == {}
    demo = (ROOT / "setup.cfg").read_text()
    assert all(f"\n    {name}=={pin}\n" in demo for name, pin in TEACHER_PINS.items())


def test_card_and_scores_stand_in_the_folder(ball: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(SEGMENTATION))
    told = {
        "title": "Balls",
        "data": "Seven drawn balls.",
        "data_license": "CC BY-SA 4.0",
        "license": "cc-by-sa-4.0",
        "training": "Seed 3.",
        "limits": "Only balls.",
        "data_source": "drawn balls",
        "references": ["A, B"],
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(told))
    told_in = {"metrics": "metrics.json", "card": "card.yaml"}
    given: dict[str, Any] = {key: str(tmp_path / name) for key, name in told_in.items()}
    publish(**ball, **given, version="0.2.0", changes="rounder")
    folder = tmp_path / "out" / "ball_segmentation"
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"]["mean_dice"] == 0.5 and metadata["name"] == "Balls"
    assert metadata["changelog"] == {"0.2.0": "rounder"} and metadata["references"] == ["A, B"]
    text = (folder / "docs" / "README.md").read_text()
    for part in ("Seven drawn balls.", "Seed 3.", "Only balls.", "| Ball | 7 |", "[1] A, B"):
        assert part in text
    assert (folder / "docs" / "data_license.txt").read_text() == "CC BY-SA 4.0\n"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-sa-4.0" and card.text.strip() == text.strip()
    assert card.data.eval_results[0].metric_value == 0.5


def test_places_of_this_machine_stay_here(ball: dict[str, Any], tmp_path: Path) -> None:
    path = Path(ball["overlays"])
    places = {"dataset_dir": str(tmp_path), "datalist": str(tmp_path / "list.json")}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | places))
    publish(**ball)
    folder = tmp_path / "out" / "ball_segmentation"
    assert json.loads((folder / "configs" / "train.json").read_text())["dataset_dir"] == "data"
    for name, data in files_of(folder).items():
        for place in (tmp_path, ROOT, Path.home()):
            assert f"{place}/".encode() not in data, name


def test_large_files_are_listed_with_their_hash_and_not_packed(
    ball: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(publishing, "LARGE", 30_000)
    path = Path(ball["overlays"])
    wide = {**SMALL["backbone"], "channels": [16, 32]}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"backbone": wide}))
    config = dict(
        ConfigParser.load_config_files([str(configs("seg-finetune") / "inference.json"), str(path)])
    )
    network = ConfigParser(config).get_parsed_content("network_def")
    torch.save(network.state_dict(), ball["weights"])
    with pytest.raises(ValueError, match="large_files_url must be given for models/model.pt"):
        publish(**ball)
    publish(**ball, large_files_url="https://example.org/balls/")
    folder = tmp_path / "out" / "ball_segmentation"
    (row,) = yaml.safe_load((folder / "large_files.yml").read_text())["large_files"]
    digest = hashlib.sha256((folder / "models" / "model.pt").read_bytes()).hexdigest()
    assert row == {
        "path": "models/model.pt",
        "url": "https://example.org/balls/models/model.pt",
        "hash_val": digest,
        "hash_type": "sha256",
    }
    with zipfile.ZipFile(f"{folder}.zip") as archive:
        assert "ball_segmentation/models/model.pt" not in archive.namelist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Balls"}, "name must be task_modality in lower case, got Balls"),
        ({"name": "3_segmentation"}, "name must be task_modality in lower case, got 3_"),
        ({"name": "ball_mr"}, "name must contain the task, got ball_mr; add one of .*segmentation"),
        ({"changes": 2}, "changes must be text, got 2; say what is new"),
        ({"changes": " "}, "changes must be text, got ' '"),
        ({"changes": ()}, r"changes must be text, got \(\)"),
        ({"click": True}, "name must have a name with deepedit"),
        ({"version": "1"}, "version must be three numbers, got 1"),
        ({"bundle": "nowhere"}, "bundle must hold configs/inference.json, got nowhere"),
        ({"overlays": ""}, "weights must be those of the network .* Name the overlays"),
        ({"card": "missing.yaml"}, "card must be a YAML file, got no file at missing.yaml"),
        ({"metrics": "missing.json"}, "metrics must be the file that evaluate wrote"),
    ],
)
def test_what_cannot_be_published_is_an_error_and_leaves_nothing(
    changes: dict[str, Any], message: str, ball: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        publish(**ball | changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ct_range": ["/home/ann/range", 1]},
            r"configs/\w+.json must not .*, got /home/ann/range",
        ),
        ({"extra": {"_target_": "mynet.MyNet"}}, r"must pin .* got none for \['mynet'\]"),
        (
            {"extra": {"_target_": "med3dinsight_ext.mynet.N"}},
            "must name modules .* got .*mynet",
        ),
        ({"label_names": ["a", "b", "c"], "out_channels": 2}, "a channel for each of .* got 2"),
        ({"label_names": [False, True]}, r"label_names must be .* got \[False, True\]; quote them"),
        ({"label_names": ["a", "a"]}, "label_names must be a list of different texts"),
        ({"label_names": ["a", ""]}, "label_names must be a list of different texts"),
        ({"label_names": "ab"}, "label_names must be a list of different texts, got ab"),
        ({"ct_range": None}, "ct_range must be 2 numbers, got None"),
        ({"spacing": 2.0}, "spacing must be 3 numbers, got 2.0"),
    ],
)
def test_overlays_that_would_not_work_elsewhere_are_an_error(
    changes: dict[str, Any], message: str, ball: dict[str, Any], tmp_path: Path
) -> None:
    path = Path(ball["overlays"])
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        publish(**ball)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["$@bundle_root + '/configs/a.json'", "ball/configs/a.json", "x.configs/a.json"]
)
def test_a_path_that_goes_on_from_another_is_no_place_of_this_machine(text: str) -> None:
    check_places({"configs/train.json": text.encode()}, ["/configs"])


@pytest.mark.parametrize(
    "text", ['"/configs/a.json"', "open('/configs/a.json')", "at /configs/a.json"]
)
def test_a_whole_path_is_a_place_of_this_machine(text: str) -> None:
    with pytest.raises(ValueError, match="train.json must not name a place .* got /configs"):
        check_places({"configs/train.json": text.encode()}, ["/configs"])


def test_a_file_is_no_folder_to_publish_in(ball: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="out must be a folder, got the file .*taken"):
        publish(**ball | {"out": str(tmp_path / "taken")})


def test_a_failure_while_writing_leaves_nothing(
    ball: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space left"):
        publish(**ball)
    assert not list((tmp_path / "out").iterdir())


def test_a_second_publication_does_not_overwrite(published: Path, ball: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out must not hold ball_segmentation yet"):
        publish(**ball | {"out": str(published)})


def test_pretraining_needs_the_student_of_the_same_training(tmp_path: Path) -> None:
    given = trained(tmp_path / "training", "ball_pretraining") | {"out": str(tmp_path / "out")}
    path = Path(given["weights"]).with_name("student.pt")
    state = torch.load(path, weights_only=True)
    key = next(key for key in state if key.startswith("network."))
    torch.save({**state, key: state[key] + 1}, path)
    with pytest.raises(ValueError, match="student.pt must hold the network of model.pt"):
        publish(**given)
    path.unlink()
    with pytest.raises(ValueError, match="weights must have student.pt beside them"):
        publish(**given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tite: x", "card must have known keys, got tite in .*; did you mean title"),
        ("license: CC BY", "card license must be SPDX in lower case"),
        ("limits: 3", "card limits must be a str, got 3"),
        ("- x", "card must be a mapping, got list"),
        ("references: [A: B]", "must be texts, got {'A': 'B'} in .*; put quotation marks around"),
        ("data: [x", "card must be a YAML file, got .*card.yaml: while parsing"),
        ("data: \xff", "card must be a YAML file, got .*card.yaml: 'utf-8' codec"),
    ],
)
def test_a_card_that_cannot_be_read_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(content, "latin-1")
    with pytest.raises(ValueError, match=message):
        read_card(tmp_path / "card.yaml")


def test_imports_in_functions_count_and_those_for_type_checkers_do_not() -> None:
    code = "if TYPE_CHECKING:\n  import a\nelse:\n  import b\ndef f():\n  import c\n"
    found = [node.names[0].name for node in imports(ast.parse(code))]
    assert found == ["b", "c"]


def test_templates_travel_with_the_module_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "med3dinsight_ext" / "reports"
    (room / "templates").mkdir(parents=True)
    (room / "templates" / "page.html").write_text("<p>")
    (room / "page.py").write_text("path = __file__ + 'templates'\npath = ('templates',)\n")
    (room / "plain.py").write_text("path = 1\n")
    monkeypatch.setattr(vendor, "SOURCE", tmp_path / "med3dinsight_ext")
    assert list(vendor.vendored(["med3dinsight_ext.reports.plain"])) == [
        "med3dinsight_ext/reports/plain.py"
    ]
    found = vendor.vendored(["med3dinsight_ext.reports.page"])
    assert found["med3dinsight_ext/reports/templates/page.html"] == "<p>" and len(found) == 2


def test_handlers_that_draw_are_not_published() -> None:
    writer = {"_target_": "med3dinsight_ext.training.inferers.TokenWriter"}
    figures = {"_target_": "med3dinsight_ext.reports.text.TextFigures"}
    assert without_reports([writer, figures, "@other"]) == [writer, "@other"]
    assert without_reports({"write": writer, "draw": figures}) == {"write": writer}


def test_without_the_formatters_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "black", None)
    with pytest.raises(ValueError, match=r'got no black; pip install -e ".\[publish\]"'):
        vendor.formatted.__wrapped__(Path(vendor.__file__))


@pytest.mark.parametrize("name", NAMES)
def test_a_push_leaves_out_nothing_that_publish_wrote(
    name: str, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(str(published / name), "ann/ball")
    told = capsys.readouterr().out
    assert f"uploads {len(files_of(published / name))} files" in told


def test_a_dry_push_lists_the_files_and_sends_nothing(
    published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    push(str(published / "ball_segmentation"), "ann/ball")
    told = capsys.readouterr().out
    assert "models/model.pt" in told and "other" in told and "nothing was sent" in told


def test_a_folder_inside_of_eval_is_pushed_whole(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(published / "ball_segmentation", tmp_path / "eval" / "ball")
    (folder / "eval").mkdir()
    (folder / "eval" / "mine.json").touch()
    push(str(folder), "ann/ball")
    told = capsys.readouterr().out
    assert "models/model.pt" in told and "mine.json" not in told


@pytest.mark.parametrize(
    ("folder", "repo", "dry_run", "message"),
    [
        ("ball_segmentation", "ann/ball", False, "push must have a token, got none"),
        ("ball_segmentation", "ball", True, "repo must be owner/name, got ball"),
        ("ball_segmentation", "ann/ball", "no", "dry_run must be True or False"),
        (".", "ann/ball", True, "folder must come from publish, got .* without README.md"),
    ],
)
def test_what_cannot_be_pushed_is_an_error(
    folder: str,
    repo: str,
    dry_run: Any,
    message: str,
    published: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        push(str(published / folder), repo, dry_run)


def test_a_folder_whose_card_lost_its_licence_is_not_pushed(
    published: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(published / "ball_segmentation", tmp_path / "ball")
    (folder / "README.md").write_text("---\nlibrary_name: monai\n---\n")
    with pytest.raises(ValueError, match="must have a license"):
        push(str(folder), "ann/ball")
