"""Handlers under names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine


class HandlerGroup:
    """Attaches several handlers to an engine, in the order of the mapping.

    MONAI's ``check_properties`` and MONAI Label read ``train::handlers`` as a list of components.
    With a group in that list an overlay addresses each handler by its name, for instance
    ``train_handlers::progress::_disabled_: true``.

    Args:
        handlers: name to an object with ``attach(engine)``.
    """

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self.handlers = handlers

    def attach(self, engine: Engine) -> None:
        for handler in self.handlers.values():
            handler.attach(engine)
