"""The ranks of a training: what each of them scores, and how they end."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sized
from datetime import timedelta
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.data import DistributedSampler

REMEDIES = {
    "validation": "raise val_fraction, list more of them, or set val_fraction 0 for no validation",
    "training": "add volumes, or raise max_cases",
}


def rank_sampler(dataset: Sized, kind: str = "validation") -> DistributedSampler | None:
    """Every volume once on one of the ranks, in order; None without volumes.

    Args:
        dataset: that all ranks have.
        kind: of its volumes, of ``REMEDIES``.

    Raises:
        ValueError: a rank would have no volume, and wait for the metrics of the others forever.
    """
    count, ranks = len(dataset), idist.get_world_size()
    if count == 0:
        return None
    if count < ranks:
        raise ValueError(
            f"{kind} volumes must be at least as many as the processes, got {count} for {ranks}; "
            f"start fewer processes, {REMEDIES[kind]}"
        )
    data: Any = dataset
    return DistributedSampler(data, even_divisible=False, shuffle=False)


def initialize(device: torch.device, backend: str | None = None, hours: float = 2) -> None:
    """Join the process group.

    Args:
        device: of this rank.
        backend: by default NCCL on GPUs and gloo on CPUs.
        hours: that ranks wait for each other after their shares of long work, as when a store is
            filled; NCCL's default is ten minutes.
    """
    cuda = torch.cuda.is_available()
    backend = backend or ("nccl" if cuda else "gloo")
    dist.init_process_group(backend, timeout=timedelta(hours=hours))
    if cuda:
        torch.cuda.set_device(device)
    idist.sync()


def finalize() -> None:
    """Leave the process group; its threads end before Python does.

    A thread of gloo that still works when Python ends aborts its process, and torchrun of another
    node waits minutes for it. The threads end with the last reference to the group, which the
    network's ``DistributedDataParallel`` holds until the garbage of the run is collected.
    """
    idist.finalize()
    atexit.register(gc.collect)
