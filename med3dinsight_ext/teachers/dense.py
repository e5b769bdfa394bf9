"""Feature grids of a frozen 2D image tower: CNN stages and ViT patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower

STRIDES = (4, 16)  # least and greatest stride of the layers that "auto" takes
PREFIXES = (0, 1, 5)  # tokens before the patches: none, a class token, and four registers


def as_map(output: Any) -> Tensor | None:
    """A module's output as a feature map (n, c, h, w); None if it is none.

    Args:
        output: (n, c, h, w) as it is, ViT tokens (n, t, c) with or without class token and
            registers, or a tuple that starts with either.
    """
    if isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4 and output.shape[2] == output.shape[3]:
        return output
    if output.ndim == 3:
        for prefix in PREFIXES:
            side = math.isqrt(max(output.shape[1] - prefix, 0))
            if side > 1 and side * side == output.shape[1] - prefix:
                return output[:, prefix:].mT.unflatten(2, (side, side))
    return None


def _maps(tower: ImageTower, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Feature maps of the named modules in one pass, in the order in which they end."""
    found: dict[str, Tensor] = {}
    modules = dict(tower.model.named_modules())

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            if (value := as_map(output)) is not None:
                found.pop(name, None)  # the last call counts, also in the order
                found[name] = value

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        tower.embed(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def find_layers(tower: ImageTower) -> list[str]:
    """The last layer of each stride from 4 to 16 pixels, finest first; of a ViT the last layer.

    Layers inside a block that goes on to a coarser grid are left out.

    Raises:
        ValueError: no layer of the tower gives a feature map.
    """
    names = [name for name, _ in tower.model.named_modules() if name]
    pixels = torch.zeros(1, 3, tower.size, tower.size, device=tower.device)
    maps = _maps(tower, pixels, names)
    outer: dict[int, str] = {}
    inner: dict[int, str] = {}
    for name, value in maps.items():
        side = value.shape[2]
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        shrinks = any(maps[p].shape[2] < side for p in parents if p in maps)
        if 1 < side < tower.size:
            (inner if shrinks else outer)[side] = name
    last = outer or inner
    if not last:
        raise ValueError(
            f"teacher must have a layer with a feature map, got none in {type(tower).__name__}; "
            "name one as layers, or choose a CNN or a ViT with patch tokens"
        )
    fit = {side for side in last if STRIDES[0] <= tower.size / side <= STRIDES[1]}
    return [last[side] for side in sorted(fit or {min(last)}, reverse=True)]


@torch.no_grad()
def encode_grids(teacher: Teacher, slices: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Feature maps of slices: layer to (n, c, h, w), float32 on the CPU.

    Args:
        teacher: its image tower is run.
        slices: (n, 1 or 3, h, w) in [0, 1].
        layers: module paths in the tower's model.

    Raises:
        ValueError: a layer is not in the model or gives no feature map.
    """
    tower = teacher.image
    names = {name for name, _ in tower.model.named_modules()}
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(
            f"layers must name modules of {type(tower.model).__name__}, got {unknown}; "
            f"layers='auto' takes {find_layers(tower)}"
        )
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for pixels in teacher.batches(slices):
        with teacher.autocast():
            maps = _maps(tower, pixels, layers)
        if missing := [layer for layer in layers if layer not in maps]:
            raise ValueError(
                f"layers must give maps (n, c, h, w) or tokens (n, t, c), {missing} give none; "
                f"layers='auto' takes {find_layers(tower)}"
            )
        for layer, value in maps.items():
            found[layer].append(value.float().cpu())
    return {layer: torch.cat(values) for layer, values in found.items()}
