"""Adapted weights of an image encoder: a safetensors file that names what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from med3dinsight_ext.io.files import sha256, write_atomic
from med3dinsight_ext.io.reading import parse_json, readable

FIX = "name the adapted.safetensors that adapt_teacher.yaml wrote"


def write_adapted(path: str | Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a network's weights in one step; equal weights and facts give equal bytes.

    Args:
        path: of the file.
        network: of an image tower.
        about: what made them: ``tower``, the name of the one that they started from, and more.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    facts = {"about": json.dumps(about, sort_keys=True)}
    write_atomic(Path(path), lambda draft: save_file(tensors, draft, facts))


def adapted_of(path: str | Path) -> dict[str, Any]:
    """What made a file of adapted weights; see ``write_adapted``.

    Raises:
        ValueError: it is missing, broken, or another kind of file.
    """
    with readable("weights", path, FIX), safe_open(str(path), "pt") as file:
        about = dict(parse_json(file.metadata()["about"]))
        return {**about, "tower": str(about["tower"])}


def load_adapted(network: nn.Module, path: Path, digest: str) -> None:
    """Load adapted weights into a network, strictly.

    Args:
        network: of an image tower.
        path: of the file.
        digest: its SHA-256 when it was named; embeddings are kept under it.

    Raises:
        ValueError: the file is broken, or another one by now.
    """
    if path.is_file() and sha256(path) != digest:
        raise ValueError(f"weights must not change during a run, got another {path}; start again")
    with readable("weights", path, FIX):
        network.load_state_dict(load_file(path))
