"""A network's features at several levels, encoder and decoder, for any 3D network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.models.features import Features, as_grid, dry_run


def find_pyramid(
    network: nn.Module,
    size: Sequence[int],
    layers: str | Sequence[str] = "auto",
    levels: int = 3,
    min_channels: int = 8,
) -> list[Features]:
    """The last features on each grid, finest first: a U-Net's decoder levels and its bottleneck.

    Args:
        network: maps (b, 1, x, y, z) to anything.
        size: (x, y, z) of its input, in voxels.
        layers: "auto", or module paths as in ``network.named_modules()``.
        levels: at most so many, from the finest.
        min_channels: of "auto"; leaves out the network's own output.

    Raises:
        ValueError: a layer is not in the network, or none gives features.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    if layers != "auto" and (unknown := [name for name in layers if name not in modules]):
        raise ValueError(
            f"feature_layers must name modules of {type(network).__name__}, got {unknown}; "
            f"its top level has {', '.join(n for n in modules if '.' not in n)}"
        )
    seen: list[Features] = []
    calls: Counter[str] = Counter()

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            calls[name] += 1
            value = as_grid(output, size)
            if value is not None and value.shape[0] == 1 and math.prod(value.shape[2:]) > 1:
                seen.append(Features(name, value.shape[1], tuple(value.shape[2:]), calls[name]))

        return hook

    watched = modules if layers == "auto" else {name: modules[name] for name in layers}
    hooks = [module.register_forward_hook(look(name)) for name, module in watched.items()]
    try:
        dry_run(network, size)
    finally:
        for hook in hooks:
            hook.remove()
    if layers != "auto":
        last = {features.layer: features for features in seen}
        if missing := [name for name in layers if name not in last]:
            raise ValueError(f"feature_layers must give features (b, c, x, y, z), {missing} do not")
        return [last[name] for name in layers]
    on_grid = {features.grid: features for features in seen if features.channels >= min_channels}
    found = sorted(on_grid.values(), key=lambda features: -math.prod(features.grid))[:levels]
    if not found:
        raise ValueError(
            f"backbone must have features (b, c, x, y, z) of {min_channels} channels or more, got "
            f"none in {type(network).__name__}; name modules as feature_layers"
        )
    return found


def pyramid_of(
    network: nn.Module, found: Sequence[Features], volume: Tensor
) -> tuple[list[Tensor], Any]:
    """Features (b, c, x', y', z') of each level and the network's output, in one pass.

    Args:
        network: is run.
        found: from ``find_pyramid``.
        volume: (b, 1, x, y, z).
    """
    caught: dict[str, list[Any]] = {features.layer: [] for features in found}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: caught[name].append(output)
        )
        for name in caught
    ]
    try:
        output = network(volume)
    finally:
        for hook in hooks:
            hook.remove()
    values = []
    for features in found:
        value = as_grid(caught[features.layer][features.call - 1], volume.shape[2:])
        if value is None:
            raise ValueError(
                f"volume must have a size that {features.layer} turns into features, got "
                f"{tuple(volume.shape)}; use patch_size"
            )
        values.append(value)
    return values, output


def sample_points(features: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Features at voxel coordinates, trilinear: (b, p, c).

    Args:
        features: (b, c, x', y', z'), a grid that covers the input evenly.
        points: (b, p, 3) voxel coordinates in the input; 0 is the centre of the first voxel.
        size: (x, y, z) of the input.
    """
    extent = torch.tensor(list(size), dtype=points.dtype, device=points.device)
    where = ((2 * points + 1) / extent - 1).flip(-1)[:, :, None, None]
    found = F.grid_sample(
        features, where.to(features.dtype), padding_mode="border", align_corners=False
    )
    return found.flatten(2).mT
