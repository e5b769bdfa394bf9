"""Checks of what is in a published folder's files: sizes, hashes, paths, pickles."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import torch

from med3dinsight_ext.publishing.checks.folder import (
    METADATA,
    Skipped,
    cause,
    file_names,
    large_entries,
    read_configs,
    read_metadata,
    settle,
)
from med3dinsight_ext.publishing.zoo import LARGE, texts

HASHES = ("md5", "sha1", "sha256", "sha512")  # that MONAI takes
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
UNWANTED = (".pkl", ".pickle", ".joblib", ".dill", ".pyc", ".so", ".dll", ".exe")
MODELS = (".pt", ".ts", ".onnx", ".json", ".safetensors")  # all that models/ may hold
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


def check_large(root: Path) -> str:
    """Files over 25 MB are listed, and listed files have their hashes."""
    listed, faults = large_entries(root), []
    absent = [name for name in listed if not (root / name).is_file()]
    for name, entry in listed.items():
        kind, due = str(entry.get("hash_type") or "md5"), entry.get("hash_val")
        if not (root / name).resolve().is_relative_to(root):
            faults.append(f"large_files lists {name}, which is outside of the bundle")
        elif not entry.get("url") or not due:
            faults.append(f"large_files lists {name} without url or hash_val")
        elif (root / name).is_dir():
            faults.append(f"large_files lists {name}, which is a folder")
        elif kind not in HASHES:
            faults.append(f"large_files lists {name} with hash_type {kind}, which is unknown")
        elif name not in absent:
            digest = hashlib.new(kind)
            with (root / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != str(due):
                faults.append(f"{name} has {kind} {digest.hexdigest()}, large_files says {due}")
    for name in file_names(root):
        size = (root / name).stat().st_size
        if size > LARGE and name not in listed:
            faults.append(f"{name} has {size / 1e6:.0f} MB and is not in large_files")
    if absent and not faults:
        raise Skipped(
            f"{', '.join(absent)} not here; "
            f"python -m monai.bundle download_large_files --bundle_path {root.name}"
        )
    return settle(faults, f"{len(listed)} listed with their hashes, no other over 25 MB")


def check_paths(root: Path) -> str:
    """No config is bound to an absolute path, and no text names a place on a person's machine."""
    configs = read_configs(root) | {METADATA: read_metadata(root)}
    faults = [f"{name} has {place} {text}" for name, config in configs.items()
              for place, text in texts(config) if ABSOLUTE.match(text)]  # fmt: skip
    read = 0
    for name in file_names(root):
        content = (root / name).read_bytes()
        if b"\0" in content[:8192]:
            continue
        read += 1
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            faults += [f"{name}:{number} has {found[0]}" for found in PERSONAL.finditer(line)]
    return settle(faults, f"none of a person's machine in {read} text files")


def check_checkpoints(root: Path) -> str:
    """Checkpoints hold tensors alone, and nothing else could run code when loaded."""
    names, faults = file_names(root), []
    weights = [name for name in names if name.lower().endswith(CHECKPOINTS)]
    for name in weights:
        try:
            torch.load(root / name, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            faults.append(
                f"{name} holds {what[1] if what else 'objects'}, which may run code when loaded; "
                "save network.state_dict() alone"
            )
        except Exception as error:
            faults.append(f"{name} is broken: {cause(error)}")
    faults += [f"{name} does not belong here; delete it" for name in names
               if name.lower().endswith(UNWANTED)
               or (name.startswith("models/") and not name.lower().endswith(MODELS))]  # fmt: skip
    return settle(faults, f"{len(weights)} files of tensors, no pickles")
