"""cls-finetune with teacher.yaml: trained, evaluated and applied as any other classifier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_volumes
from running import inference_settings, run, settings

TEACHER = {"_target_": "test_dense.teacher"}
CLASSES = ["even", "odd"]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"), 6)


def given(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    own = {"teacher": TEACHER, "class_names": CLASSES, "val_fraction": 0.34}
    return settings("cls-finetune", root, volumes) | own | changes


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_it_is_fitted_evaluated_and_applied(mode: str, tmp_path: Path, volumes: Path) -> None:
    about = given(tmp_path, volumes, mode=mode)
    run("cls-finetune", ["train.json", "teacher.yaml"], **about)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert not any(name.startswith("network") for name in state) and len(state) == 3
    record = json.loads((tmp_path / "models" / "run.json").read_text())
    assert record["weights_sha256"] and record["data"]["training"]["cases"] == 4
    run("cls-finetune", ["train.json", "teacher.yaml", "evaluate.json"], **about)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["n"] == 2
    assert (tmp_path / "eval" / "report.html").exists()
    rows = (tmp_path / "eval" / "cases.csv").read_text().splitlines()
    applied = inference_settings("cls-finetune", tmp_path, volumes, class_names=CLASSES, mode=mode)
    applied |= {"teacher": TEACHER}
    run("cls-finetune", ["inference.json", "teacher.yaml"], **applied)
    assert (tmp_path / "eval" / "cases.csv").read_text().splitlines() == rows
    others = (tmp_path / "predictions" / "cases.csv").read_text().splitlines()
    assert len(others) == 7
    score = {row.split(",")[0]: float(row.split(",")[-1]) for row in others[1:]}
    for row in rows[1:]:
        assert score[row.split(",")[0]] == pytest.approx(float(row.split(",")[-1]), abs=1e-4)


def test_a_pretrained_network_joins_it(tmp_path: Path, volumes: Path) -> None:
    backbone = {"_target_": "fakes.PlainNet"}
    network = run(
        "cls-finetune",
        ["train.json", "teacher.yaml"],
        **given(tmp_path / "a", volumes, backbone=backbone),
    )
    weights = network.parser.get_parsed_content("backbone").state_dict()
    torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "w.pt")
    about = given(tmp_path, volumes, backbone=backbone, pretrained=str(tmp_path / "w.pt"))
    run("cls-finetune", ["train.json", "teacher.yaml"], **about)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    own = {name: value for name, value in state.items() if name.startswith("network.")}
    assert own and all(
        torch.equal(value, weights[name.removeprefix("network.")] + 1)
        for name, value in own.items()
    )
    run("cls-finetune", ["train.json", "teacher.yaml", "evaluate.json"], **about)


def test_other_settings_than_those_of_the_training_are_an_error(
    tmp_path: Path, volumes: Path
) -> None:
    run("cls-finetune", ["train.json", "teacher.yaml"], **given(tmp_path, volumes))
    files = ["train.json", "teacher.yaml", "evaluate.json"]
    with pytest.raises(RuntimeError) as error:
        run("cls-finetune", files, **given(tmp_path, volumes, per_plane=3))
    assert "per_plane must be those of the training" in str(error.getrepr(chain=True))


def test_pretrained_weights_without_a_backbone_are_an_error(tmp_path: Path, volumes: Path) -> None:
    with pytest.raises(RuntimeError) as error:
        run(
            "cls-finetune",
            ["train.json", "teacher.yaml"],
            **given(tmp_path, volumes, pretrained="w.pt"),
        )
    assert "no backbone; add the backbone overlay" in str(error.getrepr(chain=True))
