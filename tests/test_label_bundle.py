"""Trained networks as folders for MONAI Label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fakes import write_volumes
from monai.bundle import ConfigParser, ConfigWorkflow

from med3dinsight_ext.label import class_names, find_bundles
from med3dinsight_ext.label_bundle import label_bundle

SMALL = {
    "label_names": ["background", "Ball"], "spacing": [2.0] * 3, "patch_size": [32] * 3,
    "backbone": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1,
                 "out_channels": "@out_channels", "channels": [2, 4], "strides": [2]},
}  # fmt: skip


@pytest.fixture
def overlay(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def weights(folder: Path, channels: int) -> str:
    """Weights of the small network with as many input channels."""
    torch.manual_seed(0)
    config = {"out_channels": 2, **SMALL, "net": "@backbone"}
    config["backbone"] = {**SMALL["backbone"], "in_channels": channels}  # type: ignore[dict-item]
    path = folder / f"m{channels}.pt"
    torch.save(ConfigParser(config).get_parsed_content("net").state_dict(), path)
    return str(path)


@pytest.mark.parametrize("click", [False, True])
def test_a_folder_of_its_own_segments_by_itself(click: bool, overlay: str, tmp_path: Path) -> None:
    volumes = write_volumes(tmp_path / "volumes", 1)
    target = tmp_path / ("deepedit_ball" if click else "ball")
    label_bundle(str(target), weights(tmp_path, 3 if click else 1), overlay, click)
    assert find_bundles(str(target)) == [target] and class_names(target) == ["background", "Ball"]
    items = [{"image": str(volumes / "v0.nii.gz")} | ({"Ball": [[14, 16, 13]]} if click else {})]
    (tmp_path / "list.json").write_text(json.dumps(items))
    asked = {"bundle_root": str(target), "datalist": str(tmp_path / "list.json"),
             "dataset_dir": str(volumes), "dataloader::num_workers": 0}  # fmt: skip
    config = str(target / "configs" / "inference.json")
    workflow = ConfigWorkflow(config, logging_file=False, workflow_type="infer", **asked)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    assert (target / "eval" / "v0_seg.nii.gz").exists()


def test_weights_of_another_network_are_an_error_and_leave_nothing(
    overlay: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"weights must be those of the network.*size mismatch"):
        label_bundle(str(tmp_path / "deepedit"), weights(tmp_path, 1), overlay, click=True)
    assert not (tmp_path / "deepedit").exists()


@pytest.mark.parametrize(
    ("target", "overlays", "click", "message"),
    [
        ("ball", "", True, "name with deepedit .* got ball; call it deepedit_ball"),
        ("ball", "missing.yaml", False, "overlays must be files, got missing.yaml"),
        ("", "", False, "target must be a new folder"),
    ],
)
def test_what_cannot_be_made_is_an_error(
    target: str, overlays: str, click: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        label_bundle(str(tmp_path / target), "m.pt", overlays, click)
