"""A network's features at several levels, encoder and decoder, for any 3D network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.models.features import Features, seen_features

MIN_CHANNELS = 8  # of a level, which leaves out the network's own output


def find_pyramid(
    network: nn.Module,
    size: Sequence[int],
    layers: str | Sequence[str] = "auto",
    levels: int = 3,
) -> list[Features]:
    """The last features on each grid, finest first: a U-Net's decoder levels and its bottleneck.

    Grids that do not divide the input, as of padded maps, are left out, and so are tensors with
    channels last, which an input of another length shows.

    Args:
        network: maps (b, 1, x, y, z) to anything.
        size: (x, y, z) of its input, in voxels.
        layers: "auto", or module paths as in ``network.named_modules()``.
        levels: at most so many, from the finest.

    Raises:
        ValueError: a layer is not in the network, or none gives features.
    """
    seen = seen_features(network, size, layers)
    if layers != "auto":
        last = {features.layer: features for features in seen}
        if missing := [name for name in layers if name not in last]:
            raise ValueError(f"feature_layers must give features (b, c, x, y, z), {missing} do not")
        return [last[name] for name in layers]
    even = [f for f in seen if all(n % g == 0 for n, g in zip(size, f.grid, strict=True))]
    seen = _maps(network, size, even or seen)
    on_grid = {features.grid: features for features in seen if features.channels >= MIN_CHANNELS}
    found = sorted(on_grid.values(), key=lambda features: -math.prod(features.grid))[:levels]
    if not found:
        raise ValueError(
            f"backbone must have features (b, c, x, y, z) of {MIN_CHANNELS} channels or more, got "
            f"none in {type(network).__name__}; name modules as feature_layers"
        )
    return found


def _maps(network: nn.Module, size: Sequence[int], seen: Sequence[Features]) -> list[Features]:
    """Those with as many channels for an input half or twice as long, if the network takes one."""
    x, *others = size
    for length in (x // 2, 2 * x):
        try:
            other = seen_features(network, [length, *others], "auto")
        except ValueError:
            continue
        channels = {(f.layer, f.call): f.channels for f in other}
        return [f for f in seen if channels.get((f.layer, f.call)) == f.channels]
    return list(seen)


def sample_points(features: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Features at voxel coordinates, trilinear: (b, p, c).

    Args:
        features: (b, c, x', y', z'), a grid that covers the input evenly.
        points: (b, p, 3) voxel coordinates in the input; 0 is the centre of the first voxel.
        size: (x, y, z) of the input.
    """
    extent = torch.tensor(list(size), dtype=points.dtype, device=points.device)
    where = ((2 * points + 1) / extent - 1).flip(-1)[:, :, None, None]
    exact = torch.promote_types(features.dtype, torch.float32)  # half precision would move points
    found = F.grid_sample(
        features.to(exact), where.to(exact), padding_mode="border", align_corners=False
    )
    return found.flatten(2).mT
