"""What a training runs with: config, code, machine, weights and cases that it starts from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser

from med3dinsight_ext import __version__
from med3dinsight_ext.data.laterality import Mirror
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.files import HashMemo, sha256
from med3dinsight_ext.io.remote import is_remote

# What a resumed training cannot change: who is held out, what outputs mean, and the rates, which
# are the checkpoint's.
FIXED = (
    *("seed", "val_fraction", "max_cases", "modality", "spacing", "ct_range"),
    *("label_names", "class_names", "mode", "teacher", "captions", "min_similarity"),
    *("learning_rate", "weight_decay", "layer_decay"),
)
UNLABELLED = "unlabelled"  # volumes of a mean teacher, or number of those with soft labels
LONGEST = 1000  # characters of an evaluated config value that is recorded


def running_parser() -> ConfigParser | None:
    """The parser of the MONAI workflow that is being run, with every override merged in.

    MONAI passes an expression the values of other items but not its parser, so this looks for the
    parser among the callers.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
    return None


def running_values() -> dict[str, Any]:
    """The evaluated items of the workflow that is being run."""
    parser = running_parser()
    return {} if parser is None else dict(parser.ref_resolver.resolved_content)


def settings(parser: ConfigParser | None, evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """The command and the config with every override; its evaluated values where they are plain."""
    config = None if parser is None else {k: v for k, v in parser.get().items() if k != "_meta_"}
    return {
        "command": ["python", *sys.orig_argv[1:]],
        "seed": evaluated.get("seed", (config or {}).get("seed")),
        "config": config,
        "evaluated": _plain(config or {}, evaluated),
    }


def _plain(config: Mapping[str, Any], evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the config's expressions and references that are short plain data without paths."""
    found = {}
    for key, raw in config.items():
        if key in evaluated and isinstance(raw, str) and raw[:1] in ("$", "@"):
            value = evaluated[key]
            if isinstance(value, Mirror):
                value = value[:2]  # the reason names classes
            try:
                text = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError):
                continue
            if len(text) <= LONGEST and not {"/", "\\"} & set(text):
                found[key] = value
    return found


class FixedSettings:
    """Settings of ``FIXED`` in a checkpoint: a training is resumed with the same ones alone.

    A file is compared by its name, and a teacher by its fingerprint, as both may be moved.
    """

    def __init__(self) -> None:
        parser = running_parser()
        config = parser.get() if parser else {}
        found = {key: config[key] for key in FIXED if key in config}
        if teacher := getattr(running_values().get("teacher"), "fingerprint", None):
            found["teacher"] = teacher
        if isinstance(captions := found.get("captions"), str):
            found["captions"] = os.path.basename(captions)
        self.content: dict[str, Any] = json.loads(json.dumps(found, default=str))

    def state_dict(self) -> dict[str, str]:
        """Settings as JSON."""
        return {"json": json.dumps(self.content)}

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Compare with those of a checkpoint.

        Raises:
            ValueError: names the settings that differ, with both values.
        """
        before = json.loads(saved["json"])
        changed = [
            f"{key} {told(now)} after {told(before[key])}"
            for key, now in self.content.items()
            if key in before and now != before[key]
        ]
        if changed:
            raise ValueError(f"settings must be as before, got {', '.join(changed)}")


def machine(device: Any) -> dict[str, Any]:
    """What the training runs on."""
    versions = {"python": platform.python_version(), "med3dinsight_ext": __version__}
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": idist.get_world_size(),
        "versions": versions | {name: version(name) for name in ("torch", "monai")},
        "code": _commit(),
    }


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout that this file is tracked in, and whether files were changed."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return None


def start_weights(transfer: Any) -> dict[str, Any] | None:
    """Name and hash of the weights that a run starts from, and what of them was loaded."""
    report = getattr(transfer, "report", None)
    if report is None or not report.file:
        return None
    file = Path(report.file)
    counts = {key: len(getattr(report, key)) for key in ("loaded", "extended", "skipped", "unused")}
    shares = {"share": report.share, "encoder_share": report.encoder_share}
    return {
        "file": file.name,
        "sha256": sha256(file) if file.is_file() else None,
        **counts,
        **shares,
    }


def cases(
    loaders: Mapping[str, Any], evaluated: Mapping[str, Any], folder: Path, hashed: bool
) -> dict[str, Any]:
    """Number of cases of each loader, a hash over their names and contents or None, and images.

    ``images`` has the ``image_key`` of each, by which ``origin`` knows them again. A case that is
    repeated counts once.
    """
    memo = case_memo(folder, evaluated)
    split = evaluated.get("split")
    soft = image_names(evaluated.get("unlabelled_items") or ())
    found: dict[str, Any] = {"split_sha256": sha256(Path(split)) if split else None}
    for name, loader in loaders.items():
        items = getattr(loader.dataset, "data", ())
        distinct = image_names(items)
        rows = sorted(_case(item, memo) for item in items) if hashed else []
        digest = hashlib.sha256("\n".join(rows).encode()).hexdigest() if hashed else None
        found[name] = {"cases": len(distinct) or len(items), "sha256": digest}
        if distinct & soft:
            found[name][UNLABELLED] = len(distinct & soft)
        if hashed:
            images = (item.get("image") for item in items if isinstance(item, Mapping))
            found[name]["images"] = " ".join(sorted(image_key(image, memo) for image in images))
    return found


def image_names(items: Iterable[Any]) -> set[str]:
    """Paths of the images of some items, each once."""
    images = (item.get("image") if isinstance(item, Mapping) else item for item in items)
    return {str(image) for image in images if isinstance(image, (str, os.PathLike))}


def case_memo(folder: Path, evaluated: Mapping[str, Any] | None = None) -> HashMemo:
    """Content hashes of a workflow's cases, where it writes.

    Args:
        folder: for a workflow that writes to no other.
        evaluated: items of the workflow; None takes those of the one that is being run.
    """
    evaluated = running_values() if evaluated is None else evaluated
    places = (evaluated.get(key) for key in ("prepared", "store_dir", "output_dir"))
    return HashMemo(Path(next((place for place in places if place), folder)) / "files.jsonl")


def image_key(image: Any, memo: HashMemo) -> str:
    """The first 12 digits of a hash over an image's content, whatever it is called."""
    content = memo.content(str(image)) if _is_file(image) else [str(image)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _is_file(value: Any) -> bool:
    """Whether a value is a file, a member of one, or a DICOM series, which is a folder."""
    path = str(value).partition("::")[0]
    return isinstance(value, (str, os.PathLike)) and (os.path.exists(path) or is_remote(path))


def _case(item: Any, memo: HashMemo) -> str:
    """Names and hashes of a case's image and label, or the label itself."""
    row = []
    for key in ("image", "label"):
        value = item.get(key) if isinstance(item, Mapping) else None
        path, _, member = str(value).partition("::")
        row += [os.path.basename(path), member, memo(path)] if _is_file(value) else [str(value)]
    return json.dumps(row)
