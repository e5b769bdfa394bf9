"""Files, fingerprints and image settings of checkpoints, from the hub or a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from med3dinsight_ext.io.files import sha256
from med3dinsight_ext.io.reading import read_json, readable

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def folder_fingerprint(folder: Path) -> str:
    """Hash of every weight and settings file of a model folder.

    Raises:
        ValueError: the folder holds no weights.
    """
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"model must be a folder with weights ({', '.join(WEIGHTS)}), got {folder}; "
            "copy the model's files into it (hf download MODEL --local-dir DIR)"
        )
    suffixes = {".json", ".txt", ".model", ".jinja", *(pattern[1:] for pattern in WEIGHTS)}
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())
    parts = [f"{p.relative_to(folder).as_posix()} {sha256(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def model_fingerprint(model: str, revision: str | None = None) -> str:
    """Identifier of the exact weights: the hash of a local folder, or the commit of a hub id.

    Raises:
        ValueError: there is no such folder, or the hub cannot be reached.
    """
    if Path(model).is_dir():
        return folder_fingerprint(Path(model))
    if model.startswith((".", "/", "~")):
        raise ValueError(
            f"model must be a folder or a hub id, got {model}; there is no such folder"
        )
    return Path(hub_file(model, "config.json", revision)).parent.name


def hub_file(model: str, name: str, revision: str | None = None) -> str:
    """Local path of a file of a hub id or folder, downloaded if it is not cached.

    Raises:
        ValueError: neither is possible.
    """
    from transformers.utils import cached_file

    try:
        return str(cached_file(model, name, revision=revision))
    except OSError as error:
        raise ValueError(
            f"model must be reachable, got {model!r}: {str(error).splitlines()[0]} Without "
            f"network: download it elsewhere (hf download {model} --local-dir DIR), "
            "copy DIR here and use it as the model; a gated model also needs hf auth login"
        ) from error


def image_settings(model: str, revision: str | None = None) -> tuple[int, list[float], list[float]]:
    """Input size in pixels, mean and standard deviation from a checkpoint's preprocessor file."""
    try:
        path, part = hub_file(model, "preprocessor_config.json", revision), None
    except ValueError:
        path, part = hub_file(model, "processor_config.json", revision), "image_processor"
    with readable("preprocessor settings", path, "copy the model's files again"):
        settings = read_json(path, "preprocessor settings")
        settings = settings[part] if part else settings
        crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
        size: Any = crop or settings.get("size") or 224
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or max(size.values())
        if settings.get("do_normalize") is False:  # mean and deviation may be there all the same
            return int(size), [0.0] * 3, [1.0] * 3
        mean, std = ([float(x) for x in settings[key]] for key in ("image_mean", "image_std"))
        return int(size), mean, std
