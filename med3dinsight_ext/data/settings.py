"""Settings of transforms as a value to hash."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch


def described(value: Any) -> Any:
    """A JSON value that differs whenever a transform's settings do."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, (np.ndarray, torch.Tensor, range)):
        return [str(x) for x in np.asarray(value).flatten().tolist()]
    if isinstance(value, Mapping):
        return {str(key): described(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [described(x) for x in value]
    if isinstance(value, (set, frozenset)):  # whose order differs between processes
        return sorted(map(str, value))
    if hasattr(value, "__qualname__"):  # a function or class
        return f"{value.__module__}.{value.__qualname__}"
    if not hasattr(value, "__dict__"):
        return str(value)
    return [f"{type(value).__module__}.{type(value).__qualname__}", described(vars(value))]
