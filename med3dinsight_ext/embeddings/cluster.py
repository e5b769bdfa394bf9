"""Filling the store on a cluster with Ray: the store stays the truth, Ray only divides the work.

Plain actors instead of Ray Data: an entry is made from one volume, its slices and answers stay in
the process that cut them, and nothing but a list of items has to be moved. Each actor is a whole
``Store.fill`` of a few items with its own teacher, as a job of ``--shard`` is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from monai.bundle import ConfigParser

from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.io.packages import package

logger = logging.getLogger(__name__)
PART = 8  # volumes of one task: what a worker that dies makes again, at most
RETRIES = 2  # of a part whose worker dies


class Filler:
    """The actor: a store of its own, built where it runs.

    Args:
        build: of the store.
        folder: of relative paths, where this node has it.
    """

    def __init__(self, build: Callable[[], Store], folder: str) -> None:
        here = os.path.isdir(folder)
        if here:
            os.chdir(folder)
        os.environ.pop("WORLD_SIZE", None)  # of the job that started Ray
        self.store = build()
        if not here and not self.store.root.is_absolute():
            raise ValueError(
                f"store_dir must be absolute where a node has no {folder}, got {self.store.root}; "
                "give the path that all nodes share"
            )

    def fill(self, items: Sequence[dict[str, Any]]) -> str:
        """Make the entries of these items; the message of what is wrong, if anything is."""
        try:
            self.store.fill(items, skip_bad=True)
        except ValueError as error:  # all of them are bad: the last look names them
            return str(error)
        return ""


def store_of(config: Mapping[str, Any]) -> Store:
    """The store of a bundle's config."""
    return ConfigParser(dict(config)).get_parsed_content("store")


def fill(
    store: Store,
    items: Sequence[dict[str, Any]],
    build: Callable[[], Store],
    workers: int,
    address: str | None = None,
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """``Store.fill`` by Ray actors, each with one GPU where the cluster has them.

    A part whose actor dies is tried again, ``RETRIES`` times, and entries that it had made are not
    made again. At the end ``store`` itself goes through all items: it names bad volumes, and makes
    what is missing.

    Args:
        store: on a folder that all nodes share.
        items: from ``datalist``.
        build: makes the same store in an actor.
        workers: actors; here no more than there are CPUs, or GPUs.
        address: of a cluster; None starts Ray on this machine.
        skip_bad: as in ``Store.fill``.

    Raises:
        ValueError: as ``Store.fill``; or Ray is not installed.
        RuntimeError: no worker could build its store.
    """
    ray = package("ray", "the store", "ray")
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, include_dashboard=None, log_to_driver=False)
    has = ray.cluster_resources()
    gpus = 1 if has.get("GPU") else 0
    places = int(min(has.get("CPU", 0), has["GPU"]) if gpus else has.get("CPU", 0))
    if workers > max(1, places):
        logger.warning(f"{workers} workers are more than the cluster has places for: {places}")
        if address is None:  # here none is added, and more would wait for one for ever
            workers = max(1, places)
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES)(Filler)
    fillers = [actor.remote(build, os.getcwd()) for _ in range(workers)]
    parts = [items[i : i + PART] for i in range(0, len(items), PART)]
    died = False
    try:
        pool = ray.util.ActorPool(fillers)
        for part in parts:
            pool.submit(lambda filler, part: filler.fill.remote(part), part)
        for _ in Bar(parts, "Filling the store"):
            try:
                message = pool.get_next_unordered()
            except ray.exceptions.ActorDiedError as error:  # it could not begin
                cause = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"a worker must build the store, got {cause}") from error
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                died = True
                message = f"a worker died {RETRIES + 1} times: {first_line(error)}"
            if message:
                logger.warning(message)
    finally:
        for filler in fillers:
            ray.kill(filler)
        if begun:
            ray.shutdown()
    store.reload()
    if died:
        left = ", ".join(_missing(store, items))
        logger.warning(
            f"this process makes what no worker survived (leave it out if need be): {left}"
        )
    return store.fill(items, skip_bad)


def _missing(store: Store, items: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Images without an entry."""
    for item in items:
        with suppress(OSError, ValueError):  # `Store.fill` names those
            if not store.path(item).exists():
                yield item["image"]


def embed(
    store: Store,
    items: Sequence[dict[str, Any]],
    config: Mapping[str, Any],
    workers: int,
    address: str | None = None,
    skip_bad: bool = False,
) -> None:
    """``fill`` from a bundle's config, then what ``Store.embed`` prints."""
    fill(store, items, partial(store_of, config), workers, address, skip_bad)
    store.embed(items, skip_bad)
