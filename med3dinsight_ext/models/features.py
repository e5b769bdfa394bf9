"""Any 3D network's deepest features, and the parameters that make them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn


class Features(NamedTuple):
    """Where a network's features are: module path, channels, and grid (x, y, z).

    call: which of the module's calls in one pass gives them, from 1; some networks use one
    activation everywhere.
    """

    layer: str
    channels: int
    grid: tuple[int, ...]
    call: int = 1


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def token_grid(tokens: int, size: Sequence[int]) -> tuple[int, ...] | None:
    """Grid of a flat token sequence: the input shrunk by one factor along every axis, if any."""
    tokens, size = int(tokens), [int(n) for n in size]  # under a trace they are tensors
    factor = (math.prod(size) / tokens) ** (1 / 3)
    grid = tuple(round(n / factor) for n in size)
    even = all(g > 0 and n % g == 0 for g, n in zip(grid, size, strict=True))
    return grid if even and math.prod(grid) == tokens else None


def as_grid(output: Any, size: Sequence[int]) -> Tensor | None:
    """A module's output as features (b, c, x, y, z); None if it is no feature map of this input.

    Args:
        output: (b, c, x, y, z) as it is, or ViT tokens (b, n, c), with or without a class token.
        size: (x, y, z) of the network's input.
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 5:
        return output if all(g <= n for g, n in zip(output.shape[2:], size, strict=True)) else None
    if output.ndim == 3 and output.shape[1] > 2:
        for extra in (0, 1):
            grid = token_grid(output.shape[1] - extra, size)
            if grid is not None:
                tokens = output[:, extra:]
                return rearrange(tokens, "b (x y z) c -> b c x y z", x=grid[0], y=grid[1])
    return None


def find_features(network: nn.Module, size: Sequence[int], layer: str = "auto") -> Features:
    """The deepest spatial features of a network, by one dry run on zeros.

    Deepest is the coarsest grid of more than one voxel; of several modules on that grid, the last
    to run outside the decoder. ``layer`` names a module instead.

    Args:
        network: maps (b, 1, x, y, z) to anything.
        size: (x, y, z) of its input, in voxels.
        layer: "auto", or a path as in ``network.named_modules()``.

    Raises:
        ValueError: the network cannot take the input, ``layer`` is not in it or gives no features.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    if layer != "auto" and layer not in modules:
        raise ValueError(
            f"feature_layer must name a module of {type(network).__name__}, got {layer!r}; "
            f"its top level has {', '.join(n for n in modules if '.' not in n) or 'no modules'}"
        )
    seen: list[Features] = []
    calls: Counter[str] = Counter()

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            calls[name] += 1
            features = as_grid(output, size)
            if (
                features is not None
                and features.shape[0] == 1
                and math.prod(features.shape[2:]) > 1
            ):
                grid = tuple(features.shape[2:])
                seen.append(Features(name, features.shape[1], grid, calls[name]))

        return hook

    watched = modules if layer == "auto" else {layer: modules[layer]}
    hooks = [module.register_forward_hook(look(name)) for name, module in watched.items()]
    parameter = next(network.parameters(), torch.empty(0))
    try:
        with evaluating(network):
            network(torch.zeros(1, 1, *size, device=parameter.device))
    except Exception as error:
        raise ValueError(
            f"backbone must take (b, 1, {', '.join(map(str, size))}), but "
            f"{type(network).__name__} failed with: {error}; set its input channels to 1 and "
            "patch_size to a size that it takes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"feature_layer must give features (b, c, x, y, z) or tokens (b, n, c), but "
            f"{layer if layer != 'auto' else 'no module'} of {type(network).__name__} does; "
            "name a module that returns them as feature_layer"
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


class _Found(Exception):
    """Ends a forward pass once the features are there."""


def features_of(
    network: nn.Module, found: Features, volume: Tensor, stop: bool = False
) -> tuple[Tensor, Any]:
    """Features (b, c, x', y', z') and the network's own output for volumes (b, 1, x, y, z).

    Args:
        network: is run.
        found: where its features are.
        volume: (b, 1, x, y, z).
        stop: once they are there, as what comes then would be wasted; the output is None, unless
            the network is being traced or compiled.
    """
    caught: list[Any] = []
    stop = stop and not (torch.jit.is_tracing() or torch.compiler.is_compiling())

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output)
        if stop and len(caught) == found.call:
            raise _Found

    hook = network.get_submodule(found.layer).register_forward_hook(catch)
    output = None
    try:
        output = network(volume)
    except _Found:
        pass
    finally:
        hook.remove()
    features = as_grid(caught[found.call - 1], volume.shape[2:])
    if features is None:
        raise ValueError(
            f"volume must have a size that {found.layer} turns into features, got "
            f"{tuple(volume.shape)}; use patch_size"
        )
    return features, output


def encoder_parameters(network: nn.Module, size: Sequence[int], layer: str = "auto") -> list[str]:
    """Names of the parameters that the deepest features depend on, in the order in which they act.

    Found by asking autograd in one dry run, so that it holds for any network.

    Args:
        network: as in ``find_features``.
        size: (x, y, z) of its input, in voxels.
        layer: as in ``find_features``.
    """
    found = find_features(network, size, layer)
    order: dict[str, None] = {}
    caught: list[Tensor] = []
    module = network.get_submodule(found.layer)
    hooks = [module.register_forward_hook(lambda _, __, output: caught.append(output))]
    for prefix, module in network.named_modules():
        own = [f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)]
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, __, own=own: order.update(dict.fromkeys(own))
            )
        )
    parameters = dict(network.named_parameters())
    device = next(iter(parameters.values())).device
    frozen = [value for value in parameters.values() if not value.requires_grad]
    try:
        with evaluating(network), torch.enable_grad():
            for value in frozen:
                value.requires_grad_(True)
            network(torch.zeros(1, 1, *size, device=device))
            grads = torch.autograd.grad(
                caught[found.call - 1].sum(), list(parameters.values()), allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        for value in frozen:
            value.requires_grad_(False)
    used = {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return [name for name in [*order, *parameters.keys() - order.keys()] if name in used]
