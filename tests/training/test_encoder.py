from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet

import med3dinsight_ext

UNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "channels": [8, 12, 16], "strides": [2, 2],
    "num_res_units": 1, "norm": "INSTANCE",
}  # fmt: skip
CONFIG = {
    "patch_size": [16, 24, 8],
    "label_names": ["background", "a"],
    "out_channels": "$len(@label_names)",
    "backbone": {"_target_": "UNet", "out_channels": "@out_channels", **UNET},
    "network_def": "@backbone",
}


@pytest.mark.parametrize("published", [False, True])
def test_an_encoder_has_the_trained_weights_and_a_pyramid_that_a_gradient_reaches(
    published: bool, tmp_path: Path
) -> None:
    network = UNet(out_channels=2, **UNET)
    name = "configs/inference.json" if published else "models/run.json"
    for folder in ("models", "configs"):
        (tmp_path / folder).mkdir()
    torch.save(network.state_dict(), tmp_path / "models" / "model.pt")
    (tmp_path / name).write_text(json.dumps(CONFIG if published else {"config": CONFIG}))
    encoder = med3dinsight_ext.load_encoder(tmp_path)
    assert not encoder.training
    assert all(
        torch.equal(v, encoder.network.state_dict()[k]) for k, v in network.state_dict().items()
    )
    features = encoder(torch.rand(2, 1, 16, 24, 8))
    assert [tuple(f.shape) for f in features] == [
        (2, channels, *grid) for channels, grid in zip(encoder.channels, encoder.grids, strict=True)
    ]
    assert encoder.grids[-1] == (4, 6, 2) and encoder.channels[-1] == 12 + 16  # with the skip
    features[-1].square().sum().backward()
    assert next(iter(encoder.network.parameters())).grad is not None


def test_a_training_in_the_folder_of_its_bundle_is_read_as_it_ran(tmp_path: Path) -> None:
    network = UNet(out_channels=2, **UNET)
    for folder in ("models", "configs"):
        (tmp_path / folder).mkdir()
    torch.save(network.state_dict(), tmp_path / "models" / "model.pt")
    (tmp_path / "configs/inference.json").write_text(json.dumps(CONFIG))
    record: dict[str, Any] = {"config": CONFIG | {"patch_size": [8, 8, 8]}, "command": ["python"]}
    (tmp_path / "models/run.json").write_text(json.dumps(record))
    assert med3dinsight_ext.load_encoder(tmp_path).grids[-1] == (2, 2, 2)
    del record["command"]  # as published
    (tmp_path / "models/run.json").write_text(json.dumps(record))
    assert med3dinsight_ext.load_encoder(tmp_path).grids[-1] == (4, 6, 2)


def test_a_folder_without_weights_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be the folder of a training or a published"):
        med3dinsight_ext.load_encoder(tmp_path)
