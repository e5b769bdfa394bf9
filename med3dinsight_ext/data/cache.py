"""A dataset that keeps loaded volumes in memory up to a number of gigabytes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset

from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.memory import total_memory

log = logging.getLogger(__name__)


def quarter_of_memory() -> float:
    """A quarter of the memory that this machine or container may use, in gigabytes."""
    return total_memory() / 4e9


def memory_of(value: Any) -> int:
    """Bytes of the tensors and arrays in an item."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(map(memory_of, value.values()))
    return sum(map(memory_of, value)) if isinstance(value, (list, tuple)) else 0


class MemoryDataset(CacheDataset):
    """MONAI's ``CacheDataset`` with a limit in gigabytes; other volumes are loaded when needed.

    The workers of a data loader share the memory, and the processes of one machine the limit.

    Args:
        data: items.
        transform: a ``Compose``; what its deterministic transforms leave is kept.
        gigabytes: for all processes of this machine; None for ``quarter_of_memory``.
        share: of them that this dataset takes, in [0, 1].
        threads: that load volumes.
        kwargs: of ``CacheDataset``.
    """

    cache_num: int
    _hash_keys: list

    def __init__(
        self,
        data: Sequence,
        transform: Callable | Sequence[Callable] | None = None,
        gigabytes: float | None = None,
        share: float = 1.0,
        threads: int = 2,
        **kwargs: Any,
    ) -> None:
        total = quarter_of_memory() if gigabytes is None else gigabytes
        if total < 0:
            raise ValueError(f"cache_gb must be at least 0, got {gigabytes}; 0 keeps nothing")
        self.limit = 1e9 * share * total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        super().__init__(
            data,
            transform,
            cache_num=sys.maxsize if self.limit else 0,
            num_workers=threads,
            **kwargs,
        )

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list:
        chosen = range(self.cache_num) if indices is None else indices
        waiting, kept, used = iter(chosen), [], 0
        with (
            ThreadPool(self.num_workers) as pool,
            Bar(total=len(chosen), desc="Loading volumes") as bar,
        ):
            # A few at a time, so that little is loaded beyond the limit.
            while used < self.limit and (some := list(islice(waiting, self.num_workers or 1))):
                for item in pool.map(self._load_cache_item, some):
                    used += memory_of(item)
                    if used < self.limit:
                        kept.append(item)
                        bar.update()
        if len(kept) < len(chosen):
            log.info(
                f"{len(kept)} of {len(chosen)} volumes stay in memory ({self.limit / 1e9:.3g} GB); "
                "the others are read in every epoch: raise cache_gb, or set prepared"
            )
        self.cache_num = len(kept)
        self._hash_keys = self._hash_keys[: len(kept)]
        return kept
