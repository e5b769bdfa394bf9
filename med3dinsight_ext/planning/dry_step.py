"""Memory and time of a training step on this machine, by running one."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.io.memory import free_memory
from med3dinsight_ext.models.features import first_output

CPU_STEP = 3.0  # peak of a step on a CPU, as a multiple of the tensors saved for its backward pass


def usable_memory(device: torch.device) -> int:
    """Bytes that a training may use."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def build(
    backbone: dict[str, Any],
    device: torch.device,
    patch: Sequence[int] = (32, 32, 32),
    classes: int = 1,
) -> nn.Module:
    """The network of a config.

    Args:
        backbone: its entry; ``out_channels`` and ``patch_size`` may be referred to.
        device: to build it on.
        patch: (x, y, z) voxels.
        classes: output channels.
    """
    known = {"out_channels": classes, "patch_size": list(patch), "deep_supervision": False}
    parser = ConfigParser({"backbone": backbone, **known})
    network: nn.Module = parser.get_parsed_content("backbone")
    return network.to(device)


def step_cost(network: nn.Module, patch: Sequence[int], batch: int) -> tuple[int, float]:
    """Bytes and seconds of a training step with AdamW; the second of two, the first warms up.

    On a GPU the peak of allocated memory; on a CPU from the tensors saved for the backward pass.

    Args:
        network: on its device.
        patch: (x, y, z) voxels.
        batch: patches in a step.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters())
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return value

    cuda, seconds = device.type == "cuda", 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        begin = perf_counter()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            with torch.autocast(device.type, enabled=cuda):
                output = network(torch.rand(batch, 1, *patch, device=device))
        optimizer.zero_grad()
        first_output(output).float().square().mean().backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds = perf_counter() - begin
    if cuda:
        return torch.cuda.max_memory_allocated(device), seconds
    weights = sum(4 * p.numel() * p.element_size() for p in network.parameters())
    return int(CPU_STEP * sum(saved.values())) + weights, seconds
