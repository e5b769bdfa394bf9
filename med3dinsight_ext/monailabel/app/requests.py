"""Checks of what comes over REST: names that become paths, and values that become configs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STORED = (".nii", ".nii.gz")  # files that a folder of images lists
RESULTS = (*STORED, ".nrrd")
LONGEST_NAME = 200
TRACKING = ("none", "mlflow")  # MONAI reads any other text as the path of a config


def check_name(name: object, what: str) -> None:
    """Check that a name of an image or a tag is a single component of a path.

    MONAI Label joins both to a folder and writes there.

    Raises:
        ValueError: it has separators or control characters, begins with a dot, or is too long.
    """
    plain = isinstance(name, str) and re.fullmatch(
        r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*", name
    )
    if not plain or len(os.fsencode(str(name))) > LONGEST_NAME:
        raise ValueError(
            f"{what} must be a plain name of at most {LONGEST_NAME} bytes, got {str(name)[:80]!r}; "
            "leave out separators, control characters and a leading dot"
        )


def check_extension(path: str, what: str, endings: tuple[str, ...] = STORED) -> None:
    """Check that a file's ending is one of ``endings``.

    Raises:
        ValueError: it is another one.
    """
    if not str(path).endswith(endings):
        raise ValueError(f"{what} must end in one of {endings}, got {Path(path).name[-80:]!r}")


def check_values(request: Any, what: str = "request") -> None:
    """Check that no text of a request is an expression or a reference of MONAI's configs.

    MONAI Label merges values of a request into a bundle's config, where a text that begins with $
    is evaluated as Python, and a mapping with _target_ is a call.

    Raises:
        ValueError: a text begins with $, @ or %, or a key has a separator of config keys or is one
            of those that describe a component.
    """
    if isinstance(request, Mapping):
        for key, value in request.items():
            if not isinstance(key, str) or re.search(r"[$@%#]|::|^_.*_$", key):
                raise ValueError(f"{what} must have plain keys, got {str(key)[:80]!r}; rename it")
            check_values(value, f"{what} {key}")
    elif isinstance(request, (list, tuple)):
        for value in request:
            check_values(value, what)
    elif isinstance(request, str) and request.lstrip()[:1] in ("$", "@", "%"):
        raise ValueError(
            f"{what} must be a plain value, got {request[:80]!r}; leave out $, @ and %"
        )


def check_training(request: Mapping[str, Any]) -> None:
    """``check_values`` of a request for a training, and that its tracking names no file.

    Raises:
        ValueError: of ``check_values``, or tracking is none of ``TRACKING``.
    """
    check_values(request)
    given = request.get("tracking")
    tracking = given[0] if isinstance(given, list) and given else given
    if str(tracking or "none").lower() not in TRACKING:
        raise ValueError(
            f"tracking must be one of {TRACKING}, got {str(tracking)[:80]!r}; write other settings "
            "into the bundle's train.json"
        )


def is_inside(path: str, folders: Iterable[str | Path]) -> bool:
    """Whether a path, with links resolved, lies in one of the folders."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders if folder)
