"""Random seeds of a training run."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.utils import manual_seed


class EpochSeed:
    """Seeds every random source from (seed, epoch), so that a resumed run repeats the same draws.

    No random state has to be saved: an epoch's draws depend on its number only.

    Args:
        seed: of the run.
        loader: its dataset's random transforms and its sampler are seeded too.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        self.seed = seed
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = self.seed + 1_000_003 * engine.state.epoch
        # One stream for each rank; the sampler's permutation must be the same on all.
        own = (seed + 7919 * idist.get_rank()) % 2**32
        manual_seed(own)
        transform: Any = getattr(self.loader.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(own)
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(engine.state.epoch)
