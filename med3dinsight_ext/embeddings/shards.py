"""Division of the items among jobs and among the ranks of torchrun."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch.distributed as dist

logger = logging.getLogger(__name__)


def part_of(items: Sequence[dict[str, Any]], shard: str | None) -> list[dict[str, Any]]:
    """Every n-th item from the k-th on, for shard "k/n"; all for None.

    Raises:
        ValueError: the shard is not one of "1/n" to "n/n".
    """
    if shard is None:
        return list(items)
    found = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(
            f"shard must be 1/n to n/n, got {shard!r}; --shard 3/16 is the third of sixteen"
        )
    return list(items)[number - 1 :: count]


def rank_share(count: int) -> range:
    """This rank's indices below ``count``: a fixed share, whatever other ranks have done.

    Raises:
        ValueError: the environment names several processes, which form no group: each would go on
            with its share alone.
    """
    if dist.is_available() and dist.is_initialized():
        return range(dist.get_rank(), count, dist.get_world_size())
    if (ranks := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise ValueError(
            f"processes must form a group, got WORLD_SIZE={ranks} and none; add "
            "multi_gpu_train.json to config_file, or unset WORLD_SIZE for a single process"
        )
    return range(count)


def paths_of(
    items: Sequence[dict[str, Any]],
    indices: Iterable[int],
    path: Callable[[dict[str, Any]], Path],
    bad: dict[str, str],
) -> dict[int, Path]:
    """Entry's path of each item of ``indices``; ``bad`` gets image and reason of those without."""
    found: dict[int, Path] = {}
    for i in indices:
        try:
            found[i] = path(items[i])
        except (OSError, ValueError) as error:
            bad[str(items[i]["image"])] = str(error)
    return found


def check_unchanged(
    item: dict[str, Any], path: Path, path_of: Callable[[dict[str, Any]], Path]
) -> None:
    """That a volume which has been read is the one that its entry is named after.

    Raises:
        ValueError: the file has changed since ``path`` was made.
    """
    if path_of(item) != path:
        raise ValueError(
            f"image must stay as it is while it is read, got a change of {item['image']}; start "
            "again when it is whole"
        )


def without(items: Sequence[dict[str, Any]], bad: Mapping[str, str], skip_bad: bool) -> set[str]:
    """Images of the good items; bad ones, of whatever rank, are an error or a warning.

    Args:
        items: all, from ``datalist``.
        bad: image to what is wrong with it.
        skip_bad: log them, instead of raising.

    Raises:
        ValueError: names all of them, if ``skip_bad`` is False or none is good.
    """
    good = {str(item["image"]) for item in items} - bad.keys()
    if bad:
        listed = "\n".join(
            f"  {reason if image in reason else f'{image}: {reason}'}"
            for image, reason in bad.items()
        )
        if not skip_bad or not good:
            raise ValueError(
                f"volumes must be readable and not empty, got {len(bad)} bad of {len(items)}; "
                f"repair them, or set skip_bad to leave them out:\n{listed}"
            )
        logger.warning(f"left out {len(bad)} bad volumes:\n{listed}")
    return good


def wait_for_ranks() -> None:
    """Return when every rank of a process group is here; at once without one."""
    merge_ranks({})


def merge_ranks(found: dict[str, str]) -> dict[str, str]:
    """The union over all ranks of a process group; without one, ``found`` itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    return {key: value for part in idist.all_gather(found) for key, value in part.items()}
