"""Weights for nnU-Net compute on its arrays what they compute here."""

from __future__ import annotations

import json
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import nnunet_plan
from monai.bundle import ConfigParser
from torch import nn

from med3dinsight_ext.cli import main
from med3dinsight_ext.planning.nnunet import read_nnunet
from med3dinsight_ext.publishing.export import export

NEEDED = "nnU-Net's networks need pip install --no-deps dynamic-network-architectures"


def trained(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Folder of a training of this network, whose weights are random."""
    torch.manual_seed(0)
    config = {"out_channels": 1, "network_def": "@backbone", "patch_size": [32, 24, 8], **config}
    network = ConfigParser(config).get_parsed_content("backbone")
    (folder / "models").mkdir(parents=True)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    (folder / "models" / "run.json").write_text(json.dumps({"config": config}))
    return network


def of_nnunet(plan: dict[str, Any], classes: int) -> nn.Module:
    """The network as nnU-Net builds it from its plan."""
    found = plan["configurations"]["3d_fullres"]["architecture"]
    arguments = dict(found["arch_kwargs"])
    for key in found["_kw_requires_import"]:
        arguments[key] = arguments[key] and pydoc.locate(arguments[key])
    return pydoc.locate(found["network_class_name"])(
        input_channels=1, num_classes=classes, deep_supervision=True, **arguments
    )


@pytest.mark.parametrize("forward", [[0, 1, 2], [1, 2, 0]])
def test_nnunets_network_gives_the_same_for_turned_volumes(
    forward: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dynamic_network_architectures", reason=NEEDED)
    monkeypatch.setattr("med3dinsight_ext.planning.nnunet._stored_axes", lambda images: (0, 1, 2))
    plan = nnunet_plan() | {"transpose_forward": forward}
    (tmp_path / "plans.json").write_text(json.dumps(plan))
    settings = read_nnunet(tmp_path / "plans.json", [])
    ours = trained(tmp_path / "run", settings).eval()
    main(["export", str(tmp_path / "run"), "--to", "nnunet"])
    saved = torch.load(tmp_path / "run" / "models" / "nnunet.pth", weights_only=True)
    theirs = of_nnunet(plan, 1).eval()
    theirs.load_state_dict(saved["network_weights"])  # all of them
    volume = torch.rand(1, 1, 16, 24, 8)
    order = (0, 1, *(2 + axis for axis in settings["nnunet_axes"]))
    with torch.no_grad():
        finest, *_ = theirs(volume.permute(order))
        torch.testing.assert_close(finest, ours(volume).permute(order), rtol=1e-4, atol=1e-5)


def test_other_networks_and_other_formats_are_errors(tmp_path: Path) -> None:
    trained(tmp_path / "run", {"backbone": {"_target_": "fakes.PlainNet"}})
    with pytest.raises(ValueError, match="of an nnU-Net plan, got PlainNet in .*plan with --nnune"):
        export(str(tmp_path / "run"), to="nnunet")
    with pytest.raises(ValueError, match="to must be nnunet, got onnx; leave it out"):
        export(str(tmp_path / "run"), to="onnx")
