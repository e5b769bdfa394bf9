"""Scores say whether the network was trained on their cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import run, settings

from med3dinsight_ext.training.origin import origin_text, scored, without_images
from med3dinsight_ext.training.record import state_hash

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a segmentation training, with ``data``, of which a split keeps two for testing."""
    root = tmp_path_factory.mktemp("trained")
    fakes.write_volumes(root / "data", 4)
    split = {"development": ["v0", "v1"], "test": ["v2", "v3"]}
    (root / "split.json").write_text(json.dumps(split))
    given = settings("seg-finetune", root, root / "data", backbone=UNET, max_epochs=1)
    given |= {"split": str(root / "split.json"), "val_fraction": 0.5}
    run("seg-finetune", ["train.json"], **given)
    return root


def evaluated(root: Path, data: Path, out: Path, **changes: Any) -> tuple[Any, str]:
    """``cases_from`` and the page of an evaluation."""
    given = settings("seg-finetune", root, data, backbone=UNET, output_dir=str(out), **changes)
    run("seg-finetune", ["train.json", "evaluate.json"], **given)
    found = json.loads((out / "metrics.json").read_text())
    return found["cases_from"], (out / "report.html").read_text()


def test_cases_for_testing_are_others(trained: Path, tmp_path: Path) -> None:
    split = str(trained / "split.json")
    found, page = evaluated(trained, trained / "data", tmp_path, split=split)
    assert found == {"training": 0, "validation": 0, "others": 2}
    assert "<p>Of the 2 cases none was used for training or validation." in page


def test_copies_of_cases_are_known_by_their_content(trained: Path, tmp_path: Path) -> None:
    data = fakes.write_volumes(tmp_path / "copies", 4)
    for path in data.glob("v*.nii.gz"):
        path.rename(path.with_name(f"other_{path.name}"))
    listed = data / "segmentation.json"
    listed.write_text(listed.read_text().replace('"v', '"other_v'))
    found, page = evaluated(trained, data, tmp_path / "eval", val_fraction=0)
    assert found == {"training": 1, "validation": 1, "others": 2}
    assert "warning</span> Of the 4 cases the network was trained on 1: no measure" in page


def weights_with(folder: Path, **record: Any) -> Path:
    """Weights with such a record."""
    state = {"weight": torch.ones(2)}
    torch.save(state, folder / "model.pt")
    found = {"weights_sha256": {"model.pt": state_hash(state)}, **record}
    (folder / "run.json").write_text(json.dumps(found))
    return folder / "model.pt"


def test_cases_of_earlier_rounds_count(trained: Path, tmp_path: Path) -> None:
    data = json.loads((trained / "models" / "run.json").read_text())["data"]
    last = {"training": {"cases": 0, "images": ""}}
    weights = weights_with(tmp_path, data=last, rounds=[{"data": data}])
    images = [str(trained / "data" / f"v{i}.nii.gz") for i in range(4)]
    assert scored(images, weights)["cases_from"] == {"training": 1, "validation": 1, "others": 2}
    unknown = {"training": {"cases": 2, "sha256": "0"}}  # of an earlier version
    weights = weights_with(tmp_path, data=last, rounds=[{"data": unknown}])
    assert scored(images, weights)["cases_from"] is None


def test_volumes_of_a_mean_teacher_and_cases_before_resuming_are_trained_on(
    trained: Path, tmp_path: Path
) -> None:
    data = json.loads((trained / "models" / "run.json").read_text())["data"]
    images = [str(trained / "data" / f"v{i}.nii.gz") for i in range(4)]
    first, second = ({"images": data[name]["images"]} for name in ("training", "validation"))
    none = {"training": {"images": ""}}
    weights = weights_with(tmp_path, data=none | {"unlabelled": first}, rounds=[])
    assert scored(images, weights)["cases_from"] == {"training": 1, "validation": 0, "others": 3}
    earlier = [{"training": first}, {"training": second}]
    weights = weights_with(tmp_path, data=none, data_before_resuming=earlier, rounds=[])
    assert scored(images, weights)["cases_from"] == {"training": 2, "validation": 0, "others": 2}


def test_without_a_record_nothing_is_known(tmp_path: Path) -> None:
    weights = weights_with(tmp_path, data={"training": {"images": ""}}, rounds=[])
    assert scored(["a.nii"], weights)["cases_from"] == {"training": 0, "validation": 0, "others": 1}
    (tmp_path / "run.json").unlink()
    assert scored(["a.nii"], weights)["cases_from"] is None
    assert scored(["a.nii"], None)["cases_from"] is None
    assert "is not recorded" in origin_text(None)


def test_validation_cases_chose_the_epoch() -> None:
    text = origin_text({"training": 0, "validation": 2, "others": 1})
    assert text.startswith("Of the 3 cases 2 were held out for validation, which also chose")


def test_a_published_record_names_no_image() -> None:
    part = {"cases": 2, "images": "a b"}
    data = {"training": part, "validation": part, "datalist": "list.json"}
    bare = {"training": {"cases": 2}, "validation": {"cases": 2}, "datalist": "list.json"}
    record = {"seed": 3, "data": data, "rounds": [{"epochs": 4, "data": data}]}
    want = {"seed": 3, "data": bare, "rounds": [{"epochs": 4, "data": bare}]}
    assert without_images(record) == want
    more = {"data": {"unlabelled": part}, "data_before_resuming": [data], "rounds": []}
    bare_more = {"data": {"unlabelled": {"cases": 2}}, "data_before_resuming": [bare]}
    assert without_images(more) == bare_more | {"rounds": []}
    assert without_images({"seed": 3}) == {"seed": 3, "data": {}, "rounds": []}


@pytest.mark.parametrize(
    "damaged",
    [
        {"data": {"training": {"images": 3}}},
        {"data": {"training": 3}},
        {"data": 3},
        {"data": {"training": {"images": ""}, "validation": {}}},
        {"data": {"training": {"images": ""}}, "rounds": [3]},
        {"data": {"training": {"images": ""}}, "rounds": 3},
    ],
)
def test_from_a_damaged_record_nothing_is_known(damaged: dict[str, Any], tmp_path: Path) -> None:
    weights = weights_with(tmp_path, **damaged)
    assert scored(["a.nii"], weights)["cases_from"] is None
