"""Packages that only some formats of volumes need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class NotHere(ValueError):
    """A volume cannot be read on this machine, as it is now: no verdict on the volume."""


def package(name: str, path: str, extra: str = "formats") -> Any:
    """Import a package of an extra.

    Args:
        name: of the module.
        path: of what needs it, for the message.
        extra: of this project.

    Raises:
        NotHere: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise NotHere(
            f"{path} must be read with the package {name}, got none; "
            f"pip install 'med3dinsight-ext[{extra}]'"
        ) from error
