"""Choice of the next case to label, by k-center greedy selection in feature space."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.data.utils import dense_patch_slices
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dinsight_ext.io.files import HashMemo, sha256, write_atomic
from med3dinsight_ext.models.classifier import Classifier
from med3dinsight_ext.training.checkpoints import load_weights

logger = logging.getLogger(__name__)


def kcenter_greedy(features: Tensor, labelled: Sequence[int]) -> int:
    """The next row of a k-center greedy selection (Sener and Savarese, 2018, arXiv:1708.00489).

    Args:
        features: (n, d), a row a case; each column is brought to unit variance.
        labelled: rows that have a label; without any, the row nearest to the mean is the first.

    Returns:
        The row that is farthest from its nearest labelled one.
    """
    free = sorted(set(range(len(features))) - set(labelled))
    if not free:
        raise ValueError(f"features must have a row without a label, got {len(features)} with one")
    spread = features.std(0, correction=0)
    rows = (features - features.mean(0)) / torch.where(spread > 0, spread, 1)
    if not labelled:
        return int(rows.norm(dim=1).argmin())
    distance = torch.cdist(rows[free], rows[list(labelled)]).amin(1)
    return free[int(distance.argmax())]


class Features:
    """Deepest features of a bundle's network, pooled over a volume, kept on disk by content.

    The weights are those at the time of construction.

    Args:
        bundle: folder with inference.json and model.pt; what is kept goes into its ``features``.
    """

    def __init__(self, bundle: Path) -> None:
        path = bundle / "configs" / "inference.json"
        parser = ConfigParser(ConfigParser.load_config_file(path) | {"bundle_root": str(bundle)})
        weights = bundle / "models" / "model.pt"
        self.fingerprint = sha256(weights) + sha256(path)
        network = parser.get_parsed_content("network_def")
        load_weights(network, weights)
        self.patch = tuple(parser.get_parsed_content("patch_size"))
        self.device = parser.get_parsed_content("device")
        self.classifier = Classifier(network, 1, self.patch).to(self.device).eval()
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.root = bundle / "features"
        self.hashes = HashMemo(self.root / "files.jsonl")

    def __call__(self, image: str) -> Tensor:
        """Pooled features (2 c,) of an image file."""
        key = hashlib.sha256((self.fingerprint + self.hashes(Path(image))).encode()).hexdigest()
        path = self.root / f"{key[:32]}.safetensors"
        if not path.exists():
            row = self.compute(image)
            write_atomic(path, lambda draft: save_file({"row": row}, draft))
        return load_file(path)["row"]

    @torch.no_grad()
    def compute(self, image: str) -> Tensor:
        """The mean over windows that tile the volume."""
        channels = self.preprocessing({"image": image})["image"].as_tensor()
        volume = channels[0].float()  # without those of clicks
        windows = dense_patch_slices(volume.shape, self.patch, self.patch)
        parts = [volume[window][None, None].to(self.device) for window in windows]
        return torch.cat([self.classifier.pooled(part) for part in parts]).mean(0).cpu()
