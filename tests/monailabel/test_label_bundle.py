"""Trained networks as folders for MONAI Label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fakes import write_volumes
from monai.bundle import ConfigParser, ConfigWorkflow

from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.monailabel.label_bundle import label_bundle
from med3dinsight_ext.monailabel.server import class_names, find_bundles
from med3dinsight_ext.publishing.bundle import measured_metadata, merged_configs

BUNDLE = bundles_dir() / "seg-finetune"

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
    label_bundle(str(target), weights(tmp_path, 5 if click else 1), overlay, click)
    assert find_bundles(str(target)) == [target] and class_names(target) == ["background", "Ball"]
    items = [{"image": str(volumes / "v0.nii.gz")} | ({"Ball": [[14, 16, 13]]} if click else {})]
    (tmp_path / "list.json").write_text(json.dumps(items))
    asked = {
        "bundle_root": str(target),
        "datalist": str(tmp_path / "list.json"),
        "dataset_dir": str(volumes),
        "dataloader::num_workers": 0,
    }
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "overlays must be JSON or YAML, got .*over.yaml: while parsing"),
        (b"\xff\x00", "overlays must be JSON or YAML, got .*over.yaml: "),
        (b"- a", "overlays must be mappings, got list in .*over.yaml"),
    ],
)
def test_an_overlay_that_cannot_be_read_is_an_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "over.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        merged_configs(BUNDLE, str(tmp_path / "over.yaml"), False)


def test_overlays_may_have_spaces_behind_the_commas(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("batch_size: 7")
    merged = merged_configs(BUNDLE, f"{overlay}, {tmp_path / 'more.yaml'}", False)
    assert merged["train"]["batch_size"] == 7


def test_a_segmentation_has_the_names_of_its_labels_whatever_an_overlay_names() -> None:
    config = {
        **SMALL,
        "out_channels": 2,
        "class_names": ["a", "b", "c"],
        "network_def": "@backbone",
    }
    network = ConfigParser(dict(config)).get_parsed_content("network_def")
    metadata = measured_metadata(BUNDLE, network, config)
    assert metadata["label_classes"] == "one channel: 0 background, 1 Ball"
