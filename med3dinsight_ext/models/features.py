"""Deepest features of any 3D network, and the parameters that they depend on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn


class Features(NamedTuple):
    """Location of a network's features.

    Attributes:
        layer: path of the module that returns them, as in ``network.named_modules()``.
        channels: c.
        grid: (x, y, z).
        call: which of the module's calls in one pass returns them, from 1: some networks use one
            activation module throughout.
    """

    layer: str
    channels: int
    grid: tuple[int, ...]
    call: int


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradient inside, every module's own mode afterwards.

    MONAI's `eval_mode` returns all submodules to the mode of the whole.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def dry_run(network: nn.Module, size: Sequence[int]) -> Any:
    """Output of ``network`` in eval mode for a volume (1, 1, x, y, z) of zeros."""
    device = next(network.parameters(), torch.empty(0)).device
    with eval_mode(network):
        return network(torch.zeros(1, 1, *size, device=device))


def first_output(output: Any) -> Any:
    """A network's output, or the first of several: MONAI's ViT lists them, DynUNet stacks them."""
    if isinstance(output, (tuple, list)):
        return output[0]
    return output[:, 0] if isinstance(output, Tensor) and output.ndim == 6 else output


def token_grid(tokens: int, size: Sequence[int]) -> tuple[int, ...] | None:
    """Grid (x, y, z) of a flat token sequence: the input's size divided by one factor, or None."""
    tokens, size = int(tokens), [int(n) for n in size]  # under a trace they are tensors
    factor = (math.prod(size) / tokens) ** (1 / 3)
    grid = tuple(round(n / factor) for n in size)
    even = all(g > 0 and n % g == 0 for g, n in zip(grid, size, strict=True))
    return grid if even and math.prod(grid) == tokens else None


def as_grid(
    output: Any, size: Sequence[int], grids: Collection[tuple[int, ...]] = ()
) -> Tensor | None:
    """A module's output as features (b, c, x, y, z); None if it is no feature map of this input.

    Args:
        output: (b, c, x, y, z), or ViT tokens (b, n, c) with or without a class token.
        size: (x, y, z) of the network's input.
        grids: that tokens may have, as of uneven patches; else they are as coarse along each axis.
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 5:
        return output if all(g <= n for g, n in zip(output.shape[2:], size, strict=True)) else None
    if output.ndim == 3 and output.shape[1] > 2:
        for extra in (0, 1):
            count = output.shape[1] - extra
            known = next((grid for grid in grids if math.prod(grid) == count), None)
            grid = known or token_grid(count, size)
            if grid is not None:
                tokens = output[:, extra:]
                return rearrange(tokens, "b (x y z) c -> b c x y z", x=grid[0], y=grid[1])
    return None


def seen_features(
    network: nn.Module, size: Sequence[int], layers: str | Sequence[str]
) -> list[Features]:
    """Features that modules return in one dry run on zeros, in the order of their calls.

    Args:
        network: maps (b, 1, x, y, z) to anything.
        size: (x, y, z) of its input, in voxels.
        layers: "auto" for all modules, or paths as in ``network.named_modules()``.

    Raises:
        ValueError: the network cannot take the input, or a layer is not in it.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    if layers != "auto" and (unknown := [name for name in layers if name not in modules]):
        raise ValueError(
            f"feature_layer must name a module of {type(network).__name__}, got {unknown[0]!r}; "
            f"its top level has {', '.join(n for n in modules if '.' not in n) or 'no modules'}"
        )
    seen: list[Features] = []
    calls: Counter[str] = Counter()

    def collect(name: str, _: nn.Module, __: Any, output: Any) -> None:
        calls[name] += 1
        found = as_grid(output, size, [features.grid for features in seen])
        if found is not None and len(found) == 1 and math.prod(found.shape[2:]) > 1:
            seen.append(Features(name, found.shape[1], tuple(found.shape[2:]), calls[name]))

    watched = modules if layers == "auto" else {name: modules[name] for name in layers}
    hooks = [m.register_forward_hook(partial(collect, name)) for name, m in watched.items()]
    try:
        dry_run(network, size)
    except Exception as error:
        raise ValueError(
            f"backbone must take (b, 1, {', '.join(map(str, size))}), but "
            f"{type(network).__name__} failed with: {error}; set its input channels to 1 and "
            "patch_size to a size that it takes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def find_features(network: nn.Module, size: Sequence[int], layer: str = "auto") -> Features:
    """Location of the deepest spatial features of a network, by one dry run on zeros.

    Deepest is the coarsest grid of more than one voxel; of several modules on that grid, the last
    to run outside the decoder. ``layer`` names a module instead.

    Args:
        network: maps (b, 1, x, y, z) to anything.
        size: (x, y, z) of its input, in voxels.
        layer: "auto", or a path as in ``network.named_modules()``.

    Raises:
        ValueError: the network cannot take the input, ``layer`` is not in it or returns no
            features.

    Examples:
        >>> network = nn.Sequential(nn.Conv3d(1, 8, 4, stride=4), nn.ConvTranspose3d(8, 1, 4, 4))
        >>> find_features(network, (16, 16, 8))
        Features(layer='0', channels=8, grid=(4, 4, 2), call=1)
    """
    seen = seen_features(network, size, "auto" if layer == "auto" else [layer])
    if not seen:
        raise ValueError(
            f"feature_layer must give features (b, c, x, y, z) or tokens (b, n, c), but "
            f"{'no module' if layer == 'auto' else layer} of {type(network).__name__} does"
            f"{'' if layer == 'auto' else ' not'}; name a module that returns them as feature_layer"
        )
    coarsest = min(math.prod(features.grid) for features in seen)
    deepest = [i for i, features in enumerate(seen) if math.prod(features.grid) == coarsest]
    encoder = [i for i in deepest if not _grows(seen[i:])]
    return seen[(encoder or deepest)[-1]]


def _grows(run: Sequence[Features]) -> bool:
    """Whether the top-level module of the first features goes on to a finer grid: a decoder."""
    top = run[0].layer.split(".")[0]
    same = (f for f in run if f.layer.split(".")[0] == top)
    return any(math.prod(f.grid) > math.prod(run[0].grid) for f in same)


class _Stop(Exception):
    """Ends a forward pass early."""


def extract_features(
    network: nn.Module, found: Features, volume: Tensor, stop: bool = False
) -> tuple[Tensor, Any]:
    """Features (b, c, x', y', z') and the network's own output for volumes (b, 1, x, y, z).

    Args:
        network: maps (b, 1, x, y, z) to anything.
        found: from `find_features`.
        volume: (b, 1, x, y, z).
        stop: end the forward pass at the features; the output is then None, unless the network
            is being traced or compiled.

    Raises:
        ValueError: the module does not return features for a volume of this size.
    """
    (features,), output = pyramid_of(network, [found], volume, stop)
    return features, output


def pyramid_of(
    network: nn.Module, found: Sequence[Features], volume: Tensor, stop: bool = False
) -> tuple[list[Tensor], Any]:
    """``extract_features`` of several places, in one pass."""
    caught: dict[str, list[Any]] = {features.layer: [] for features in found}
    stop = stop and not (torch.jit.is_tracing() or torch.compiler.is_compiling())

    def catch(name: str, _: nn.Module, __: Any, output: Any) -> None:
        caught[name].append(output)
        if stop and all(len(caught[features.layer]) >= features.call for features in found):
            raise _Stop

    hooks = [
        network.get_submodule(name).register_forward_hook(partial(catch, name)) for name in caught
    ]
    output = None
    try:
        output = network(volume)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    values = []
    for layer, _, grid, call in found:
        value = as_grid(caught[layer][call - 1], volume.shape[2:], [grid])
        if value is None:
            raise ValueError(
                f"volume must have a size that {layer} turns into features, got "
                f"{tuple(volume.shape)}; use patch_size"
            )
        values.append(value)
    return values, output


def encoder_parameters(network: nn.Module, size: Sequence[int], layer: str = "auto") -> list[str]:
    """Names of the parameters that the deepest features depend on, in the order in which they act.

    They are those with a gradient in one dry run, whatever the network.

    Args:
        network: as in ``find_features``.
        size: (x, y, z) of its input, in voxels.
        layer: as in ``find_features``.
    """
    found = find_features(network, size, layer)
    order: dict[str, None] = {}

    def record(names: list[str], _: nn.Module, __: Any) -> None:
        order.update(dict.fromkeys(names))

    hooks = []
    for prefix, module in network.named_modules():
        own = [f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)]
        hooks.append(module.register_forward_pre_hook(partial(record, own)))
    parameters = dict(network.named_parameters())
    device = next(iter(parameters.values())).device
    frozen = [value for value in parameters.values() if not value.requires_grad]
    try:
        with eval_mode(network), torch.enable_grad():
            for value in frozen:
                value.requires_grad_(True)
            features, _ = extract_features(network, found, torch.zeros(1, 1, *size, device=device))
            grads = torch.autograd.grad(
                features.sum(), list(parameters.values()), allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        for value in frozen:
            value.requires_grad_(False)
    used = {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return [name for name in [*order, *parameters.keys() - order.keys()] if name in used]
