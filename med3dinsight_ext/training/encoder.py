"""A pre-trained network as a feature extractor in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.io.hub import local_folder
from med3dinsight_ext.io.reading import read_json
from med3dinsight_ext.models.features import pyramid_of
from med3dinsight_ext.models.pyramid import find_pyramid
from med3dinsight_ext.training.checkpoints import load_weights
from med3dinsight_ext.training.record import FILE, config_trained_with


class Encoder(nn.Module):
    """A network that returns its features at several levels.

    Args:
        network: maps (b, 1, x, y, z) to anything; its parameters keep their names below
            ``network``.
        patch_size: (x, y, z) voxels of an input; other sizes work if the network takes them.
        levels: of features, at most.

    Attributes:
        channels: of each level.
        grids: (x, y, z) of each level for an input of ``patch_size``.
    """

    def __init__(self, network: nn.Module, patch_size: tuple[int, ...], levels: int = 4) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        self.found = find_pyramid(network, patch_size, levels=levels)
        self.channels = [features.channels for features in self.found]
        self.grids = [features.grid for features in self.found]

    def forward(self, volume: Tensor) -> list[Tensor]:
        """Features (b, c, x', y', z') of each level, finest first: decoder, then bottleneck.

        Args:
            volume: (b, 1, x, y, z), oriented and scaled as in the training.
        """
        return pyramid_of(self.network, self.found, volume)[0]


def load_encoder(path: str | Path, levels: int = 4) -> Encoder:
    """A trained network with its weights, as an encoder on the CPU in eval mode.

    Args:
        path: folder of a training or of a published bundle; models/model.pt is in it. Or owner/name
            of a repository of Hugging Face.
        levels: of features, at most.

    Raises:
        ValueError: the folder has no weights, or no config of the network.

    Examples:
        >>> encoder = load_encoder("runs/scans/pretrain")  # doctest: +SKIP
        >>> fine, *_, deep = encoder(torch.zeros(1, 1, 96, 96, 96))  # doctest: +SKIP
    """
    network, config = trained_network(path)
    size = tuple(int(n) for n in ConfigParser(config).get_parsed_content("patch_size"))
    return Encoder(network, size, levels).eval()


def trained_network(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a trained network with its weights, and the config of the training.

    Args:
        path: folder of a training or of a published bundle, or a repository.

    Raises:
        ValueError: the folder has no weights, or no config of the network.
    """
    home = local_folder(path)
    weights, record = home / "models" / "model.pt", home / "models" / FILE
    published = home / "configs" / "inference.json"
    if not weights.is_file() or not (published.is_file() or record.is_file()):
        raise ValueError(
            f"path must be the folder of a training or a published bundle, got {path} without "
            f"models/model.pt, or without models/{FILE} and configs/inference.json; name another"
        )
    config = config_trained_with(home) or read_json(published, "config")
    parser = ConfigParser(config)
    load_weights(parser.get_parsed_content("network_def"), weights)
    return parser.get_parsed_content("backbone"), config
