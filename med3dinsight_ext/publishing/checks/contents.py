"""Checks of what is in a published folder's files: sizes, hashes, paths, pickles."""

from __future__ import annotations

import hashlib
import pickle
import re
from typing import Any

import torch
from torch import Tensor

from med3dinsight_ext.publishing.checks.folder import (
    METADATA,
    PublishedFolder,
    Skipped,
    cause,
    settle,
)
from med3dinsight_ext.publishing.zoo import LARGE, texts
from med3dinsight_ext.training.weights import not_finite

HASHES = ("md5", "sha1", "sha256", "sha512")  # that MONAI takes
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
UNWANTED = (".pkl", ".pickle", ".joblib", ".dill", ".pyc", ".so", ".dll", ".exe")
MODELS = (".pt", ".pth", ".ts", ".onnx", ".json", ".safetensors")  # all that models/ may hold
ABSOLUTE = re.compile(  # how a config names a place; "~5 mm" is none
    r"""(?:%|\$['"])?(?:/|~(?![\d\s])|\\\\|[a-z]:[\\/]|file://)""", re.IGNORECASE
)
PERSONAL = re.compile(
    r"""(?<![\w.}>)\]*%~/-])  # inside a longer path, a placeholder's or a URL
        (?:/(?:home|Users|root|mnt|media|scratch|Volumes)/\w
          |[A-Za-z]:(?:\\{1,2}|/)[\w.-]+(?:\\{1,2}|/)\w
          |file:/{2,3}\w|~/\w)[^\s'"`,)]*
    """,
    re.VERBOSE,
)


def check_large(folder: PublishedFolder) -> str:
    """Files over 25 MB are listed, and listed files have their hashes."""
    listed, faults = folder.large(), []
    absent = [name for name in listed if not (folder.root / name).is_file()]
    for name, entry in listed.items():
        kind, due = str(entry.get("hash_type") or "md5"), entry.get("hash_val")
        if not (folder.root / name).resolve().is_relative_to(folder.root):
            faults.append(f"large_files lists {name}, which is outside of the bundle")
        elif not entry.get("url") or not due:
            faults.append(f"large_files lists {name} without url or hash_val")
        elif (folder.root / name).is_dir():
            faults.append(f"large_files lists {name}, which is a folder")
        elif kind not in HASHES:
            faults.append(f"large_files lists {name} with hash_type {kind}, which is unknown")
        elif name not in absent:
            digest = hashlib.new(kind)
            with (folder.root / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != str(due):
                faults.append(f"{name} has {kind} {digest.hexdigest()}, large_files says {due}")
    for name in folder.names():
        size = (folder.root / name).stat().st_size
        if size > LARGE and name not in listed:
            faults.append(f"{name} has {size / 1e6:.0f} MB and is not in large_files")
    if absent and not faults:
        raise Skipped(
            f"{', '.join(absent)} not here; "
            f"python -m monai.bundle download_large_files --bundle_path {folder.root.name}"
        )
    return settle(faults, f"{len(listed)} listed with their hashes, no other over 25 MB")


def check_paths(folder: PublishedFolder) -> str:
    """No config is bound to an absolute path, and no text names a place on a person's machine."""
    configs = folder.configs() | {METADATA: folder.metadata()}
    faults = [
        f"{name} has {place} {text}"
        for name, config in configs.items()
        for place, text in texts(config)
        if ABSOLUTE.match(text)
    ]
    read = 0
    for name in folder.names():
        content = (folder.root / name).read_bytes()
        if b"\0" in content[:8192]:
            continue
        read += 1
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            faults += [f"{name}:{number} has {found[0]}" for found in PERSONAL.finditer(line)]
    return settle(faults, f"none of a person's machine in {read} text files")


def check_checkpoints(folder: PublishedFolder) -> str:
    """Checkpoints hold finite tensors alone, and nothing else could run code when loaded."""
    names, faults = folder.names(), []
    weights = [name for name in names if name.lower().endswith(CHECKPOINTS)]
    for name in weights:
        try:
            content = torch.load(folder.root / name, map_location="cpu", weights_only=True)
            if name != "models/model.pt":  # which has a check of its own
                faults += [
                    f"{name} has {key} with values that are not finite"
                    for key in not_finite(_tensors(content))
                ]
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            faults.append(
                f"{name} holds {what[1] if what else 'objects'}, which may run code when loaded; "
                "save network.state_dict() alone"
            )
        except Exception as error:
            faults.append(f"{name} is broken: {cause(error)}")
    faults += [
        f"{name} does not belong here; delete it"
        for name in names
        if name.lower().endswith(UNWANTED)
        or (name.startswith("models/") and not name.lower().endswith(MODELS))
    ]
    return settle(faults, f"{len(weights)} files of tensors, no pickles")


def _tensors(content: Any, place: str = "") -> dict[str, Tensor]:
    """Tensors of a checkpoint by their keys; nnU-Net's are in a dict within one."""
    found: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        name = f"{place}{key}"
        found |= {name: value} if isinstance(value, Tensor) else _tensors(value, f"{name}::")
    return found
