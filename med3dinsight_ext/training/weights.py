"""Weights files: named tensors, read without running code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.io.files import write_atomic

NESTED = ("state_dict", "model", "network", "student")  # keys that hold the weights in a file


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, value in weights.items() if not value.isfinite().all()]


def write_torch(path: Path, content: Any) -> None:
    """Write a file of ``torch.save`` in one step.

    Raises:
        OSError: the disk is full or fails. Of a path, ``torch.save`` raises a RuntimeError about
            positions instead.
    """

    def write(draft: Path) -> None:
        with draft.open("wb", buffering=1 << 20) as file:  # torch.save writes hundreds of pieces
            torch.save(content, file)

    write_atomic(path, write)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name; code in it is not run.

    Args:
        path: .safetensors, or a file of ``torch.save``: a flat state dict, or a dict with one under
            "state_dict", "model", "network" or "student" (of which only the network is read).

    Raises:
        ValueError: it is missing, empty, broken, holds objects other than tensors, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pretrained must be a weights file, got no file at {path}; correct it")
    if not path.stat().st_size:
        raise ValueError(f"pretrained must hold weights, got the empty file {path}; copy it again")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"pretrained must hold tensors only, got {path}, which is broken or holds objects that "
            f"would run code when loaded ({first_line(error)[:200]}); "
            "save network.state_dict() alone"
        ) from error
    except Exception as error:  # the unpickler, zip and safetensors each have their own
        raise ValueError(
            f"pretrained must be readable, got the broken file {path} ({error}); copy it again"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            if key == "student":  # network, PSAT and heads
                content = {
                    name.removeprefix("network."): value
                    for name, value in content.items()
                    if name.startswith("network.")
                }
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        found = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"pretrained must hold named tensors, got {found} in {path}")
    if bad := [name for name, value in tensors.items() if _is_expanded(value)]:
        raise ValueError(
            f"pretrained must store every number, got {bad[:3]} of {path}, which claim more than "
            "they hold; save network.state_dict() alone"
        )
    if bad := not_finite(tensors):
        raise ValueError(f"pretrained must be finite, got NaN or infinity in {bad[:3]} of {path}")
    return tensors


def _is_expanded(value: Tensor) -> bool:
    """Whether a tensor is sparse, or larger than its storage: copying it may fill the memory."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return True
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def renamed(weights: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename weights by regular expressions.

    Args:
        weights: name to tensor.
        rename: regular expression to replacement, applied to every name in this order.

    Raises:
        ValueError: a pattern matches no name, or two tensors get one name.
    """
    result = dict(weights)
    for pattern, replacement in rename.items():
        if not any(re.search(pattern, name) for name in result):
            raise ValueError(
                f"rename must match names in the file, got {pattern!r}, which matches none; "
                f"the file has {', '.join(list(result)[:3])} …"
            )
        new = {re.sub(pattern, replacement, name): value for name, value in result.items()}
        if len(new) < len(result):
            raise ValueError(f"rename must keep names apart, but {pattern!r} joins some")
        result = new
    return result
