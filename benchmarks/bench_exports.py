"""TorchScript and ONNX exports of every backbone, and their difference from PyTorch.

python benchmarks/bench_exports.py [--only seg-finetune/unet] [--again]

Every backbone overlay of the fine-tuning bundles at its own width, on the smallest input that it
takes, with random weights and random batch statistics, in eval mode (so without the outputs of deep
supervision), as a bundle folder through ``export``. Networks in the JSON are skipped, but not with
``--again``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, write  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.publishing.export import export  # noqa: E402

SIZES = {
    name: [64, 32, 32] for name in ("swinunetr", "swinunetr_v2", "flexibleunet", "efficientnet")
}
SLOW = ("swinunetr", "swinunetr_v2")  # torch.export takes minutes


def overlays() -> dict[str, Path]:
    """Files of all backbones by bundle/name, the slow ones last."""
    found = {
        f"{bundle}/{path.stem}": path
        for bundle in ("seg-finetune", "cls-finetune")
        for path in sorted((bundles_dir() / "backbones").glob("*.yaml"))
        if bundle in path.read_text().splitlines()[1]
    }
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")[1] in SLOW))


def folder(root: Path, bundle: str, overlay: Path, size: list[int]) -> int:
    """A bundle folder with an overlay and random weights; the number of its parameters."""
    files = [str(bundles_dir() / bundle / "configs" / "inference.json"), str(overlay)]
    config = ConfigParser.load_config_files(files) | {"patch_size": size}
    torch.manual_seed(0)
    network = ConfigParser(config).get_parsed_content("network_def")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    for name in ("configs", "models"):
        (root / name).mkdir()
    ConfigParser.export_config_file(config, str(root / "configs" / "inference.json"))
    torch.save(network.state_dict(), root / "models" / "model.pt")
    return sum(parameter.numel() for parameter in network.parameters())


def measure(bundle: str, overlay: Path) -> dict[str, Any]:
    size = SIZES.get(overlay.stem, [32, 32, 32])
    with tempfile.TemporaryDirectory() as name:
        parameters = folder(Path(name), bundle, overlay, size)
        try:
            export(name)
        except ValueError as error:  # exports.json has the reason
            print(error)
        row = json.loads((Path(name) / "models" / "exports.json").read_text())
    return {"size": size, "parameters": parameters, **row}


def main(only: str = "", again: bool = False) -> None:
    path = RESULTS / "exports.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name, overlay in overlays().items():
        if (name in rows and not again) or only not in name:
            continue
        print(name, flush=True)
        rows[name] = measure(name.split("/")[0], overlay)
        versions = {
            key: rows[name]["versions"].pop(key) for key in ("onnx", "onnxruntime", "onnxscript")
        }
        del rows[name]["versions"]
        tolerance = rows[name].pop("tolerance")
        write("exports", {"exporters": versions, "tolerance": tolerance, "rows": rows})


if __name__ == "__main__":
    fire.Fire(main)
